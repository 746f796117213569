// A query scaled by a power of two, so that no product of it can overflow.
#pragma once

#include "cpu/simd.h"

namespace tq_hb {
namespace {

/// Copies a row, its largest magnitude brought between 1 and 2, or as near as a factor does that is a normal number
/// with a normal inverse. Returns what undoes that, or NaN for a row that is not finite: of it, zeros are copied, whose
/// products are made with those of the others and thrown away.
double scale_query(const float* q, std::size_t head_dim, float* scaled) noexcept {
  // Without its sign bit a float32 orders like its bits do, NaN last.
  IntVec magnitudes{};
  for (std::size_t j = 0; j < head_dim; j += kLanes) {
    const IntVec bits = load_as<IntVec>(q + j) & 0x7fffffff;
    magnitudes = bits > magnitudes ? bits : magnitudes;
  }
  constexpr int kMantissaBits = 23, kBias = 127, kMostExponent = 126;
  const std::int32_t largest = max_of_lanes(magnitudes);
  if (largest >> kMantissaBits == 2 * kBias + 1) {
    for (std::size_t j = 0; j < head_dim; j += kLanes) store(scaled + j, Vec{});
    return __builtin_nan("");
  }
  int exponent = largest == 0 ? 0 : (largest >> kMantissaBits) - kBias;
  if (exponent < -kMostExponent) exponent = -kMostExponent;
  if (exponent > kMostExponent) exponent = kMostExponent;
  const std::int32_t factor_bits = (kBias - exponent) << kMantissaBits;
  const float factor = load_as<float>(&factor_bits);
  for (std::size_t j = 0; j < head_dim; j += kLanes) store(scaled + j, load(q + j) * factor);
  return __builtin_ldexp(1.0, exponent);
}

}  // namespace
}  // namespace tq_hb
