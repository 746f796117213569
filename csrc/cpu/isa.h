// Which instruction sets this build has kernels for and this processor runs.
#pragma once

#include "cpu/attend_kernel.h"

namespace tq_hb {

/// The fastest kernels this processor can run; chosen once.
const IsaKernel& attend_kernel() noexcept;

}  // namespace tq_hb
