// What ranges of keys have given a row, added up in the vectors of an instruction set.
#pragma once

#include "cpu/simd.h"

namespace tq_hb {
namespace {

/// Adds weights[i] * partials[i * stride ...] to the head_dim values of `out`.
void add_partials(const float* partials, std::size_t stride, const float* weights, std::size_t count,
                  std::size_t head_dim, float* out) noexcept {
  constexpr std::size_t kVectors = 4;  // whose sums a processor can keep going
  static_assert(64 % (kVectors * kLanes) == 0, "every head dimension is a multiple of 64");
  for (std::size_t j = 0; j < head_dim; j += kVectors * kLanes) {
    Vec sums[kVectors];
#pragma GCC unroll 4
    for (std::size_t v = 0; v < kVectors; ++v) sums[v] = load(out + j + v * kLanes);
    for (std::size_t i = 0; i < count; ++i) {
      const float* partial = partials + i * stride + j;
#pragma GCC unroll 4
      for (std::size_t v = 0; v < kVectors; ++v) sums[v] += load(partial + v * kLanes) * weights[i];
    }
#pragma GCC unroll 4
    for (std::size_t v = 0; v < kVectors; ++v) store(out + j + v * kLanes, sums[v]);
  }
}

}  // namespace
}  // namespace tq_hb
