// The quantiser's tables in the GPU's memory: a copy in every file that includes this, of a few kilobytes.
#pragma once

#include <cstdint>

#include "core/abi.h"

namespace tq_hb {
namespace {

__device__ constexpr float kLloydMax5Levels[] = {
#include "core/codebooks/lloyd_max_5_levels.inc"
};
__device__ constexpr float kLloydMax5Boundaries[] = {
#include "core/codebooks/lloyd_max_5_boundaries.inc"
};
__device__ constexpr float kLloydMax6Levels[] = {
#include "core/codebooks/lloyd_max_6_levels.inc"
};
__device__ constexpr float kLloydMax6Boundaries[] = {
#include "core/codebooks/lloyd_max_6_boundaries.inc"
};
__device__ constexpr float kLloydMax8Levels[] = {
#include "core/codebooks/lloyd_max_8_levels.inc"
};
__device__ constexpr float kLloydMax8Boundaries[] = {
#include "core/codebooks/lloyd_max_8_boundaries.inc"
};
__device__ constexpr float kMlxNative5Levels[] = {
#include "core/codebooks/mlx_native_5_levels.inc"
};
__device__ constexpr float kMlxNative5Boundaries[] = {
#include "core/codebooks/mlx_native_5_boundaries.inc"
};
__device__ constexpr float kMlxNative6Levels[] = {
#include "core/codebooks/mlx_native_6_levels.inc"
};
__device__ constexpr float kMlxNative6Boundaries[] = {
#include "core/codebooks/mlx_native_6_boundaries.inc"
};
__device__ constexpr float kMlxNative8Levels[] = {
#include "core/codebooks/mlx_native_8_levels.inc"
};
__device__ constexpr float kMlxNative8Boundaries[] = {
#include "core/codebooks/mlx_native_8_boundaries.inc"
};
/// One bit per coordinate, least significant first; 1 means -1.
__device__ const std::uint8_t kSignBits[] = {
#include "core/codebooks/signs.inc"
};

__device__ inline const float* levels_of(TqU32 codebook, unsigned cbits) {
  const bool is_native = codebook == TQ_CODEBOOK_MLX_NATIVE;
  switch (cbits) {
    case 5:
      return is_native ? kMlxNative5Levels : kLloydMax5Levels;
    case 6:
      return is_native ? kMlxNative6Levels : kLloydMax6Levels;
    default:
      return is_native ? kMlxNative8Levels : kLloydMax8Levels;
  }
}

__device__ inline const float* boundaries_of(TqU32 codebook, unsigned cbits) {
  const bool is_native = codebook == TQ_CODEBOOK_MLX_NATIVE;
  switch (cbits) {
    case 5:
      return is_native ? kMlxNative5Boundaries : kLloydMax5Boundaries;
    case 6:
      return is_native ? kMlxNative6Boundaries : kLloydMax6Boundaries;
    default:
      return is_native ? kMlxNative8Boundaries : kLloydMax8Boundaries;
  }
}

}  // namespace
}  // namespace tq_hb
