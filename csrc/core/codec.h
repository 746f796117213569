// The codec on one row, as the formats define it: every backend must give the same bytes.
//
// All arithmetic is float32 in a fixed order and codec.cpp is compiled without contraction, so a
// faster implementation can be compared with this one bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/codebook.h"
#include "core/layout.h"

namespace tq_hb {

/// R: y = H(signs * x) / sqrt(head_dim), in place.
void rotate_row(float* row, std::size_t head_dim) noexcept;

/// R^-1: x = signs * H(y) / sqrt(head_dim), in place.
void unrotate_row(float* row, std::size_t head_dim) noexcept;

/// H(x) / sqrt(head_dim), in place: the rotation without its signs, and its own inverse.
void transform_row(float* row, std::size_t head_dim) noexcept;

/// Rotates and quantises `src` into head_dim codes, one byte each, and norms_per_row norms.
///
/// Returns false and writes nothing when `src` is not finite or a norm overflows.
bool encode_row(const float* src, std::size_t head_dim, float scale_factor_d512, const Codebook& codebook,
                std::uint8_t* codes, float* norms) noexcept;

/// Whether encode_row would accept `src`.
bool is_encodable_row(const float* src, std::size_t head_dim) noexcept;

bool is_finite_row(const float* row, std::size_t head_dim) noexcept;

/// What a level is multiplied by when a row with this norm is decoded.
float decode_factor(float norm, std::size_t head_dim, float scale_factor_d512) noexcept;

/// Rebuilds a row from codes of one byte each, still rotated. Index bits above the codebook's width are ignored.
void decode_row(const std::uint8_t* codes, const float* norms, std::size_t head_dim, float scale_factor_d512,
                const Codebook& codebook, float* out) noexcept;

}  // namespace tq_hb
