#include "cpu/int16_levels.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "core/kept_values.h"
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

/// Of many units, that which suits segments best.
SegmentsFit best_segments(const Codebook& codebook, const std::vector<Candidate>& candidates) {
  constexpr std::size_t kTried = 256;
  SegmentsFit best{};
  best.error = HUGE_VAL;
  for (std::size_t i = 0; i < kTried; ++i) {
    const SegmentsFit fit = fit_segments(codebook.levels, candidates[i].unit);
    if (fit.error < best.error) best = fit;
  }
  return best;
}

/// What makes values as long as levels: the sum of level * (level - (value + 1/2) * unit) is 0.
double fitting_unit(const Codebook& codebook, const std::int16_t* values) {
  double wanted = 0.0, given = 0.0;
  for (unsigned code = 0; code < codebook.num_levels() / 2; ++code) {
    const double level = static_cast<double>(codebook.levels[code]);
    wanted += frequency_of(level) * level * level;
    given += frequency_of(level) * level * (values[code] + 0.5);
  }
  return wanted / given;
}

Int16Levels make_levels(const Codebook& codebook, Int16Form form) {
  const std::vector<Candidate> candidates = candidates_of(codebook);
  const unsigned count = codebook.num_levels();
  Int16Levels made{};
  if (form == Int16Form::kSegments) made.segments = best_segments(codebook, candidates).segments;
  for (unsigned code = 0; code < count / 2; ++code) {
    const double rounded = fixed_point(static_cast<double>(codebook.levels[code]), candidates.front().unit);
    const std::int32_t value =
        form == Int16Form::kSegments ? segment_value(made.segments, code) : static_cast<std::int32_t>(rounded);
    made.values[code] = static_cast<std::int16_t>(value);
    made.values[count - 1 - code] = static_cast<std::int16_t>(~value);
  }
  for (unsigned code = count; code < 256; ++code) made.values[code] = made.values[code - count];
  made.unit = fitting_unit(codebook, made.values);
  return made;
}

}  // namespace

double frequency_of(double level) {
  return std::exp(-level * level / 3.0);
}

const Int16Levels& int16_levels(const Codebook& codebook, Int16Form form) {
  static KeptValues<std::pair<const Codebook*, Int16Form>, Int16Levels> kept;
  if (codebook.cbits < 8) form = Int16Form::kTable;
  return kept.get({&codebook, form}, [&] { return make_levels(codebook, form); });
}

}  // namespace tq_hb
