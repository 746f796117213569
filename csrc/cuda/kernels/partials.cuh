// Where the splits of an attention op leave their results, and what they say of their scores.
//
// The outputs of all splits come first, query by query, head by head, split by split; then their states, in the same
// order, so that both are read side by side.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/kernels/kernels.h"

namespace tq_hb {
namespace {

/// What a split knows of its scores: the group kernel's largest, in powers of two, and the sum of 2^(score - largest).
struct GroupState {
  float max, sum;

  using Max = float;
  static constexpr double kUnit = 0.6931471805599453;  // of `max`, in natural logarithms
  static constexpr Max kLowest = -3.402823466e38f;
  __device__ Max largest() const { return max; }
  __device__ float weight(Max largest) const { return sum * exp2f(max - largest); }
};

/// The same of the per-head kernel, whose scores are of any size: the logarithm of the sum of exp(score).
struct HeadState {
  double lse;

  using Max = double;
  static constexpr double kUnit = 1.0;
  static constexpr Max kLowest = -HUGE_VAL;
  __device__ Max largest() const { return lse; }
  __device__ float weight(Max largest) const {
    return lse == -HUGE_VAL ? 0.0f : expf(static_cast<float>(lse - largest));
  }
};
static_assert(sizeof(GroupState) == 8 && sizeof(HeadState) == 8);

template <unsigned kHeadDim>
__device__ float* outputs_of_row(const AttendCall& call, std::uint64_t row) {
  return call.partials + row * call.args.nwg * kHeadDim;
}

template <class State, unsigned kHeadDim>
__device__ State* states_of_row(const AttendCall& call, std::uint64_t row) {
  const std::uint64_t rows = std::uint64_t{call.args.num_queries} * call.args.num_heads;
  return reinterpret_cast<State*>(outputs_of_row<kHeadDim>(call, rows)) + row * call.args.nwg;
}

}  // namespace
}  // namespace tq_hb
