#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include <gtest/gtest.h>

#include "core/codebook.h"
#include "cpu/int16_levels.h"

namespace tq_hb {
namespace {

TEST(Int16Levels, SegmentsStayNearTheLevels) {
  for (const CodebookName name : {CodebookName::kLloydMax, CodebookName::kMlxNative}) {
    const Codebook& codebook = find_codebook("test", name, 8);
    const Int16Levels& levels = int16_levels(codebook, Int16Form::kSegments);
    const Int16Segments& fit = levels.segments;
    double error = 0.0, total = 0.0;
    int before = -Int16Levels::kLimit - 1;
    for (std::size_t code = 0; code < 128; ++code) {
      const std::size_t s = code / Int16Segments::kSteps;
      const std::size_t i = code % Int16Segments::kSteps + Int16Segments::kSteps * Int16Segments::family_of(s);
      const int rise = fit.shares[0][s] * fit.shapes[0][i] + fit.shares[1][s] * fit.shapes[1][i];
      ASSERT_LT(std::abs(rise), 0x8000) << code;
      EXPECT_LT(std::abs(fit.shapes[0][i]), std::numeric_limits<std::int8_t>::max()) << code << " was cut off";
      const int value = levels.values[code];
      EXPECT_EQ(value, fit.starts[s] + static_cast<int>(std::floor(rise / double{Int16Segments::kFraction} + 0.5)));
      EXPECT_GT(value, before) << code;
      before = value;
      const double level = static_cast<double>(codebook.levels[code]), near = (value + 0.5) * levels.unit;
      EXPECT_NEAR(near, level, 5e-4 * std::max(1.0, -level)) << code;
      // Of a unit normal distribution's values, which is what the levels are for.
      error += std::exp(-level * level / 3.0) * std::pow(near - level, 2);
      total += std::exp(-level * level / 3.0);
    }
    EXPECT_LT(std::sqrt(error / total), 0.82e-4);
  }
}

/// Else the product of a vector with one that it is aligned with would be off by as much.
TEST(Int16Levels, VectorsKeepTheirLength) {
  for (const CodebookName name : {CodebookName::kLloydMax, CodebookName::kMlxNative}) {
    for (const unsigned bits : {5u, 6u, 8u}) {
      for (const Int16Form form : {Int16Form::kTable, Int16Form::kSegments}) {
        const Codebook& codebook = find_codebook("test", name, bits);
        const Int16Levels& levels = int16_levels(codebook, form);
        double wanted = 0.0, given = 0.0;
        for (unsigned code = 0; code < 256; ++code) {
          ASSERT_LE(std::abs(levels.values[code] + 0.5), Int16Levels::kLimit + 0.5) << code;
          const double level = static_cast<double>(codebook.levels[code % codebook.num_levels()]);
          wanted += std::exp(-level * level / 3.0) * level * level;
          given += std::exp(-level * level / 3.0) * level * (levels.values[code] + 0.5) * levels.unit;
        }
        EXPECT_NEAR(given / wanted, 1.0, 1e-9) << bits;
      }
    }
  }
}

}  // namespace
}  // namespace tq_hb
