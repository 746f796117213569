// The cpu backend's device.
#pragma once

#include <memory>

#include "core/device.h"

namespace tq_hb {

/// The one cpu device of the process.
const std::shared_ptr<Device>& cpu_device();

/// The instruction set its kernels were chosen for.
const char* cpu_isa() noexcept;

unsigned cpu_num_threads() noexcept;
void set_cpu_num_threads(unsigned count);

}  // namespace tq_hb
