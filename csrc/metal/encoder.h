// The Metal backend's command encoder.
#pragma once

#include <memory>

#include "core/encoder.h"

namespace tq_hb {

class MetalContext;

std::unique_ptr<CommandEncoder> make_metal_encoder(const Device* device, std::shared_ptr<MetalContext> context,
                                                   bool auto_barrier);

}  // namespace tq_hb
