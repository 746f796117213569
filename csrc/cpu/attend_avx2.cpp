#include "cpu/float32_path.h"
#include "cpu/int16_avx2.h"
// Its primitives come first.
#include "cpu/int16_path.h"

namespace tq_hb {

const IsaKernel& attend_kernel_avx2() noexcept {
  static const IsaKernel kernel{"avx2", attend_float32, attend_int16, quantize_query};
  return kernel;
}

}  // namespace tq_hb
