// The sanitizer that the process runs under, if any, and its interface.
//
// The symbols are weak: they exist where a sanitizer is linked in. The engine itself is compiled without one,
// since switching stacks and passing values between threads is its business and no error; kernels are compiled
// with the one that is there.
#pragma once

#include <cstddef>

extern "C" {
void* __tsan_get_current_fiber() __attribute__((weak));
void* __tsan_create_fiber(unsigned flags) __attribute__((weak));
void __tsan_destroy_fiber(void* fiber) __attribute__((weak));
void __tsan_switch_to_fiber(void* fiber, unsigned flags) __attribute__((weak));
void __tsan_acquire(void* address) __attribute__((weak));
void __tsan_release(void* address) __attribute__((weak));
int __asan_address_is_poisoned(const volatile void* address) __attribute__((weak));
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, std::size_t size) __attribute__((weak));
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, std::size_t* size) __attribute__((weak));
}

namespace metal_sim {

inline bool under_thread_sanitizer() {
  return __tsan_create_fiber != nullptr;
}
inline bool under_address_sanitizer() {
  return __asan_address_is_poisoned != nullptr;
}

}  // namespace metal_sim
