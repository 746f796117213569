// The Metal backend's device.
#pragma once

#include <memory>

#include "core/device.h"

namespace tq_hb {

/// The process's Metal device, opened by the first call; throws an Error whose message is why there is none.
const std::shared_ptr<Device>& metal_device();

/// The system's GPU, opened once more: buffers of one such device are strangers to another.
std::shared_ptr<Device> make_metal_device();

}  // namespace tq_hb
