// The encoder of the CUDA backend.
#pragma once

#include <memory>

#include "core/encoder.h"
#include "cuda/context.h"

namespace tq_hb {

std::unique_ptr<CommandEncoder> make_cuda_encoder(const Device* device, std::shared_ptr<CudaContext> context,
                                                  cudaStream_t stream, bool auto_barrier);

}  // namespace tq_hb
