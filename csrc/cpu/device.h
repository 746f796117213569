// The cpu backend's device.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/device.h"

namespace tq_hb {

/// The one cpu device of the process.
const std::shared_ptr<Device>& cpu_device();

/// The instruction set that ops run with.
const char* cpu_isa();
/// Those this processor has and this build has kernels for, slowest first.
std::vector<std::string> cpu_isas();
/// Chooses one of them for later ops; `op` and `field` are named in the error about any other.
void set_cpu_isa(const std::string& op, const std::string& field, const std::string& isa);

unsigned cpu_num_threads() noexcept;
void set_cpu_num_threads(unsigned count);

}  // namespace tq_hb
