// Metal's 32-bit atomic types and functions, on device or threadgroup memory.
#pragma once

#include "simdgroup.h"

namespace metal {

enum memory_order { memory_order_relaxed = __ATOMIC_RELAXED };

template <class T>
struct _atomic {
  T value;
};
typedef _atomic<int> atomic_int;
typedef _atomic<uint> atomic_uint;
typedef _atomic<float> atomic_float;
template <class T>
using atomic = _atomic<T>;

}  // namespace metal

namespace metal_sim {

// Marks the accesses that an atomic operation compiles to as atomic ones.
class Atomic {
 public:
  template <class P>
  METAL_SIM_INLINE Atomic(P address, bool is_write) {
    engine.begin_atomic((const void*)(address), sizeof(*address), is_write);
  }
  METAL_SIM_INLINE ~Atomic() { engine.end_atomic(); }
};

template <class P>
using ValueOf = decltype(P()->value + 0);

// The bits of the value, whatever its type and address space.
template <class P>
METAL_SIM_INLINE uint* word(P object) {
  static_assert(sizeof(*object) == sizeof(uint), "atomics have 32 bits");
  return (uint*)(object);
}

}  // namespace metal_sim

namespace metal {

#define METAL_SIM_FETCH(name, builtin)                                                \
  template <class P>                                                                  \
  METAL_SIM_INLINE auto name(P object, metal_sim::ValueOf<P> operand, memory_order) { \
    const metal_sim::Atomic mark(object, true);                                       \
    return builtin(&object->value, operand, __ATOMIC_RELAXED);                        \
  }
METAL_SIM_FETCH(atomic_fetch_add_explicit, __atomic_fetch_add)
METAL_SIM_FETCH(atomic_fetch_sub_explicit, __atomic_fetch_sub)
METAL_SIM_FETCH(atomic_fetch_and_explicit, __atomic_fetch_and)
METAL_SIM_FETCH(atomic_fetch_or_explicit, __atomic_fetch_or)
METAL_SIM_FETCH(atomic_fetch_xor_explicit, __atomic_fetch_xor)
METAL_SIM_FETCH(atomic_fetch_min_explicit, __atomic_fetch_min)
METAL_SIM_FETCH(atomic_fetch_max_explicit, __atomic_fetch_max)
#undef METAL_SIM_FETCH

template <class P>
METAL_SIM_INLINE auto atomic_exchange_explicit(P object, metal_sim::ValueOf<P> desired, memory_order) {
  const metal_sim::Atomic mark(object, true);
  return as_type<metal_sim::ValueOf<P>>(
      __atomic_exchange_n(metal_sim::word(object), as_type<uint>(desired), __ATOMIC_RELAXED));
}
template <class P>
METAL_SIM_INLINE auto atomic_load_explicit(P object, memory_order) {
  const metal_sim::Atomic mark(object, false);
  return as_type<metal_sim::ValueOf<P>>(__atomic_load_n(metal_sim::word(object), __ATOMIC_RELAXED));
}
template <class P>
METAL_SIM_INLINE void atomic_store_explicit(P object, metal_sim::ValueOf<P> desired, memory_order) {
  const metal_sim::Atomic mark(object, true);
  __atomic_store_n(metal_sim::word(object), as_type<uint>(desired), __ATOMIC_RELAXED);
}
template <class P>
METAL_SIM_INLINE bool atomic_compare_exchange_weak_explicit(P object, metal_sim::ValueOf<P>* expected,
                                                            metal_sim::ValueOf<P> desired, memory_order, memory_order) {
  const metal_sim::Atomic mark(object, true);
  uint found = as_type<uint>(*expected);
  const bool exchanged = __atomic_compare_exchange_n(metal_sim::word(object), &found, as_type<uint>(desired), true,
                                                     __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  *expected = as_type<metal_sim::ValueOf<P>>(found);
  return exchanged;
}

}  // namespace metal
