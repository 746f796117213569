// Codebooks in fixed point, for the path of default precision.
#pragma once

#include "core/codebook.h"
#include "cpu/attend_kernel.h"

namespace tq_hb {

/// How often a level of a normal distribution's codebook occurs, but for a factor.
double frequency_of(double level);

/// The codebook's levels; made at the first call. The form is of codebooks of 8 bits: others are tables.
const Int16Levels& int16_levels(const Codebook& codebook, Int16Form form);

}  // namespace tq_hb
