// Sizes that the format fixes, and how its arrays are aligned. The functions are static for the reason in
// codec_constants.h.
#pragma once

#include <cstddef>

#include "core/head_dims.h"

namespace tq_hb {

constexpr std::size_t kMaxHeadDim = 512;
/// Coordinates that share a norm; a shorter row has one norm as well.
constexpr std::size_t kNormBlock = 256;

static constexpr std::size_t norms_per_row(std::size_t head_dim) {
  return head_dim > kNormBlock ? head_dim / kNormBlock : 1;
}

/// Coordinates whose codes share the bytes of a plane: see packing.h.
constexpr std::size_t kPlaneBlock = 128;

/// Bits of a code in the nibble plane; the others are in the high plane.
constexpr unsigned kNibbleBits = 4;

/// Kernels of a GPU load rows of floats in vectors of up to this many bytes.
constexpr std::size_t kRowAlignment = 16;
/// Codes may start wherever a row of a larger buffer may: the shortest have 40 bytes.
constexpr std::size_t kCodesAlignment = 8;

}  // namespace tq_hb
