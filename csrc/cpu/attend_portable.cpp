#include "cpu/attend_impl.h"

namespace tq_hb {

const AttendKernel& attend_kernel_portable() noexcept {
  static const AttendKernel kernel{"portable", run};
  return kernel;
}

}  // namespace tq_hb
