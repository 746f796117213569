// What the attention kernels share: where a row's query stands, and sums over a warp.
#pragma once

#include "core/query_range.h"
#include "cuda/kernels/kernels.h"
#include "cuda/kernels/row.cuh"

namespace tq_hb {
namespace {

/// The keys that a row of q sees: a row is one head of one query.
__device__ inline QueryRange range_of_row(const TqFlashAttnVecArgs& args, TqU32 row) {
  const TqU32 later_queries = args.num_queries - 1 - row / args.num_heads;
  return query_range(args.query_position - later_queries, args.kv_seq_len,
                     args.mask_type == 2 ? args.sliding_window : 0);
}

__device__ inline TqU32 slot_of_age(const TqFlashAttnVecArgs& args, TqU32 age) {
  const TqU32 before_wrap = args.kv_capacity - args.ring_start;
  return age < before_wrap ? args.ring_start + age : age - before_wrap;
}

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (unsigned step = 1; step < kWarp; step *= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

/// NaN does not count.
template <class T>
__device__ T warp_max(T value) {
#pragma unroll
  for (unsigned step = 1; step < kWarp; step *= 2) value = fmax(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

/// Scales a row by a power of two so that nothing can overflow; returns what undoes that.
template <unsigned kHeadDim>
__device__ double scale_by_power_of_two(Row<kHeadDim>& row) {
  float largest = 0.0f;
#pragma unroll
  for (unsigned i = 0; i < Row<kHeadDim>::kPerLane; ++i) largest = fmaxf(largest, fabsf(row.values[i]));
  largest = warp_max(largest);
  // Clamped so that the factor itself is a normal float32.
  const int exponent = largest > 0.0f && isfinite(largest) ? min(max(ilogbf(largest), -126), 126) : 0;
  row.multiply(ldexpf(1.0f, -exponent));
  return ldexp(1.0, exponent);
}

__device__ inline float4 scaled(float4 a, float factor) {
  return make_float4(a.x * factor, a.y * factor, a.z * factor, a.w * factor);
}

__device__ inline float4 multiply_add(float factor, float4 a, float4 b) {
  return make_float4(fmaf(factor, a.x, b.x), fmaf(factor, a.y, b.y), fmaf(factor, a.z, b.z), fmaf(factor, a.w, b.w));
}

}  // namespace
}  // namespace tq_hb
