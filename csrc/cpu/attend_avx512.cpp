#include "cpu/float32_path.h"

namespace tq_hb {

const IsaKernel& attend_kernel_avx512() noexcept {
  static const IsaKernel& avx2 = attend_kernel_avx2();
  static const IsaKernel kernel{"avx512", attend_in_float32<ScalarDecoder>, nullptr, avx2.attend_int16,
                                avx2.quantize_query};
  return kernel;
}

}  // namespace tq_hb
