#include "cpu/int16_segments.h"

#include <algorithm>
#include <cmath>

#include "cpu/int16_levels.h"

namespace tq_hb {
namespace {

constexpr std::size_t kSteps = Int16Segments::kSteps;
constexpr std::int32_t kFraction = Int16Segments::kFraction;
constexpr std::int32_t kLargestShare = 255;
constexpr std::int32_t kLargestShape = 127;
/// What a level that hardly occurs counts, beside 1 for those in the middle.
constexpr double kLeastWeight = 3e-3;

/// Two shapes that a segment is made of.
struct Shapes {
  std::int8_t values[2][kSteps];
};

/// A line and what also bends, found by a search among whole numbers for what comes nearest to the levels of both
/// codebooks of 8 bits. Where levels are close, a step of the line's share is half of a unit per step; the other shape
/// rises so steeply that shares of 8 bits serve where they are not.
constexpr Shapes kInnerShapes{{{-14, -10, -6, -2, 2, 6, 10, 14}, {-60, -39, -19, -1, 16, 32, 47, 61}}};

// The kernel adds the two products in 16 bits.
static_assert(kLargestShare * (kInnerShapes.values[0][kSteps - 1] + kInnerShapes.values[1][kSteps - 1]) < 0x8000);
static_assert(kLargestShare * kLargestShape + kLargestShape < 0x8000, "the second outer shape's share is 1");

/// What a segment should give, and how much an error counts.
struct Target {
  Target(const float* levels, double unit) {
    for (std::size_t r = 0; r < kSteps; ++r) {
      const auto level = static_cast<double>(levels[r]);
      values[r] = level / unit - 0.5;
      weights[r] = frequency_of(level) + kLeastWeight;
      total_weight += weights[r];
    }
  }

  template <class Number>
  double mean(const Number* numbers) const {
    double sum = 0.0;
    for (std::size_t r = 0; r < kSteps; ++r) sum += weights[r] * static_cast<double>(numbers[r]);
    return sum / total_weight;
  }

  template <class A, class B>
  double covariance(const A* a, const B* b) const {
    double products[kSteps];
    for (std::size_t r = 0; r < kSteps; ++r) products[r] = static_cast<double>(a[r]) * static_cast<double>(b[r]);
    return mean(products) - mean(a) * mean(b);
  }

  double values[kSteps], weights[kSteps];
  double total_weight = 0.0;
};

/// Of fractions of a unit, as the kernel rounds.
std::int32_t nearest_whole(std::int32_t fractions) {
  return static_cast<std::int32_t>(std::floor(static_cast<double>(fractions) / kFraction + 0.5));
}

struct Segment {
  std::int32_t start, shares[2];

  std::int32_t at(const Shapes& shapes, std::size_t r) const {
    return start + nearest_whole(shares[0] * shapes.values[0][r] + shares[1] * shapes.values[1][r]);
  }
};

struct Fit {
  Segment segment{};
  double error = HUGE_VAL;
};

/// The best start for two shares.
Fit fit_start(const Target& target, const Shapes& shapes, std::int32_t line, std::int32_t bent) {
  Segment segment{0, {line, bent}};
  double left[kSteps], errors[kSteps];
  for (std::size_t r = 0; r < kSteps; ++r) left[r] = target.values[r] - segment.at(shapes, r);
  segment.start = static_cast<std::int32_t>(std::lround(target.mean(left)));
  for (std::size_t r = 0; r < kSteps; ++r) errors[r] = std::pow(left[r] - segment.start, 2);
  return {segment, target.mean(errors) * target.total_weight};
}

/// By linear regression, and then among the whole numbers around its result.
Fit fit_inner(const Target& target) {
  const std::int8_t* line = kInnerShapes.values[0];
  const std::int8_t* bent = kInnerShapes.values[1];
  const double of_line = target.covariance(line, line), of_bent = target.covariance(bent, bent);
  const double of_both = target.covariance(line, bent);
  const double line_rise = kFraction * target.covariance(line, target.values);
  const double bent_rise = kFraction * target.covariance(bent, target.values);
  const double best = (bent_rise * of_line - line_rise * of_both) / (of_line * of_bent - of_both * of_both);
  constexpr std::int32_t kAround = 8;
  const auto middle = static_cast<std::int32_t>(std::lround(best));
  Fit found;
  for (std::int32_t bent_share = std::max(0, middle - kAround); bent_share <= std::min(kLargestShare, middle + kAround);
       ++bent_share) {
    const double line_share = (line_rise - bent_share * of_both) / of_line;
    if (!(line_share >= 0.0 && line_share <= kLargestShare)) continue;
    for (const double rounded : {std::floor(line_share), std::ceil(line_share)}) {
      const Fit candidate = fit_start(target, kInnerShapes, static_cast<std::int32_t>(rounded), bent_share);
      if (candidate.error < found.error) found = candidate;
    }
  }
  return found;
}

/// Cut off where a shape has no room for it, which then counts as an error of the fit.
std::int8_t bounded_shape(double value) {
  return static_cast<std::int8_t>(std::clamp<double>(value, -kLargestShape, kLargestShape));
}

/// Shapes for one segment alone: with the largest share of the first, and one of the second, they give all its values.
Shapes outer_shapes(const Target& target) {
  const double middle = (target.values[0] + target.values[kSteps - 1]) / 2.0;
  Shapes shapes;
  for (std::size_t r = 0; r < kSteps; ++r) {
    const double rise = std::nearbyint(kFraction * (target.values[r] - middle));
    const double whole = std::nearbyint(rise / kLargestShare);
    shapes.values[0][r] = bounded_shape(whole);
    shapes.values[1][r] = bounded_shape(rise - whole * kLargestShare);
  }
  return shapes;
}

}  // namespace

SegmentsFit fit_segments(const float* levels, double unit) {
  SegmentsFit made{};
  double total_weight = 0.0;
  const Shapes families[Int16Segments::kFamilies] = {kInnerShapes, outer_shapes(Target(levels, unit))};
  for (std::size_t s = 0; s < Int16Segments::kSegments; ++s) {
    const Target target(levels + s * kSteps, unit);
    const std::size_t family = Int16Segments::family_of(s);
    const Fit fit = family == 0 ? fit_inner(target) : fit_start(target, families[family], kLargestShare, 1);
    made.segments.starts[s] = static_cast<std::int16_t>(fit.segment.start);
    for (std::size_t i = 0; i < 2; ++i) {
      made.segments.shares[i][s] = static_cast<std::uint8_t>(fit.segment.shares[i]);
      std::copy_n(families[family].values[i], kSteps, made.segments.shapes[i] + family * kSteps);
    }
    made.error += fit.error * unit * unit;
    total_weight += target.total_weight;
  }
  made.error /= total_weight;
  return made;
}

std::int32_t segment_value(const Int16Segments& segments, std::size_t code) {
  const std::size_t s = code / kSteps, i = code % kSteps + kSteps * Int16Segments::family_of(s);
  const auto rise_of = [&](std::size_t shape) { return segments.shares[shape][s] * segments.shapes[shape][i]; };
  return segments.starts[s] + nearest_whole(rise_of(0) + rise_of(1));
}

}  // namespace tq_hb
