// How the engine calls a kernel: each parameter is taken from the arguments by its attribute and C++ type.
#pragma once

#include "simdgroup.h"

namespace metal_sim {

// Attributes that hold a position, a size or an index.
template <class T>
struct Convert {
  METAL_SIM_UNTRACED static T from(const abi::Arguments& arguments, abi::Parameter parameter) {
    const abi::GroupArguments& group = *arguments.group;
    unsigned v[3] = {0, 0, 0};
    for (unsigned i = 0; i < 3; ++i) {
      switch (parameter.attribute) {
        case abi::Attribute::kThreadPositionInGrid:
          v[i] = group.position[i] * group.threads[i] + arguments.position[i];
          break;
        case abi::Attribute::kGroupPositionInGrid:
          v[i] = group.position[i];
          break;
        case abi::Attribute::kThreadPositionInGroup:
          v[i] = arguments.position[i];
          break;
        case abi::Attribute::kThreadsPerGroup:
          v[i] = group.threads[i];
          break;
        case abi::Attribute::kGroupsPerGrid:
          v[i] = group.groups[i];
          break;
        case abi::Attribute::kThreadsPerGrid:
          v[i] = group.groups[i] * group.threads[i];
          break;
        default:
          v[i] = index(arguments, parameter.attribute);
      }
    }
    if constexpr (Shape<T>::size == 1) {
      return static_cast<T>(v[0]);
    } else {
      T result;
      for (int i = 0; i < Shape<T>::size; ++i) result[i] = static_cast<typename Shape<T>::Element>(v[i]);
      return result;
    }
  }

 private:
  METAL_SIM_UNTRACED static unsigned index(const abi::Arguments& arguments, abi::Attribute attribute) {
    const unsigned* threads = arguments.group->threads;
    switch (attribute) {
      case abi::Attribute::kThreadIndexInGroup:
        return arguments.index;
      case abi::Attribute::kSimdgroupIndexInGroup:
        return arguments.index / abi::kLanes;
      case abi::Attribute::kThreadIndexInSimdgroup:
        return arguments.index % abi::kLanes;
      case abi::Attribute::kSimdgroupsPerGroup:
        return (threads[0] * threads[1] * threads[2] + abi::kLanes - 1) / abi::kLanes;
      default:
        return abi::kLanes;
    }
  }
};

template <class T>
struct Convert<T*> {
  METAL_SIM_UNTRACED static T* from(const abi::Arguments& arguments, abi::Parameter parameter) {
    const abi::GroupArguments& group = *arguments.group;
    return static_cast<T*>(parameter.attribute == abi::Attribute::kBuffer ? group.buffers[parameter.index]
                                                                          : group.memory[parameter.index]);
  }
};
template <class T>
struct Convert<T&> {
  METAL_SIM_UNTRACED static T& from(const abi::Arguments& arguments, abi::Parameter parameter) {
    return *Convert<T*>::from(arguments, parameter);
  }
};

template <int... I>
struct Sequence {};
template <int N, int... I>
struct MakeSequence : MakeSequence<N - 1, N - 1, I...> {};
template <int... I>
struct MakeSequence<0, I...> {
  typedef Sequence<I...> type;
};

template <auto function, const abi::Parameter* parameters>
struct Call;
template <class... A, void (*function)(A...), const abi::Parameter* parameters>
struct Call<function, parameters> {
  static constexpr unsigned parameter_count = sizeof...(A);

  template <int... I>
  METAL_SIM_UNTRACED static void expand(const abi::Arguments& arguments, Sequence<I...>) {
    function(Convert<A>::from(arguments, parameters[I])...);
  }
  METAL_SIM_UNTRACED static void call(const abi::Arguments& arguments) {
    expand(arguments, typename MakeSequence<int(sizeof...(A))>::type());
  }
};

}  // namespace metal_sim

#if defined(METAL_SIM_TRACE)
extern "C" {

// What -fsanitize-coverage=trace-loads,trace-stores calls.
#define METAL_SIM_ACCESS(size)                                                   \
  METAL_SIM_UNTRACED void __sanitizer_cov_load##size(const void* address) {      \
    metal_sim::engine.access(address, size, false, __builtin_return_address(0)); \
  }                                                                              \
  METAL_SIM_UNTRACED void __sanitizer_cov_store##size(const void* address) {     \
    metal_sim::engine.access(address, size, true, __builtin_return_address(0));  \
  }
METAL_SIM_ACCESS(1)
METAL_SIM_ACCESS(2)
METAL_SIM_ACCESS(4)
METAL_SIM_ACCESS(8)
METAL_SIM_ACCESS(16)
#undef METAL_SIM_ACCESS

// What -fsanitize=alignment,array-bounds,integer-divide-by-zero calls; the place comes first in its data.
METAL_SIM_UNTRACED void __ubsan_handle_type_mismatch_v1(const metal_sim::abi::Site* site, unsigned long) {
  metal_sim::engine.fail(*site, "a pointer that is not aligned for its type");
}
METAL_SIM_UNTRACED void __ubsan_handle_out_of_bounds(const metal_sim::abi::Site* site, unsigned long) {
  metal_sim::engine.fail(*site, "an index outside its array");
}
METAL_SIM_UNTRACED void __ubsan_handle_divrem_overflow(const metal_sim::abi::Site* site, unsigned long, unsigned long) {
  metal_sim::engine.fail(*site, "an integer division by zero");
}

}  // extern "C"
#endif
