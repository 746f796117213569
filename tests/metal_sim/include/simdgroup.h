// Simdgroup operations and barriers: rendezvous that the engine organises.
//
// Each takes the place it is called from by a default argument, so that the engine can tell operations apart.
#pragma once

#include "abi.h"
#include "math.h"

namespace metal_sim {

/// A copy, so that calling one of its functions reads nothing outside the library.
__attribute__((visibility("hidden"))) inline abi::Engine engine;

#if defined(METAL_SIM_TRACE)
#define METAL_SIM_UNTRACED __attribute__((no_sanitize("coverage"), disable_sanitizer_instrumentation))
#else
#define METAL_SIM_UNTRACED __attribute__((disable_sanitizer_instrumentation))
#endif

#define METAL_SIM_SITE                                     \
  ::metal_sim::abi::Site site = ::metal_sim::abi::Site {   \
    __builtin_FILE(), __builtin_LINE(), __builtin_COLUMN() \
  }

template <class T>
constexpr bool fits_slot = sizeof(T) <= sizeof(abi::Slot) && (sizeof(T) & (sizeof(T) - 1)) == 0;

template <class T>
METAL_SIM_INLINE T shuffle(T value, abi::Shuffle how, unsigned operand, abi::Site site) {
  static_assert(fits_slot<T>, "no type for a simdgroup operation");
  engine.shuffle(site, &value, sizeof(T), how, operand);
  return value;
}

template <class T>
METAL_SIM_INLINE T reduce(T value, abi::Combine* combine, abi::Site site) {
  static_assert(fits_slot<T>, "no type for a simdgroup operation");
  engine.reduce(site, &value, sizeof(T), combine);
  return value;
}

// A butterfly over the distances 16, 8, 4, 2, 1; every lane gets the result.
template <class T, class Operation>
METAL_SIM_UNTRACED void combine_all(abi::Slot* slots, unsigned lanes) {
  T values[abi::kLanes];
  for (unsigned i = 0; i < lanes; ++i) __builtin_memcpy(&values[i], slots[i].bytes, sizeof(T));
  for (unsigned distance = abi::kLanes / 2; distance > 0; distance /= 2) {
    for (unsigned i = 0; i < distance && i + distance < lanes; ++i) {
      values[i] = Operation::apply(values[i], values[i + distance]);
    }
  }
  for (unsigned i = 0; i < lanes; ++i) __builtin_memcpy(slots[i].bytes, &values[0], sizeof(T));
}

template <class T, class Operation, bool is_inclusive>
METAL_SIM_UNTRACED void combine_prefix(abi::Slot* slots, unsigned lanes) {
  T sum = Operation::template identity<T>();
  for (unsigned i = 0; i < lanes; ++i) {
    T value;
    __builtin_memcpy(&value, slots[i].bytes, sizeof(T));
    const T next = Operation::apply(sum, value);
    __builtin_memcpy(slots[i].bytes, is_inclusive ? &next : &sum, sizeof(T));
    sum = next;
  }
}

#define METAL_SIM_OPERATION(Name, expression)     \
  struct Name {                                   \
    template <class T>                            \
    METAL_SIM_UNTRACED static T apply(T a, T b) { \
      return expression;                          \
    }                                             \
  };
METAL_SIM_OPERATION(Max, metal::max(a, b))
METAL_SIM_OPERATION(Min, metal::min(a, b))
METAL_SIM_OPERATION(And, T(a& b))
METAL_SIM_OPERATION(Or, T(a | b))
METAL_SIM_OPERATION(Xor, T(a ^ b))
#undef METAL_SIM_OPERATION

struct Sum {
  template <class T>
  METAL_SIM_UNTRACED static T identity() {
    return T(0);
  }
  template <class T>
  METAL_SIM_UNTRACED static T apply(T a, T b) {
    return a + b;
  }
};
struct Product {
  template <class T>
  METAL_SIM_UNTRACED static T identity() {
    return T(1);
  }
  template <class T>
  METAL_SIM_UNTRACED static T apply(T a, T b) {
    return a * b;
  }
};

}  // namespace metal_sim

