#include "cpu/float32_path.h"
#include "cpu/int16_vbmi.h"
// Its primitives come first.
#include "cpu/int16_path.h"

namespace tq_hb {

const IsaKernel& attend_kernel_avx512_vbmi() noexcept {
  static const IsaKernel kernel{"avx512", attend_float32, attend_int16, quantize_query};
  return kernel;
}

}  // namespace tq_hb
