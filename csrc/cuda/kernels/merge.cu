// Merges the partial results of a row's splits, adds the sink, un-rotates, and writes the row.
//
// Grid: a cluster of blocks for each row, of kThreads threads: one block, or kManyBlocks where there are many splits.
//       A block merges its share of the coordinates: a thread two of them, over every kGroups-th split. The first
//       block collects them, and a warp of it un-rotates. A row whose query or bias is not finite is reported and left.

#include <cooperative_groups.h>

#include "cuda/kernels/dispatch.h"
#include "cuda/kernels/kernels.h"
#include "cuda/kernels/overlap.cuh"
#include "cuda/kernels/query.cuh"
#include "cuda/kernels/row.cuh"

namespace tq_hb {
namespace {

constexpr unsigned kThreads = 512;
constexpr unsigned kWarps = kThreads / kWarp;
constexpr unsigned kManyBlocks = 4;
constexpr unsigned kManySplits = 48;
/// Partial results that a thread asks for before it knows their weights.
constexpr unsigned kPrefetch = 8;

/// Combines one value of every thread, in a fixed order; all get the result.
template <class Combine>
__device__ double over_block(double value, double (&of_warp)[kWarps], const Combine& combine) {
#pragma unroll
  for (unsigned step = 1; step < kWarp; step *= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warp[threadIdx.x % kWarps];
#pragma unroll
  for (unsigned step = 1; step < kWarps; step *= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

template <unsigned kHeadDim, unsigned kBlocks>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ AttendCall call) {
  static_assert(kHeadDim <= kThreads && TQ_GQA_MAX_SPLITS <= kThreads);
  constexpr unsigned kPairs = kHeadDim / 2 / kBlocks;  // of the block's coordinates
  constexpr unsigned kGroups = kThreads / kPairs;
  __shared__ float weights[TQ_GQA_MAX_SPLITS];
  __shared__ double maxima[kWarps], sums[kWarps];
  __shared__ float2 group_sums[kGroups][kPairs];
  __shared__ __align__(16) float merged[kHeadDim];
  let_next_start();
#if __CUDA_ARCH__ >= 900
  // The first block must be there before another writes to its memory.
  if constexpr (kBlocks > 1) cooperative_groups::this_cluster().barrier_arrive();
#endif
  wait_for_previous();
  const std::uint64_t row = blockIdx.x / kBlocks;
  const unsigned block = blockIdx.x % kBlocks;
  const unsigned splits = call.args.nwg;
  const float* partials = call.partials + row * splits * partial_floats(kHeadDim);
  const unsigned pair = threadIdx.x % kPairs, group = threadIdx.x / kPairs;
  const auto partial_of = [&](unsigned split) {
    return reinterpret_cast<const float2*>(partials + split * partial_floats(kHeadDim))[block * kPairs + pair];
  };

  // Everything that is read first, before any of it is waited for.
  double lse = -HUGE_VAL;
  if (threadIdx.x < splits) {
    lse = *reinterpret_cast<const double*>(partials + threadIdx.x * partial_floats(kHeadDim) + kHeadDim);
  }
  const double sink = call.sinks != nullptr ? call.sinks[row % call.args.num_heads] : -HUGE_VAL;
  bool is_usable = call.score_bias == nullptr || isfinite(call.score_bias[row]);
  if (threadIdx.x < kHeadDim) is_usable = is_usable && isfinite(call.q[row * kHeadDim + threadIdx.x]);
  float2 first[kPrefetch];
#pragma unroll
  for (unsigned i = 0; i < kPrefetch; ++i) {
    const unsigned split = group + i * kGroups;
    first[i] = split < splits ? partial_of(split) : make_float2(0.0f, 0.0f);
  }

  const double max = over_block(fmax(lse, sink), maxima, [](double a, double b) { return fmax(a, b); });
  const float weight = lse == -HUGE_VAL ? 0.0f : expf(static_cast<float>(lse - max));
  if (threadIdx.x < splits) weights[threadIdx.x] = weight;
  if (__syncthreads_and(is_usable) == 0) {  // so say all blocks of the row
    if (threadIdx.x == 0) atomicMin(call.status, static_cast<std::uint32_t>(row));
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) cooperative_groups::this_cluster().barrier_wait();
#endif
    return;
  }
  float2 value = make_float2(0.0f, 0.0f);
  const auto add = [&](unsigned split, float2 partial) {
    value.x = fmaf(weights[split], partial.x, value.x);
    value.y = fmaf(weights[split], partial.y, value.y);
  };
#pragma unroll
  for (unsigned i = 0; i < kPrefetch; ++i) {
    if (group + i * kGroups < splits) add(group + i * kGroups, first[i]);
  }
#pragma unroll 4
  for (unsigned split = group + kPrefetch * kGroups; split < splits; split += kGroups) add(split, partial_of(split));
  group_sums[group][pair] = value;
  double sum = over_block(weight, sums, [](double a, double b) { return a + b; });
  if (sink != -HUGE_VAL) sum += exp(sink - max);
  // Where no key is seen and there is no sink, the sum is 0, and so is the output.
  const float inverse = sum == 0.0 ? 0.0f : static_cast<float>(1.0 / sum);
#if __CUDA_ARCH__ >= 900
  if constexpr (kBlocks > 1) cooperative_groups::this_cluster().barrier_wait();
#endif
  if (threadIdx.x < kPairs) {
#pragma unroll
    for (unsigned i = 1; i < kGroups; ++i) {
      value.x += group_sums[i][pair].x;
      value.y += group_sums[i][pair].y;
    }
    value = make_float2(value.x * inverse, value.y * inverse);
    float* target = merged;
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) target = cooperative_groups::this_cluster().map_shared_rank(merged, 0);
#endif
    reinterpret_cast<float2*>(target)[block * kPairs + pair] = value;
  }
#if __CUDA_ARCH__ >= 900
  if constexpr (kBlocks > 1) cooperative_groups::this_cluster().sync();
#endif
  if constexpr (kBlocks == 1) __syncthreads();
  if (block != 0) return;

  float* output = call.output + row * kHeadDim;
  if (!call.unrotate) {
    if (threadIdx.x < kHeadDim) output[threadIdx.x] = merged[threadIdx.x];
  } else if (threadIdx.x < kWarp) {
    Row<kHeadDim> result;
    result.load(merged, threadIdx.x);
    result.unrotate(threadIdx.x);
    result.store(output, threadIdx.x);
  }
  if (call.lse != nullptr && threadIdx.x == 0) call.lse[row] = static_cast<float>(max + log(sum));
}

/// Blocks that share a row. Only many splits, which a GPU without clusters is not given, are worth more than one.
unsigned blocks_of(const AttendCall& call) {
  return call.args.nwg >= kManySplits ? kManyBlocks : 1;
}

}  // namespace

Launch merge_launch(const AttendCall& call) {
  return {{call.args.num_queries * call.args.num_heads * blocks_of(call)}, {kThreads}};
}

void launch_merge(const AttendCall& call, cudaStream_t stream) {
  const Launch sizes = merge_launch(call);
  with_head_dim(call.args.head_dim, [&](auto head_dim) {
    if (blocks_of(call) == 1) {
      launch_overlapping(merge_kernel<head_dim, 1>, sizes, 1, stream, call);
    } else {
      launch_overlapping(merge_kernel<head_dim, kManyBlocks>, sizes, kManyBlocks, stream, call);
    }
  });
}

}  // namespace tq_hb
