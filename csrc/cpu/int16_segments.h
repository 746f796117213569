// Levels that a short formula gives nearly, for instruction sets whose tables are small.
#pragma once

#include "cpu/attend_kernel.h"

namespace tq_hb {

struct SegmentsFit {
  Int16Segments segments;
  double error;  ///< mean squared, in levels, weighted by about how often they occur
};

/// Fits segments to the values `levels[i] / unit - 1/2` of the negative half of 256 levels, which are ascending. What
/// occurs often in a normal distribution counts most.
SegmentsFit fit_segments(const float* levels, double unit);

/// Value `code` of the negative half, as a kernel computes it.
std::int32_t segment_value(const Int16Segments& segments, std::size_t code);

}  // namespace tq_hb
