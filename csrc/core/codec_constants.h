// Numbers of the codec that every implementation shares, host and device code.
//
// The function defined here is static: files with their own instruction-set flags include this, and one that they share
// with others could be linked from the wrong file.
#pragma once

#include "core/abi.h"

#if defined(__METAL_VERSION__)
#define TQ_SHARED_CONSTANT constant
#else
#include <stddef.h>
#define TQ_SHARED_CONSTANT constexpr
#endif

namespace tq_hb {

/// The squares of a row are summed in so many lanes of consecutive coordinates: serially in a lane, then by an XOR
/// tree.
TQ_SHARED_CONSTANT size_t kEnergyLanes = 32;
/// Rotated values below this count as zero, so that hardware which flushes denormals stores the same bytes.
TQ_SHARED_CONSTANT float kFlushBelow = 8.67361738e-19f;  // 2^-60
/// A row (or block) of a norm that isn't larger takes the codes of zeros.
TQ_SHARED_CONSTANT float kSmallestNorm = 1e-10f;
/// 1 / sqrt(kNormBlock): turns a block's L2 norm into its RMS.
TQ_SHARED_CONSTANT float kBlockRms = 0.0625f;

static constexpr float inverse_sqrt_head_dim(size_t head_dim) {
  switch (head_dim) {
    case 64:
      return 0.125f;
    case 128:
      return 0.0883883461f;
    case 256:
      return 0.0625f;
    default:
      return 0.0441941731f;
  }
}

#if !defined(__METAL_VERSION__)
/// +1 or -1 for each of the 512 coordinates; a smaller head takes the first head_dim of them.
const float* sign_table() noexcept;
#endif

}  // namespace tq_hb
