#include "cpu/int16_levels.h"

#include <cmath>

#include "core/spec_cache.h"
#include "cpu/int16_parabolas.h"

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

Int16Levels make_levels(const Codebook& codebook) {
  const double largest = static_cast<double>(codebook.levels[codebook.num_levels() - 1]);
  // Some scales happen to suit a table of few levels much better than others.
  Int16Levels made{};
  double least = HUGE_VAL;
  for (std::int32_t limit = Int16Levels::kLimit; limit > Int16Levels::kLimit * 4 / 5; limit -= 2) {
    const double unit = largest / limit;
    const double error = rounding_error(codebook, unit);
    if (error >= least) continue;
    least = error;
    made.unit = unit;
  }
  for (unsigned code = 0; code < 256; ++code) {
    const double level = static_cast<double>(codebook.levels[code % codebook.num_levels()]);
    made.values[code] = static_cast<std::int16_t>(fixed_point(level, made.unit));
  }
  if (codebook.num_levels() == 256) made.parabolas = fit_parabolas(codebook.levels, made.unit);
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
