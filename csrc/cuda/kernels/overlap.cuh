// Launches that may start while the kernel before them in the stream is still running (compute capability 9.0).
#pragma once

#include <utility>

#include <cuda_runtime.h>

#include "cuda/kernels/kernels.h"

namespace tq_hb {
namespace {

/// Lets the next kernel of the stream start, up to its own wait_for_previous().
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// Waits until the kernels before this one are done. Every thread of an overlapping launch has to call it, so that
/// whoever waits for this kernel has waited for those too.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <class... Parameters, class... Arguments>
void launch_overlapping(void (*kernel)(Parameters...), const Launch& sizes, cudaStream_t stream,
                        Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = sizes.grid;
  config.blockDim = sizes.block;
  config.dynamicSmemBytes = sizes.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  // The caller asks for the last error, which this sets.
  static_cast<void>(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

}  // namespace
}  // namespace tq_hb
