// The codec's encoder on as many rows at a time as a vector has lanes: lane i is row i.
//
// A lane goes through the operations of codec.cpp in their order, so its bytes are the same. Butterflies and sums of
// squares then need no shuffles; rows become lanes, and codes become rows, in blocks of four columns. A file that
// includes this one is compiled without contraction and defines before:
//
//   load_quarters(p, offset)    the four floats at p[0] + offset, p[4] + offset, ..., 128 bits after 128 bits
//   store_quarters(p, offset, v)  its inverse, for bytes
//   unpack_low(a, b), unpack_high(a, b)                a0 b0 a1 b1 and a2 b2 a3 b3 of every four floats
//   unpack_low_pairs(a, b), unpack_high_pairs(a, b)    a0 a1 b0 b1 and a2 a3 b2 b3
//   descend<levels>(keys, tree)   the nodes of the search tree, below that many levels, where the keys end
#pragma once

#include <math.h>

#include "core/bits.h"
#include "core/codec_constants.h"
#include "core/layout.h"
#include "cpu/butterflies.h"
#include "cpu/encode_kernel.h"

namespace tq_hb {
namespace {

/// Four vectors of which every 128 bits are a row of four values; afterwards they are a column. Its own inverse.
inline void transpose(Vec (&v)[4]) noexcept {
  const Vec low01 = unpack_low(v[0], v[1]), high01 = unpack_high(v[0], v[1]);
  const Vec low23 = unpack_low(v[2], v[3]), high23 = unpack_high(v[2], v[3]);
  v[0] = unpack_low_pairs(low01, low23);
  v[1] = unpack_high_pairs(low01, low23);
  v[2] = unpack_low_pairs(high01, high23);
  v[3] = unpack_high_pairs(high01, high23);
}

/// Magnitudes as integers, which have their order.
inline IntVec magnitude_bits(Vec x) noexcept {
  return load_as<IntVec>(&x) & 0x7FFFFFFF;
}

inline Vec flush_tiny(Vec y) noexcept {
  const Vec limit = Vec{} + kFlushBelow;
  return magnitude_bits(y) < load_as<IntVec>(&limit) ? Vec{} : y;
}

/// Reads the rows, with their signs, and transforms every kRadix coordinates among each other.
template <std::size_t kHeadDim>
inline void read_rows(const float* const (&rows)[kLanes], Vec* y) noexcept {
  const float* signs = sign_table();
  for (std::size_t first = 0; first < kHeadDim; first += kRadix) {
    Vec block[kRadix];
#pragma GCC unroll 4
    for (std::size_t j = 0; j < kRadix; j += 4) {
      Vec columns[4];
#pragma GCC unroll 4
      for (std::size_t i = 0; i < 4; ++i) columns[i] = load_quarters(rows + i, first + j);
      transpose(columns);
#pragma GCC unroll 4
      for (std::size_t i = 0; i < 4; ++i) block[j + i] = columns[i] * signs[first + j + i];
    }
    butterflies(block);
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kRadix; ++i) y[first + i] = block[i];
  }
}

/// Sums of squares of one norm block, in the format's order.
template <std::size_t kHeadDim, std::size_t kBlockDim>
inline Vec block_energy(const Vec* block) noexcept {
  constexpr std::size_t kPerLane = kHeadDim / kEnergyLanes, kSums = kBlockDim / kPerLane;
  Vec sums[kSums];
  for (std::size_t lane = 0; lane < kSums; ++lane) {
    Vec sum{};
#pragma GCC unroll 16
    for (std::size_t j = 0; j < kPerLane; ++j) sum += block[lane * kPerLane + j] * block[lane * kPerLane + j];
    sums[lane] = sum;
  }
  for (std::size_t step = 1; step < kSums; step *= 2) {
    for (std::size_t lane = 0; lane < kSums; lane += 2 * step) sums[lane] += sums[lane + step];
  }
  return sums[0];
}

/// Indices of the values: see SearchTree. The codes on either side of zero are each other's complement.
template <unsigned kBits>
inline IntVec codes_of(Vec x, const SearchTree& tree) noexcept {
  const IntVec positive = x > 0.0f;
  return descend<kBits - 1>(magnitude_bits(x) + positive, tree) ^ (~positive & ((1 << kBits) - 1));
}

/// Asks for a line of each of the next rows ahead of their use: a row is too short for the processor to see it coming.
/// Beyond the last row it does nothing.
template <std::size_t kHeadDim>
inline void prefetch_rows(const float* line) noexcept {
  for (std::size_t i = 0; i < kLanes; ++i) __builtin_prefetch(line + i * kHeadDim, 0, 2);
}

/// Writes the codes of one norm block, 16 columns at a time, four to a 32-bit lane, and prefetches these columns of the
/// rows at `next`.
template <unsigned kBits, std::size_t kHeadDim, std::size_t kBlockDim, class Scaled>
inline void write_codes(const SearchTree& tree, const Scaled& scaled, std::uint8_t* const (&rows)[kLanes],
                        std::size_t offset, const float* next) noexcept {
  for (std::size_t first = 0; first < kBlockDim; first += 16) {
    prefetch_rows<kHeadDim>(next + offset + first);
    Vec words[4];
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 4; ++i) {
      IntVec word{};
#pragma GCC unroll 4
      for (std::size_t j = 0; j < 4; ++j) word |= codes_of<kBits>(scaled(first + 4 * i + j), tree) << (8 * j);
      words[i] = load_as<Vec>(&word);
    }
    transpose(words);
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 4; ++i) store_quarters(rows + i, offset + first, words[i]);
  }
}

