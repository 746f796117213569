// The codebooks and sign bits, from the same files as the host's, and the widths a pipeline is made for.
#pragma once

#include "core/abi.h"

constant int tq_k_cbits [[function_constant(TQ_CONSTANT_K_CBITS)]];
constant int tq_v_cbits [[function_constant(TQ_CONSTANT_V_CBITS)]];

inline uint k_cbits() {
  return is_function_constant_defined(tq_k_cbits) ? uint(tq_k_cbits) : 8u;
}
inline uint v_cbits() {
  return is_function_constant_defined(tq_v_cbits) ? uint(tq_v_cbits) : k_cbits();
}

constant float kLloydMax5Levels[32] = {
#include "core/codebooks/lloyd_max_5_levels.inc"
};
constant float kLloydMax6Levels[64] = {
#include "core/codebooks/lloyd_max_6_levels.inc"
};
constant float kLloydMax8Levels[256] = {
#include "core/codebooks/lloyd_max_8_levels.inc"
};
constant float kMlxNative5Levels[32] = {
#include "core/codebooks/mlx_native_5_levels.inc"
};
constant float kMlxNative6Levels[64] = {
#include "core/codebooks/mlx_native_6_levels.inc"
};
constant float kMlxNative8Levels[256] = {
#include "core/codebooks/mlx_native_8_levels.inc"
};

constant float kLloydMax5Boundaries[31] = {
#include "core/codebooks/lloyd_max_5_boundaries.inc"
};
constant float kLloydMax6Boundaries[63] = {
#include "core/codebooks/lloyd_max_6_boundaries.inc"
};
constant float kLloydMax8Boundaries[255] = {
#include "core/codebooks/lloyd_max_8_boundaries.inc"
};
constant float kMlxNative5Boundaries[31] = {
#include "core/codebooks/mlx_native_5_boundaries.inc"
};
constant float kMlxNative6Boundaries[63] = {
#include "core/codebooks/mlx_native_6_boundaries.inc"
};
constant float kMlxNative8Boundaries[255] = {
#include "core/codebooks/mlx_native_8_boundaries.inc"
};

constant uchar kSignBits[64] = {
#include "core/codebooks/signs.inc"
};

inline constant float* codebook_levels(uint codebook, uint cbits) {
  if (codebook == TQ_CODEBOOK_MLX_NATIVE) {
    return cbits == 5 ? kMlxNative5Levels : cbits == 6 ? kMlxNative6Levels : kMlxNative8Levels;
  }
  return cbits == 5 ? kLloydMax5Levels : cbits == 6 ? kLloydMax6Levels : kLloydMax8Levels;
}

inline constant float* codebook_boundaries(uint codebook, uint cbits) {
  if (codebook == TQ_CODEBOOK_MLX_NATIVE) {
    return cbits == 5 ? kMlxNative5Boundaries : cbits == 6 ? kMlxNative6Boundaries : kMlxNative8Boundaries;
  }
  return cbits == 5 ? kLloydMax5Boundaries : cbits == 6 ? kLloydMax6Boundaries : kLloydMax8Boundaries;
}
