#include "cpu/attend_impl.h"

namespace tq_hb {

const IsaKernel& attend_kernel_avx2() noexcept {
  static const IsaKernel kernel{"avx2", run};
  return kernel;
}

}  // namespace tq_hb
