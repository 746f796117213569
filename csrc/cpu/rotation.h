// The codec's rotation of one row in vectors of AVX2, AVX-512 or NEON: rotate_row and unrotate_row of core/codec.h, to
// the same bits.
#pragma once

#include "core/codec_constants.h"
#include "core/layout.h"
#include "cpu/butterflies.h"
#include "cpu/simd.h"

namespace tq_hb {
namespace {

/// x with lanes i and i ^ kStride exchanged.
template <std::size_t kStride>
inline Vec swap_lanes(Vec x) noexcept {
#if defined(__AVX512F__)
  if constexpr (kStride == 1) return _mm512_permute_ps(x, 0xB1);
  if constexpr (kStride == 2) return _mm512_permute_ps(x, 0x4E);
  if constexpr (kStride == 4) return _mm512_shuffle_f32x4(x, x, 0xB1);
  if constexpr (kStride == 8) return _mm512_shuffle_f32x4(x, x, 0x4E);
#elif defined(__AVX__)
  if constexpr (kStride == 1) return _mm256_permute_ps(x, 0xB1);
  if constexpr (kStride == 2) return _mm256_permute_ps(x, 0x4E);
  if constexpr (kStride == 4) return _mm256_permute2f128_ps(x, x, 0x01);
#else
  if constexpr (kStride == 1) return vrev64q_f32(x);
  if constexpr (kStride == 2) return vextq_f32(x, x, 2);
#endif
}

/// The butterflies of strides kStride, 2 * kStride, ... among the lanes of a vector. A product by 1 or -1 is exact, so
/// that it does not matter whether it is contracted.
template <std::size_t kStride = 1>
inline Vec transform_lanes(Vec x) noexcept {
  if constexpr (kStride == kLanes) {
    return x;
  } else {
    Vec signs;
    for (std::size_t i = 0; i < kLanes; ++i) signs[i] = i & kStride ? -1.0f : 1.0f;
    return transform_lanes<2 * kStride>(swap_lanes<kStride>(x) + x * signs);
  }
}

template <std::size_t kHeadDim>
void rotate_vectors(float* row) noexcept {
  constexpr std::size_t kVectors = kHeadDim / kLanes;
  const float* signs = sign_table();
  Vec y[kVectors];
  for (std::size_t i = 0; i < kVectors; ++i) {
    y[i] = transform_lanes(load(row + i * kLanes) * load(signs + i * kLanes));
  }
  transform_vectors<kVectors>(y, [](Vec x, std::size_t) { return x * inverse_sqrt_head_dim(kHeadDim); });
  __builtin_memcpy(row, y, sizeof(y));
}

template <std::size_t kHeadDim>
void unrotate_vectors(float* row) noexcept {
  constexpr std::size_t kVectors = kHeadDim / kLanes;
  const float* signs = sign_table();
  Vec y[kVectors];
  for (std::size_t i = 0; i < kVectors; ++i) y[i] = transform_lanes(load(row + i * kLanes));
  transform_vectors<kVectors>(
      y, [&](Vec x, std::size_t i) { return x * inverse_sqrt_head_dim(kHeadDim) * load(signs + i * kLanes); });
  __builtin_memcpy(row, y, sizeof(y));
}

void rotate_in_vectors(float* row, std::size_t head_dim) noexcept {
#define TQ_ROTATE(size) \
  if (head_dim == size) return rotate_vectors<size>(row);
  TQ_HB_FOR_EACH_HEAD_DIM(TQ_ROTATE)
#undef TQ_ROTATE
}

void unrotate_in_vectors(float* row, std::size_t head_dim) noexcept {
#define TQ_UNROTATE(size) \
  if (head_dim == size) return unrotate_vectors<size>(row);
  TQ_HB_FOR_EACH_HEAD_DIM(TQ_UNROTATE)
#undef TQ_UNROTATE
}

}  // namespace
}  // namespace tq_hb
