#include "cpu/isa.h"

namespace tq_hb {
namespace {

const IsaKernel& choose() noexcept {
#if defined(TQ_HB_HAVE_X86_KERNELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) return attend_kernel_avx512();
  if (avx2) return attend_kernel_avx2();
#endif
  return attend_kernel_portable();
}

}  // namespace

const IsaKernel& attend_kernel() noexcept {
  static const IsaKernel& chosen = choose();
  return chosen;
}

}  // namespace tq_hb
