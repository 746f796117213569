// Numbers of the codec that every implementation shares. Nothing that is compiled again for each includer: files with
// their own instruction-set flags include this.
#pragma once

#include <cstddef>

namespace tq_hb {

/// The squares of a row are summed in so many lanes of consecutive coordinates: serially in a lane, then by an XOR
/// tree.
constexpr std::size_t kEnergyLanes = 32;
/// Rotated values below this count as zero, so that hardware which flushes denormals stores the same bytes.
constexpr float kFlushBelow = 0x1p-60f;
/// A row (or block) of a norm that isn't larger takes the codes of zeros.
constexpr float kSmallestNorm = 1e-10f;
/// 1 / sqrt(kNormBlock): turns a block's L2 norm into its RMS.
constexpr float kBlockRms = 1.0f / 16.0f;

constexpr float inverse_sqrt_head_dim(std::size_t head_dim) noexcept {
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

/// +1 or -1 for each of the 512 coordinates; a smaller head takes the first head_dim of them.
const float* sign_table() noexcept;

}  // namespace tq_hb
