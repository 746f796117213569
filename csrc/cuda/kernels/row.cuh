// A row of kHeadDim values held by a warp, and the codes of a row in memory.
//
// Lane `lane` holds the consecutive coordinates from lane * kPerLane on, so that the order of every sum is the
// format's. Files that encode are compiled without contraction of a*b+c.
#pragma once

#include <cstdint>

#include "core/codec_constants.h"
#include "core/layout.h"
#include "cuda/kernels/tables.cuh"

namespace tq_hb {
namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

template <unsigned kHeadDim>
struct Row {
  static constexpr unsigned kPerLane = kHeadDim / kWarp;
  static constexpr unsigned kNorms = kHeadDim > kNormBlock ? kHeadDim / kNormBlock : 1;
  static constexpr unsigned kPairs = kPerLane / 2;
  /// Values of a load: the shortest rows have no more than 2 in a lane.
  static constexpr unsigned kVector = kPerLane < 4 ? 2 : 4;
  struct alignas(kVector * sizeof(float)) Vector {
    float values[kVector];
  };
  /// A byte for every value of the lane; a row of them starts at a multiple of 8.
  struct alignas(kPerLane < 8 ? kPerLane : 8) Bytes {
    std::uint8_t values[kPerLane];
  };

  float values[kPerLane];

  __device__ void load(const float* row, unsigned lane) {
    const Vector* vectors = reinterpret_cast<const Vector*>(row + lane * kPerLane);
#pragma unroll
    for (unsigned v = 0; v < kPerLane / kVector; ++v) {
      const Vector vector = vectors[v];
#pragma unroll
      for (unsigned i = 0; i < kVector; ++i) values[v * kVector + i] = vector.values[i];
    }
  }

  __device__ void store(float* row, unsigned lane) const {
    Vector* vectors = reinterpret_cast<Vector*>(row + lane * kPerLane);
#pragma unroll
    for (unsigned v = 0; v < kPerLane / kVector; ++v) {
      Vector vector;
#pragma unroll
      for (unsigned i = 0; i < kVector; ++i) vector.values[i] = values[v * kVector + i];
      vectors[v] = vector;
    }
  }

  /// The signs of the lane's coordinates, a bit each.
  static __device__ unsigned signs(unsigned lane) {
    const unsigned first = lane * kPerLane;
    return (kSignBits[first / 8] | (kPerLane > 8 ? kSignBits[first / 8 + 1] << 8 : 0)) >> (first % 8);
  }

  __device__ void multiply_signs(unsigned signs) {
#pragma unroll
    for (unsigned i = 0; i < kPerLane; ++i) values[i] = (signs >> i & 1) != 0 ? -values[i] : values[i];
  }

  __device__ void multiply(float factor) {
#pragma unroll
    for (unsigned i = 0; i < kPerLane; ++i) values[i] *= factor;
  }

  /// Walsh-Hadamard butterflies of strides 1, 2, 4, ..., unscaled.
  __device__ void hadamard(unsigned lane) {
#pragma unroll
    for (unsigned stride = 1; stride < kPerLane; stride *= 2) {
#pragma unroll
      for (unsigned i = 0; i < kPerLane; ++i) {
        if ((i & stride) != 0) continue;
        const float a = values[i];
        const float b = values[i + stride];
        values[i] = a + b;
        values[i + stride] = a - b;
      }
    }
#pragma unroll
    for (unsigned step = 1; step < kWarp; step *= 2) {
      const float sign = (lane & step) != 0 ? -1.0f : 1.0f;
#pragma unroll
      for (unsigned i = 0; i < kPerLane; ++i) {
        const float other = __shfl_xor_sync(kAllLanes, values[i], step);
        values[i] = fmaf(values[i], sign, other);  // the product is exact: this is a sum or a difference
      }
    }
  }

  static constexpr float kScale = inverse_sqrt_head_dim(kHeadDim);

  /// R.
  __device__ void rotate(unsigned lane) { rotate(lane, signs(lane)); }
  /// The same where the signs have been loaded before.
  __device__ void rotate(unsigned lane, unsigned signs) {
    multiply_signs(signs);
    hadamard(lane);
    multiply(kScale);
  }

  /// R^-1.
  __device__ void unrotate(unsigned lane) { unrotate(lane, signs(lane)); }
  __device__ void unrotate(unsigned lane, unsigned signs) {
    hadamard(lane);
    multiply(kScale);
    multiply_signs(signs);
  }
};

/// What a level is multiplied by when a row with this norm is decoded.
template <unsigned kHeadDim>
__device__ float decode_factor(float norm, float scale_factor_d512) {
  return Row<kHeadDim>::kNorms == 1 ? norm * Row<kHeadDim>::kScale : norm / scale_factor_d512;
}

/// How the codes of a row lie: kHighBits is 0 where every code has a byte, else the width of the high plane.
template <unsigned kHeadDim, unsigned kHighBits>
struct Codes {
  static constexpr unsigned kBlock = kHeadDim < kPlaneBlock ? kHeadDim : kPlaneBlock;
  static constexpr unsigned kRowBytes = kHighBits == 0 ? kHeadDim : kHeadDim * (kNibbleBits + kHighBits) / 8;
  static constexpr std::uint32_t kEveryByte = 0x01010101u;

  /// The codes of coordinates 4 * quad to 4 * quad + 3, a byte each.
  static __device__ std::uint32_t quad(const std::uint8_t* row, unsigned quad) {
    if constexpr (kHighBits == 0) {
      return reinterpret_cast<const std::uint32_t*>(row)[quad];
    } else {
      return field<kNibbleBits>(row, quad) | (field<kHighBits>(row + kHeadDim * kNibbleBits / 8, quad) << kNibbleBits);
    }
  }

  /// Writes the planes' words of a row whose codes lie in `codes`, a byte each; for all lanes of a warp together.
  static __device__ void write_planes(const std::uint8_t* codes, std::uint8_t* row, unsigned lane) {
    write_plane<kNibbleBits>(codes, 0, row, lane);
    write_plane<kHighBits>(codes, kNibbleBits, row + kHeadDim * kNibbleBits / 8, lane);
  }

 private:
  template <unsigned kWidth>
  static __device__ std::uint32_t field(const std::uint8_t* plane, unsigned quad) {
    constexpr unsigned kWords = kBlock * kWidth / 32;  // of a block
    const unsigned block = quad / (kBlock / 4);
    const unsigned within = quad % (kBlock / 4);
    const std::uint32_t word = reinterpret_cast<const std::uint32_t*>(plane)[block * kWords + within % kWords];
    return (word >> (within / kWords * kWidth)) & (kEveryByte * ((1u << kWidth) - 1));
  }

  template <unsigned kWidth>
  static __device__ void write_plane(const std::uint8_t* codes, unsigned shift, std::uint8_t* plane, unsigned lane) {
    constexpr unsigned kWords = kBlock * kWidth / 32;
    const std::uint32_t* quads = reinterpret_cast<const std::uint32_t*>(codes);
    for (unsigned w = lane; w < kHeadDim * kWidth / 32; w += kWarp) {
      const unsigned block = w / kWords;
      std::uint32_t word = 0;
#pragma unroll
      for (unsigned f = 0; f < 8 / kWidth; ++f) {
        const std::uint32_t quad = quads[block * (kBlock / 4) + f * kWords + w % kWords];
        word |= ((quad >> shift) & (kEveryByte * ((1u << kWidth) - 1))) << (f * kWidth);
      }
      reinterpret_cast<std::uint32_t*>(plane)[w] = word;
    }
  }
};

}  // namespace
}  // namespace tq_hb
