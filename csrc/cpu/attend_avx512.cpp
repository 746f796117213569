#include "cpu/attend_impl.h"

namespace tq_hb {

const AttendKernel& attend_kernel_avx512() noexcept {
  static const AttendKernel kernel{"avx512", run};
  return kernel;
}

}  // namespace tq_hb
