#include "cpu/attend_impl.h"

namespace tq_hb {

const AttendKernel& attend_kernel_avx2() noexcept {
  static const AttendKernel kernel{"avx2", run};
  return kernel;
}

}  // namespace tq_hb
