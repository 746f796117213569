// Butterflies of the Walsh-Hadamard transform between vectors, in its natural order: strides 1, 2, 4, ...
#pragma once

#include "cpu/simd.h"

namespace tq_hb {
namespace {

/// Vectors that are transformed among each other in registers, with as many left for what that takes.
constexpr std::size_t kRadix = kRegisters / 2;

/// Butterflies of strides 1, 2, ... kCount / 2.
template <std::size_t kCount>
inline void butterflies(Vec (&v)[kCount]) noexcept {
#pragma GCC unroll 4
  for (std::size_t stride = 1; stride < kCount; stride *= 2) {
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kCount; ++i) {
      if (i & stride) continue;
      const Vec sum = v[i] + v[i + stride];
      v[i + stride] = v[i] - v[i + stride];
      v[i] = sum;
    }
  }
}

/// Transforms kCount vectors from stride kStride on. What comes out is stored as finish(vector, place).
template <std::size_t kCount, std::size_t kStride = 1, class Finish>
inline void transform_vectors(Vec* y, const Finish& finish) noexcept {
  constexpr std::size_t kRest = kCount / kStride;
  constexpr std::size_t kAtOnce = kRest < kRadix ? kRest : kRadix;
  constexpr bool kLast = kAtOnce == kRest;
  for (std::size_t start = 0; start < kCount; start += kAtOnce * kStride) {
    for (std::size_t first = start; first < start + kStride; ++first) {
      Vec block[kAtOnce];
#pragma GCC unroll 16
      for (std::size_t i = 0; i < kAtOnce; ++i) block[i] = y[first + i * kStride];
      butterflies(block);
#pragma GCC unroll 16
      for (std::size_t i = 0; i < kAtOnce; ++i) {
        const std::size_t place = first + i * kStride;
        y[place] = kLast ? finish(block[i], place) : block[i];
      }
    }
  }
  if constexpr (!kLast) transform_vectors<kCount, kStride * kAtOnce>(y, finish);
}

}  // namespace
}  // namespace tq_hb
