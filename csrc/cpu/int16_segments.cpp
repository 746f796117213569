#include "cpu/int16_segments.h"

#include <algorithm>
#include <cmath>

#include "cpu/int16_levels.h"

namespace tq_hb {
namespace {

constexpr std::size_t kSteps = Int16Segments::kSteps;
constexpr std::int32_t kLargestShare = 255;
/// What a level that hardly occurs counts, beside 1 for those in the middle.
constexpr double kLeastWeight = 2e-3;

/// Two shapes that a segment is made of: a line, and what also bends.
struct Shapes {
  std::int8_t line[kSteps];
  std::int8_t bent[kSteps];
};

/// Found by a search among whole numbers for what comes nearest to the levels of both codebooks of 8 bits. Where levels
/// are close to each other, a step of the line's share is 1/2 of a unit per step; the bent shape rises so steeply that
/// shares of 8 bits serve where they are not.
constexpr Shapes kShapes[Int16Segments::kFamilies] = {
    {{0, 2, 4, 6, 8, 10, 12, 14}, {0, 16, 31, 45, 58, 70, 81, 91}},
    {{-49, -41, -23, -3, 18, 39, 60, 80}, {-80, -11, 29, 58, 80, 98, 113, 126}}};

/// What a segment should give, and how much an error counts.
struct Target {
  double values[kSteps];
  double weights[kSteps];

  double total(const double* numbers) const {
    double sum = 0.0;
    for (std::size_t r = 0; r < kSteps; ++r) sum += weights[r] * numbers[r];
    return sum;
  }
  double mean(const double* numbers) const {
    double weight = 0.0;
    for (double w : weights) weight += w;
    return total(numbers) / weight;
  }
};

struct Segment {
  std::int32_t start, line, bent;

  /// As the kernel rounds.
  std::int32_t at(const Shapes& shapes, std::size_t r) const {
    const std::int32_t rise = line * shapes.line[r] + bent * shapes.bent[r];
    return start + (rise + 2 - ((rise + 2) & 3)) / 4;
  }
};

/// The line's best share, as a real number: the slope of the regression line of what the bent shape leaves.
double best_line(const Target& target, const Shapes& shapes, std::int32_t bent) {
  double left[kSteps], line[kSteps], products[kSteps], squares[kSteps];
  for (std::size_t r = 0; r < kSteps; ++r) {
    left[r] = 4.0 * target.values[r] - bent * shapes.bent[r];
    line[r] = shapes.line[r];
    products[r] = left[r] * line[r];
    squares[r] = line[r] * line[r];
  }
  const double mean = target.mean(line);
  return (target.mean(products) - target.mean(left) * mean) / (target.mean(squares) - mean * mean);
}

struct SegmentFit {
  Segment segment{};
  double error = HUGE_VAL;
};

/// The best start for two shares.
SegmentFit fit_start(const Target& target, const Shapes& shapes, std::int32_t line, std::int32_t bent) {
  Segment segment{0, line, bent};
  double left[kSteps], errors[kSteps];
  for (std::size_t r = 0; r < kSteps; ++r) left[r] = target.values[r] - segment.at(shapes, r);
  segment.start = static_cast<std::int32_t>(std::lround(target.mean(left)));
  for (std::size_t r = 0; r < kSteps; ++r) errors[r] = std::pow(left[r] - segment.start, 2);
  const bool is_in_range = segment.at(shapes, 0) >= -Int16Levels::kLimit;
  return {segment, is_in_range ? target.total(errors) : HUGE_VAL};
}

SegmentFit fit(const Target& target, const Shapes& shapes) {
  SegmentFit best;
  for (std::int32_t bent = 0; bent <= kLargestShare; ++bent) {
    const double line = best_line(target, shapes, bent);
    if (!(line >= 0.0 && line <= kLargestShare)) continue;
    for (const double rounded : {std::floor(line), std::ceil(line)}) {
      const SegmentFit candidate = fit_start(target, shapes, static_cast<std::int32_t>(rounded), bent);
      if (candidate.error < best.error) best = candidate;
    }
  }
  return best;
}

}  // namespace

SegmentsFit fit_segments(const float* levels, double unit) {
  SegmentsFit made{};
  double total = 0.0;
  for (std::size_t s = 0; s < Int16Segments::kSegments; ++s) {
    Target target;
    for (std::size_t r = 0; r < kSteps; ++r) {
      const auto level = static_cast<double>(levels[s * kSteps + r]);
      target.values[r] = level / unit - 0.5;
      target.weights[r] = frequency_of(level) + kLeastWeight;
      total += target.weights[r];
    }
    const SegmentFit best = fit(target, kShapes[Int16Segments::family_of(s)]);
    made.segments.starts[s] = static_cast<std::int16_t>(best.segment.start);
    made.segments.shares[0][s] = static_cast<std::uint8_t>(best.segment.line);
    made.segments.shares[1][s] = static_cast<std::uint8_t>(best.segment.bent);
    made.error += best.error * unit * unit;
  }
  made.error /= total;
  for (std::size_t family = 0; family < Int16Segments::kFamilies; ++family) {
    std::copy_n(kShapes[family].line, kSteps, made.segments.shapes[0] + family * kSteps);
    std::copy_n(kShapes[family].bent, kSteps, made.segments.shapes[1] + family * kSteps);
  }
  return made;
}

}  // namespace tq_hb