template <unsigned kBits, std::size_t kHeadDim>
std::uint32_t encode_batch(const EncodeTask& task, std::size_t first, std::size_t count) noexcept {
  constexpr std::size_t kBlocks = norms_per_row(kHeadDim), kBlockDim = kHeadDim / kBlocks;
  // Lanes beyond the last row take the first row once more, to be dropped.
  const float* src[kLanes];
  for (std::size_t i = 0; i < kLanes; ++i) src[i] = task.src + (first + (i < count ? i : 0)) * kHeadDim;
  Vec y[kHeadDim];
  read_rows<kHeadDim>(src, y);
  transform_vectors<kHeadDim, kRadix>(
      y, [](Vec x, std::size_t) { return flush_tiny(x * inverse_sqrt_head_dim(kHeadDim)); });

  float norms[kBlocks][kLanes];
  std::uint32_t refused = 0;
  for (std::size_t b = 0; b < kBlocks; ++b) {
    store(norms[b], block_energy<kHeadDim, kBlockDim>(y + b * kBlockDim));
    for (std::size_t i = 0; i < kLanes; ++i) {
      norms[b][i] = sqrtf(norms[b][i]) * (kBlocks == 1 ? 1.0f : kBlockRms);
      if (i < count && !(norms[b][i] < INFINITY)) refused |= std::uint32_t{1} << i;
    }
  }

  std::uint8_t dropped[kHeadDim];
  std::uint8_t* codes[kLanes];
  for (std::size_t i = 0; i < kLanes; ++i) {
    const bool kept = i < count && !(refused >> i & 1);
    codes[i] = kept ? task.codes[first + i] : dropped;
    for (std::size_t b = 0; b < kBlocks && kept; ++b) task.norms[first + i][b] = norms[b][i];
  }
  for (std::size_t b = 0; b < kBlocks; ++b) {
    float factors[kLanes];
    for (std::size_t i = 0; i < kLanes; ++i) {
      const float inverse = norms[b][i] > kSmallestNorm ? 1.0f / norms[b][i] : 0.0f;
      factors[i] = kBlocks == 1 ? inverse * sqrtf(static_cast<float>(kHeadDim)) : inverse;
    }
    const Vec factor = load(factors);
    const Vec* block = y + b * kBlockDim;
    write_codes<kBits, kHeadDim, kBlockDim>(
        *task.tree,
        [&](std::size_t j) { return kBlocks == 1 ? block[j] * factor : block[j] * factor * task.scale_factor_d512; },
        codes, b * kBlockDim, task.src + (first + kLanes) * kHeadDim);
  }
  return refused;
}

template <unsigned kBits>
std::uint32_t encode_some(const EncodeTask& task, std::size_t first, std::size_t count) noexcept {
#define TQ_ENCODE(size) \
  if (task.head_dim == size) return encode_batch<kBits, size>(task, first, count);
  TQ_HB_FOR_EACH_HEAD_DIM(TQ_ENCODE)
#undef TQ_ENCODE
  __builtin_unreachable();
}

std::uint32_t encode_rows(const EncodeTask& task) noexcept {
  std::uint32_t refused = 0;
  for (std::size_t first = 0; first < task.rows; first += kLanes) {
    const std::size_t count = task.rows - first < kLanes ? task.rows - first : kLanes;
#define TQ_ENCODE(bits) \
  if (task.cbits == bits) refused |= encode_some<bits>(task, first, count) << first;
    TQ_HB_FOR_EACH_CBITS(TQ_ENCODE)
#undef TQ_ENCODE
  }
  return refused;
}

}  // namespace
}  // namespace tq_hb