namespace metal {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(uint(a) | uint(b));
}

METAL_SIM_INLINE void threadgroup_barrier(mem_flags flags, METAL_SIM_SITE) {
  metal_sim::engine.barrier(site, metal_sim::abi::Scope::kGroup, uint(flags));
}
METAL_SIM_INLINE void simdgroup_barrier(mem_flags flags, METAL_SIM_SITE) {
  metal_sim::engine.barrier(site, metal_sim::abi::Scope::kSimdgroup, uint(flags));
}

#define METAL_SIM_REDUCTION(name, Operation)                                                 \
  template <class T>                                                                         \
  METAL_SIM_INLINE T name(T value, METAL_SIM_SITE) {                                         \
    return metal_sim::reduce(value, &metal_sim::combine_all<T, metal_sim::Operation>, site); \
  }
METAL_SIM_REDUCTION(simd_sum, Sum)
METAL_SIM_REDUCTION(simd_product, Product)
METAL_SIM_REDUCTION(simd_max, Max)
METAL_SIM_REDUCTION(simd_min, Min)
METAL_SIM_REDUCTION(simd_and, And)
METAL_SIM_REDUCTION(simd_or, Or)
METAL_SIM_REDUCTION(simd_xor, Xor)
#undef METAL_SIM_REDUCTION

#define METAL_SIM_PREFIX(name, Operation, is_inclusive)                                                       \
  template <class T>                                                                                          \
  METAL_SIM_INLINE T name(T value, METAL_SIM_SITE) {                                                          \
    return metal_sim::reduce(value, &metal_sim::combine_prefix<T, metal_sim::Operation, is_inclusive>, site); \
  }
METAL_SIM_PREFIX(simd_prefix_inclusive_sum, Sum, true)
METAL_SIM_PREFIX(simd_prefix_exclusive_sum, Sum, false)
METAL_SIM_PREFIX(simd_prefix_inclusive_product, Product, true)
METAL_SIM_PREFIX(simd_prefix_exclusive_product, Product, false)
#undef METAL_SIM_PREFIX

#define METAL_SIM_SHUFFLE(name, how)                                               \
  template <class T>                                                               \
  METAL_SIM_INLINE T name(T value, ushort operand, METAL_SIM_SITE) {               \
    return metal_sim::shuffle(value, metal_sim::abi::Shuffle::how, operand, site); \
  }
METAL_SIM_SHUFFLE(simd_shuffle, kFrom)
METAL_SIM_SHUFFLE(simd_shuffle_xor, kXor)
METAL_SIM_SHUFFLE(simd_shuffle_up, kUp)
METAL_SIM_SHUFFLE(simd_shuffle_down, kDown)
METAL_SIM_SHUFFLE(simd_broadcast, kBroadcast)
#undef METAL_SIM_SHUFFLE

template <class T>
METAL_SIM_INLINE T simd_broadcast_first(T value, METAL_SIM_SITE) {
  return metal_sim::shuffle(value, metal_sim::abi::Shuffle::kBroadcast, 0, site);
}

METAL_SIM_INLINE bool simd_is_first() {
  return metal_sim::engine.lane() == 0;
}
METAL_SIM_INLINE bool simd_any(bool condition, METAL_SIM_SITE) {
  return simd_or(uint(condition), site) != 0;
}
METAL_SIM_INLINE bool simd_all(bool condition, METAL_SIM_SITE) {
  return simd_and(uint(condition), site) != 0;
}

/// One bit per lane.
class simd_vote {
 public:
  typedef ulong vote_t;
  explicit constexpr simd_vote(vote_t votes = 0) : votes_(votes) {}
  explicit constexpr operator vote_t() const { return votes_; }
  constexpr bool all() const { return votes_ == 0xffffffffu; }
  constexpr bool any() const { return votes_ != 0; }

 private:
  vote_t votes_;
};
METAL_SIM_INLINE simd_vote simd_ballot(bool condition, METAL_SIM_SITE) {
  return simd_vote(simd_or(ulong(condition) << metal_sim::engine.lane(), site));
}

}  // namespace metal
