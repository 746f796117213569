#include "cpu/attend_impl.h"

namespace tq_hb {

const IsaKernel& attend_kernel_portable() noexcept {
  static const IsaKernel kernel{"portable", run};
  return kernel;
}

}  // namespace tq_hb
