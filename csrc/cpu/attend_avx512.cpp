#include "cpu/attend_impl.h"

namespace tq_hb {

const IsaKernel& attend_kernel_avx512() noexcept {
  static const IsaKernel kernel{"avx512", run};
  return kernel;
}

}  // namespace tq_hb
