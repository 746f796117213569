#include "cpu/int16_parabolas.h"

#include <algorithm>
#include <cmath>

#include "cpu/int16_levels.h"

namespace tq_hb {
namespace {

constexpr std::int32_t kSteps = Int16Parabolas::kSteps;

/// One segment: its values, and how much the error of each counts.
struct Segment {
  double values[kSteps];
  double weights[kSteps];
};

struct Parabola {
  std::int32_t start, slope, bend;

  std::int32_t rise(std::int32_t step) const { return (slope - bend * step / kSteps) * step / kSteps; }
  bool is_rising() const { return slope >= bend; }
};

struct Fit {
  Parabola parabola{};
  double error = HUGE_VAL;
};

double weighted_mean(const Segment& segment, const double* values) {
  double sum = 0.0, total = 0.0;
  for (std::int32_t r = 0; r < kSteps; ++r) {
    sum += segment.weights[r] * values[r];
    total += segment.weights[r];
  }
  return sum / total;
}

/// The slope that suits a bend best, as a real number: the regression line's of what the bend leaves.
double best_slope(const Segment& segment, std::int32_t bend) {
  double left[kSteps], steps[kSteps], products[kSteps], squares[kSteps];
  for (std::int32_t r = 0; r < kSteps; ++r) {
    left[r] = segment.values[r] + static_cast<double>(bend * r * r) / (kSteps * kSteps);
    steps[r] = static_cast<double>(r) / kSteps;
    products[r] = left[r] * steps[r];
    squares[r] = steps[r] * steps[r];
  }
  const double mean = weighted_mean(segment, steps);
  return (weighted_mean(segment, products) - weighted_mean(segment, left) * mean) /
         (weighted_mean(segment, squares) - mean * mean);
}

/// The best start for a slope and a bend.
Fit fit_start(const Segment& segment, std::int32_t slope, std::int32_t bend) {
  Parabola parabola{0, slope, bend};
  double left[kSteps], errors[kSteps];
  for (std::int32_t r = 0; r < kSteps; ++r) left[r] = segment.values[r] - parabola.rise(r);
  parabola.start = static_cast<std::int32_t>(std::lround(weighted_mean(segment, left)));
  for (std::int32_t r = 0; r < kSteps; ++r) errors[r] = std::pow(left[r] - parabola.start, 2);
  return {parabola, weighted_mean(segment, errors)};
}

Parabola fit(const Segment& segment) {
  Fit best;
  for (std::int32_t bend = 0; bend < 256; ++bend) {
    // What is cut off is made up for by a slope that is somewhat larger.
    const auto nearest = static_cast<std::int32_t>(std::lround(best_slope(segment, bend)));
    for (std::int32_t slope = nearest - 2; slope <= nearest + 4; ++slope) {
      const Fit candidate = fit_start(segment, slope, bend);
      if (candidate.parabola.is_rising() && candidate.error < best.error) best = candidate;
    }
  }
  return best.parabola;
}

}  // namespace

Int16Parabolas fit_parabolas(const float* levels, double unit) {
  Int16Parabolas made{};
  for (std::size_t s = Int16Parabolas::kTabulated; s < Int16Parabolas::kSegments; ++s) {
    Segment segment;
    for (std::size_t r = 0; r < Int16Parabolas::kSteps; ++r) {
      const auto level = static_cast<double>(levels[s * Int16Parabolas::kSteps + r]);
      segment.values[r] = level / unit - 0.5;
      segment.weights[r] = frequency_of(level);
    }
    const Parabola parabola = fit(segment);
    made.start[s] = static_cast<std::int16_t>(parabola.start);
    made.slope[s] = static_cast<std::int16_t>(parabola.slope);
    made.bend[s] = static_cast<std::int16_t>(parabola.bend);
  }
  return made;
}

}  // namespace tq_hb
