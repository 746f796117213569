// Codes of a row as bytes, whatever the packing.
//
// Lane t of those that share a stripe owns four of its coordinates: 2t and 2t + 1, and the two half a stripe further
// on. In every packing the codes of these are in two pairs of bytes: of the lower and the upper half of a stripe of
// bytes, or of the nibble plane and the high plane.
#pragma once

#include "core/abi.h"
#include "metal/kernels/row_shape.h"
#include "metal/kernels/tables.h"

constant bool tq_plane [[function_constant(TQ_CONSTANT_PLANE)]];

/// Whether rows of this width are cut into planes.
inline bool has_planes(uint cbits) {
  return cbits < 8 && (is_function_constant_defined(tq_plane) ? tq_plane : false);
}

inline uint row_bytes(uint head_dim, uint cbits) {
  return has_planes(cbits) ? head_dim * cbits / 8 : head_dim;
}

/// Bits of a code in the high plane.
inline uint high_width(uint cbits) {
  return cbits - 4;
}

/// Where a lane's codes lie in their row: two pairs of bytes, and which bits of the second.
struct PairPlaces {
  uint first;         // of the lane's stripe
  uint second;        // again of its stripe, the lanes of which may share it
  uint second_bytes;  // of the stripe from there on
  uint width;         // bits of a code in the second pair; 8 where each pair has codes of its own
  uint shift;         // of the lane's first two codes in the second pair; the others are 4 bits further on
};

template <int D>
inline PairPlaces pair_places(uint cbits, uint stripe, ushort stripe_lane) {
  constexpr uint kDim = tq_hb::stripe_dim(D);
  PairPlaces at;
  if (has_planes(cbits)) {
    at.width = high_width(cbits);
    at.second_bytes = kDim * at.width / 8;
    at.first = stripe * kDim / 2;
    at.second = D / 2 + stripe * at.second_bytes;
  } else {
    at.width = 8;
    at.second_bytes = kDim / 2;
    at.first = stripe * kDim;
    at.second = at.first + at.second_bytes;
  }
  at.shift = 2 * stripe_lane / at.second_bytes * at.width;
  return at;
}

/// A lane's four codes of a stripe, two in the lower bytes of each word. The upper bytes may have those of another row.
struct CodePairs {
  uint lower;
  uint upper;

  CodePairs of_other_row() const { return CodePairs{lower >> 16, upper >> 16}; }
};

/// The codes of one row or two from both pairs of bytes of each.
inline CodePairs join_pairs(uint first, uint second, PairPlaces at) {
  if (at.width == 8) return CodePairs{first, second};
  const uint mask = ((1u << at.width) - 1) * 0x01010101u;
  const uint high = second >> at.shift;
  return CodePairs{(first & 0x0F0F0F0Fu) | ((high & mask) << 4), ((first >> 4) & 0x0F0F0F0Fu) | (high & (mask << 4))};
}

/// The lane's four codes of one stripe of a row.
template <int D>
inline CodePairs load_codes(device const uchar* row, uint cbits, uint stripe, ushort stripe_lane) {
  const PairPlaces at = pair_places<D>(cbits, stripe, stripe_lane);
  const ushort first = *(device const ushort*)(row + at.first + 2 * stripe_lane);
  const ushort second = *(device const ushort*)(row + at.second + 2 * stripe_lane % at.second_bytes);
  return join_pairs(first, second, at);
}

/// The lane's four values of one stripe of a row.
template <int D>
inline float4 load_own(threadgroup const float* row, uint stripe, ushort stripe_lane) {
  threadgroup const float2* pairs = (threadgroup const float2*)(row + stripe * tq_hb::stripe_dim(D));
  return float4(pairs[stripe_lane], pairs[tq_hb::stripe_lanes(D) + stripe_lane]);
}

/// Stores the lane's four values of one stripe of a row whose float4 lie `step` apart.
template <int D>
inline void store_own(device float4* row, uint step, uint stripe, ushort stripe_lane, float4 own) {
  for (uint upper = 0; upper < 2; ++upper) {
    const uint pair = (2 * stripe + upper) * tq_hb::stripe_lanes(D) + stripe_lane;
    ((device float2*)(row + pair / 2 * step))[pair % 2] = upper == 0 ? own.xy : own.zw;
  }
}

/// A code's bits in one plane of its row.
inline uint plane_field(device const uchar* plane, uint width, uint head_dim, uint coordinate) {
  const uint block = tq_hb::stripe_dim(head_dim);
  const uint bytes = block * width / 8;
  const uint u = coordinate % block;
  return (plane[coordinate / block * bytes + u % bytes] >> (u / bytes * width)) & ((1u << width) - 1);
}

/// One code of a row.
inline uint load_code(device const uchar* row, uint head_dim, uint cbits, uint coordinate) {
  if (!has_planes(cbits)) return row[coordinate] & ((1u << cbits) - 1);
  return plane_field(row, 4, head_dim, coordinate) |
         (plane_field(row + head_dim / 2, high_width(cbits), head_dim, coordinate) << 4);
}

/// Stores the bits from `shift` on of a row's codes as a plane of `width` bits each; lane t has the codes of the E = D
/// / 32 coordinates from E * t on, a byte each.
///
/// Lanes whose coordinates share bytes put their bits together, and the first of them stores.
template <int D>
inline void store_plane(thread const uint (&codes)[(D / 32 + 3) / 4], device uchar* plane, uint width, uint shift,
                        ushort lane) {
  constexpr uint E = D / 32;
  constexpr uint kWords = (E + 3) / 4;
  constexpr uint kLanes = tq_hb::stripe_dim(D) / E;
  const uint block_lane = lane % kLanes;
  const uint storing = kLanes * width / 8;
  const uint mask = ((1u << width) - 1) * 0x01010101u;
  uint bits[kWords];
  for (uint i = 0; i < kWords; ++i) {
    bits[i] = ((codes[i] >> shift) & mask) << (block_lane / storing * width);
    for (ushort other = storing; other < kLanes; other *= 2) bits[i] |= simd_shuffle_xor(bits[i], other);
  }
  if (block_lane >= storing) return;
  device uchar* to = plane + (lane / kLanes * storing + block_lane) * E;
  if (E == 2) {
    *(device ushort*)to = ushort(bits[0]);
  } else {
    for (uint i = 0; i < kWords; ++i) ((device uint*)to)[i] = bits[i];
  }
}

template <int D>
inline void store_codes(thread const uint (&codes)[(D / 32 + 3) / 4], device uchar* row, uint cbits, ushort lane) {
  if (has_planes(cbits)) {
    store_plane<D>(codes, row, 4, 0, lane);
    store_plane<D>(codes, row + D / 2, high_width(cbits), 4, lane);
  } else {
    store_plane<D>(codes, row, 8, 0, lane);
  }
}
