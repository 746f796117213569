// Merges the partial results of a row's splits, adds the sink, un-rotates, and writes the row.
//
// Grid: a block of kThreads threads for each row. A thread adds up two coordinates over every kGroups-th split, a warp
//       un-rotates. A row whose query or bias is not finite is reported and left.

#include "cuda/kernels/dispatch.h"
#include "cuda/kernels/kernels.h"
#include "cuda/kernels/overlap.cuh"
#include "cuda/kernels/query.cuh"
#include "cuda/kernels/row.cuh"

namespace tq_hb {
namespace {

constexpr unsigned kThreads = 512;
constexpr unsigned kWarps = kThreads / kWarp;

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

/// Whether a row of q and its bias can be used.
template <unsigned kHeadDim>
__device__ bool is_usable(const AttendCall& call, std::uint64_t row) {
  bool finite = call.score_bias == nullptr || isfinite(call.score_bias[row]);
  if (threadIdx.x < kHeadDim) finite = finite && isfinite(call.q[row * kHeadDim + threadIdx.x]);
  return __syncthreads_and(finite) != 0;
}

template <unsigned kHeadDim>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ AttendCall call) {
  static_assert(kHeadDim <= kThreads && TQ_GQA_MAX_SPLITS <= kThreads);
  constexpr unsigned kPairs = kHeadDim / 2;
  constexpr unsigned kGroups = kThreads / kPairs;
  __shared__ float weights[TQ_GQA_MAX_SPLITS];
  __shared__ double maxima[kWarps], sums[kWarps];
  __shared__ float2 group_sums[kGroups][kPairs];
  __shared__ __align__(16) float merged[kHeadDim];
  let_next_start();
  wait_for_previous();
  const std::uint64_t row = blockIdx.x;
  if (!is_usable<kHeadDim>(call, row)) {
    if (threadIdx.x == 0) atomicMin(call.status, static_cast<std::uint32_t>(row));
    return;
  }
  const unsigned splits = call.args.nwg;
  const float* partials = call.partials + row * splits * partial_floats(kHeadDim);
  const double sink = call.sinks != nullptr ? call.sinks[row % call.args.num_heads] : -HUGE_VAL;

  double lse = -HUGE_VAL;
  if (threadIdx.x < splits) {
    lse = *reinterpret_cast<const double*>(partials + threadIdx.x * partial_floats(kHeadDim) + kHeadDim);
  }
  const double max = over_block(fmax(lse, sink), maxima, [](double a, double b) { return fmax(a, b); });
  const float weight = lse == -HUGE_VAL ? 0.0f : expf(static_cast<float>(lse - max));
  if (threadIdx.x < splits) weights[threadIdx.x] = weight;
  double sum = over_block(weight, sums, [](double a, double b) { return a + b; });
  if (sink != -HUGE_VAL) sum += exp(sink - max);
  // Where no key is seen and there is no sink, the sum is 0, and so is the output.
  const float inverse = sum == 0.0 ? 0.0f : static_cast<float>(1.0 / sum);

  const unsigned pair = threadIdx.x % kPairs, group = threadIdx.x / kPairs;
  float2 value = make_float2(0.0f, 0.0f);
#pragma unroll 8
  for (unsigned s = group; s < splits; s += kGroups) {
    const float2 partial = reinterpret_cast<const float2*>(partials + s * partial_floats(kHeadDim))[pair];
    value.x = fmaf(weights[s], partial.x, value.x);
    value.y = fmaf(weights[s], partial.y, value.y);
  }
  group_sums[group][pair] = value;
  __syncthreads();
  if (threadIdx.x < kPairs) {
    for (unsigned i = 1; i < kGroups; ++i) {
      value.x += group_sums[i][pair].x;
      value.y += group_sums[i][pair].y;
    }
    reinterpret_cast<float2*>(merged)[pair] = make_float2(value.x * inverse, value.y * inverse);
  }
  __syncthreads();
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

}  // namespace

Launch merge_launch(const AttendCall& call) {
  return {{call.args.num_queries * call.args.num_heads}, {kThreads}};
}

void launch_merge(const AttendCall& call, cudaStream_t stream) {
  const Launch sizes = merge_launch(call);
  with_head_dim(call.args.head_dim,
                [&](auto head_dim) { launch_overlapping(merge_kernel<head_dim>, sizes, stream, call); });
}

}  // namespace tq_hb
