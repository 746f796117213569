// Levels that a short formula gives nearly, for instruction sets whose tables are small.
#pragma once

#include "cpu/attend_kernel.h"

namespace tq_hb {

/// Fits parabolas to the values `levels[i] / unit - 1/2` of the negative half of 256 levels, which are ascending. What
/// occurs often in a normal distribution counts most.
Int16Parabolas fit_parabolas(const float* levels, double unit);

}  // namespace tq_hb
