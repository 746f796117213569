#include "cpu/isa.h"

#include <atomic>

#include "core/error.h"

namespace tq_hb {
namespace {

std::vector<const IsaKernel*> find_available() {
  std::vector<const IsaKernel*> kernels{&attend_kernel_portable()};
#if defined(TQ_HB_HAVE_X86_KERNELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2) kernels.push_back(&attend_kernel_avx2());
  const bool vbmi = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  if (avx512) kernels.push_back(vbmi ? &attend_kernel_avx512_vbmi() : &attend_kernel_avx512());
#endif
  return kernels;
}

std::atomic<const IsaKernel*>& chosen() {
  static std::atomic<const IsaKernel*> kernel{available_kernels().back()};
  return kernel;
}

}  // namespace

const std::vector<const IsaKernel*>& available_kernels() {
  static const std::vector<const IsaKernel*> kernels = find_available();
  return kernels;
}

const IsaKernel& attend_kernel() {
  return *chosen().load(std::memory_order_relaxed);
}

void set_attend_kernel(const std::string& op, const std::string& field, const std::string& isa) {
  std::string names;
  for (const IsaKernel* kernel : available_kernels()) {
    if (isa == kernel->isa) return chosen().store(kernel, std::memory_order_relaxed);
    names += (names.empty() ? "" : ", ") + std::string(kernel->isa);
  }
  throw invalid(op, field, "must be one of those this processor runs (" + names + ")", "'" + isa + "'");
}

}  // namespace tq_hb
