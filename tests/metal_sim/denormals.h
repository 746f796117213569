// How the processor treats denormal floats in the calling thread.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif
#include <cstdint>

namespace metal_sim {

#if defined(__x86_64__)
constexpr unsigned kFlushBits = 1u << 15 | 1u << 6;  // results, and operands
inline unsigned float_state() {
  return _mm_getcsr();
}
inline void set_float_state(unsigned state) {
  _mm_setcsr(state);
}
#elif defined(__aarch64__)
constexpr std::uint64_t kFlushBits = std::uint64_t{1} << 24;
inline std::uint64_t float_state() {
  std::uint64_t state;
  asm volatile("mrs %0, fpcr" : "=r"(state));
  return state;
}
inline void set_float_state(std::uint64_t state) {
  asm volatile("msr fpcr, %0" : : "r"(state));
}
#endif

inline bool flushes_denormals() {
  return (float_state() & kFlushBits) != 0;
}

inline void set_flush_denormals(bool flush) {
  if (flush != flushes_denormals()) set_float_state(flush ? float_state() | kFlushBits : float_state() & ~kFlushBits);
}

/// Whatever is set while it lives is undone.
class DenormalsGuard {
 public:
  DenormalsGuard() : flush_(flushes_denormals()) {}
  ~DenormalsGuard() { set_flush_denormals(flush_); }
  DenormalsGuard(const DenormalsGuard&) = delete;
  DenormalsGuard& operator=(const DenormalsGuard&) = delete;

 private:
  bool flush_;
};

}  // namespace metal_sim
