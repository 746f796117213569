#include "cpu/float32_vbmi.h"
#include "cpu/int16_vbmi.h"
// Their primitives come first.
#include "cpu/float32_lookup.h"
#include "cpu/int16_path.h"

namespace tq_hb {

const IsaKernel& attend_kernel_avx512() noexcept {
  static const IsaKernel kernel{"avx512", attend_float32, place_query, attend_int16, quantize_query};
  return kernel;
}

}  // namespace tq_hb
