// The CUDA backend: NVIDIA GPUs of compute capability 8.0 and newer.
#pragma once

#include <memory>

#include "core/device.h"

namespace tq_hb {

/// The first GPU that the driver shows; throws an Error that says why there is none.
const std::shared_ptr<Device>& cuda_device();

}  // namespace tq_hb
