#include "cpu/int16_levels.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/spec_cache.h"
#include "cpu/int16_segments.h"

namespace tq_hb {
namespace {

double fixed_point(double level, double unit) {
  return std::nearbyint(level / unit - 0.5);
}

/// Mean squared rounding error in levels, weighted by how often they occur.
double rounding_error(const Codebook& codebook, double unit) {
  double error = 0.0, total = 0.0;
  for (unsigned code = 0; code < codebook.num_levels() / 2; ++code) {
    const double level = static_cast<double>(codebook.levels[code]);
    const double weight = frequency_of(level);
    error += weight * std::pow((fixed_point(level, unit) + 0.5) * unit - level, 2);
    total += weight;
  }
  return error / total;
}

/// A unit that could be a codebook's, and what would be wrong with it.
struct Candidate {
  double unit, error;
};

/// The least error first. Some units happen to suit the levels much better than others.
std::vector<Candidate> candidates_of(const Codebook& codebook) {
  const double largest = static_cast<double>(codebook.levels[codebook.num_levels() - 1]);
  std::vector<Candidate> candidates;
  for (std::int32_t limit = Int16Levels::kLimit; limit > Int16Levels::kLimit * 4 / 5; limit -= 2) {
    candidates.push_back({largest / limit, rounding_error(codebook, largest / limit)});
  }
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return a.error != b.error ? a.error < b.error : a.unit < b.unit;
  });
  return candidates;
}

Int16Levels make_levels(const Codebook& codebook) {
  const std::vector<Candidate> candidates = candidates_of(codebook);
  Int16Levels made{};
  made.unit = candidates.front().unit;
  if (codebook.num_levels() == 256) {
    // Many units round nearly as well: of those, the one that suits segments best.
    constexpr std::size_t kTried = 256;
    double least = HUGE_VAL;
    for (std::size_t i = 0; i < kTried; ++i) {
      const SegmentsFit fit = fit_segments(codebook.levels, candidates[i].unit);
      if (fit.error >= least) continue;
      least = fit.error;
      made.unit = candidates[i].unit;
      made.segments = fit.segments;
    }
  }
  for (unsigned code = 0; code < 256; ++code) {
    const double level = static_cast<double>(codebook.levels[code % codebook.num_levels()]);
    made.values[code] = static_cast<std::int16_t>(fixed_point(level, made.unit));
  }
  return made;
}

}  // namespace

double frequency_of(double level) {
  return std::exp(-level * level / 3.0);
}

const Int16Levels& int16_levels(const Codebook& codebook) {
  static SpecCache<const Codebook*, Int16Levels> cache;
  return cache.get(&codebook, [&] { return make_levels(codebook); });
}

}  // namespace tq_hb
