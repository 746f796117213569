#include "cpu/isa.h"

#include <atomic>

#if defined(TQ_HB_HAVE_X86_KERNELS)
#include <cpuid.h>
#endif

#include "core/error.h"

namespace tq_hb {
namespace {

#if defined(TQ_HB_HAVE_AVXVNNI_KERNELS)
/// Compilers have different names for it, or none.
bool has_avxvnni() noexcept {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
}
#endif

struct Isa {
  const IsaKernel* attend;
  EncodeRows* encode;
};

/// Slowest first.
std::vector<Isa> find_available() {
  std::vector<Isa> available{{&attend_kernel_portable(), encode_rows_portable}};
#if defined(TQ_HB_HAVE_X86_KERNELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  if (avx2) available.push_back({&attend_kernel_avx2(), encode_rows_avx2});
#if defined(TQ_HB_HAVE_AVXVNNI_KERNELS)
  if (avx2 && has_avxvnni()) available.push_back({&attend_kernel_avxvnni(), encode_rows_avx2});
#endif
  if (avx512) available.push_back({&attend_kernel_avx512(), encode_rows_avx512});
#elif defined(TQ_HB_HAVE_NEON_KERNELS)
  available.push_back({&attend_kernel_neon(), encode_rows_neon});
#endif
  return available;
}

const std::vector<Isa>& available_isas() {
  // Never freed: threads that outlast static destruction go on choosing kernels.
  static const std::vector<Isa>& available = *new std::vector<Isa>(find_available());
  return available;
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa{&available_isas().back()};
  return isa;
}

}  // namespace

std::vector<const IsaKernel*> available_kernels() {
  std::vector<const IsaKernel*> kernels;
  for (const Isa& isa : available_isas()) kernels.push_back(isa.attend);
  return kernels;
}

bool prefers_first_level() noexcept {
#if defined(TQ_HB_HAVE_X86_KERNELS)
  static const bool prefers = [] {
    constexpr unsigned kZen5 = 0x1a;  // and what follows it
    unsigned version = 0, b = 0, c = 0, d = 0;
    if (!__builtin_cpu_is("amd") || __get_cpuid(1, &version, &b, &c, &d) == 0) return false;
    const unsigned family = (version >> 8 & 0xf) + (version >> 20 & 0xff);
    return family >= kZen5;
  }();
  return prefers;
#else
  return false;
#endif
}

const IsaKernel& attend_kernel() {
  return *chosen().load(std::memory_order_relaxed)->attend;
}

EncodeRows& encode_kernel() {
  return *chosen().load(std::memory_order_relaxed)->encode;
}

void set_attend_kernel(const std::string& op, const std::string& field, const std::string& name) {
  std::string names;
  for (const Isa& isa : available_isas()) {
    if (name == isa.attend->isa) return chosen().store(&isa, std::memory_order_relaxed);
    names += (names.empty() ? "" : ", ") + std::string(isa.attend->isa);
  }
  throw invalid(op, field, "must be one of those this processor runs (" + names + ")", "'" + name + "'");
}

}  // namespace tq_hb
