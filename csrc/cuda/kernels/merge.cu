// Merges the partial results of a row's splits, adds the sink, un-rotates, and writes the row.
//
// Grid: a block of kThreads threads for each row. A row whose query or bias is not finite is reported and left.

#include "cuda/kernels/dispatch.h"
#include "cuda/kernels/kernels.h"
#include "cuda/kernels/query.cuh"
#include "cuda/kernels/row.cuh"

namespace tq_hb {
namespace {

constexpr unsigned kThreads = 128;

/// Combines one value of every thread, in a fixed order; all get the result.
template <class Combine>
__device__ double over_block(double value, const Combine& combine) {
  __shared__ double of_warp[kThreads / kWarp];
#pragma unroll
  for (unsigned step = 1; step < kWarp; step *= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  __syncthreads();  // the last use of the memory is over
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warp[0];
  for (unsigned w = 1; w < kThreads / kWarp; ++w) value = combine(value, of_warp[w]);
  return value;
}

/// Whether a row of q and its bias can be used.
template <unsigned kHeadDim>
__device__ bool is_usable(const AttendCall& call, std::uint64_t row) {
  bool finite = call.score_bias == nullptr || isfinite(call.score_bias[row]);
  for (unsigned j = threadIdx.x; j < kHeadDim; j += kThreads) {
    finite = finite && isfinite(call.q[row * kHeadDim + j]);
  }
  return __syncthreads_and(finite) != 0;
}

template <unsigned kHeadDim>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ AttendCall call) {
  __shared__ float weights[TQ_GQA_MAX_SPLITS];
  __shared__ __align__(16) float merged[kHeadDim];
  const std::uint64_t row = blockIdx.x;
  if (!is_usable<kHeadDim>(call, row)) {
    if (threadIdx.x == 0) atomicMin(call.status, static_cast<std::uint32_t>(row));
    return;
  }
  const unsigned splits = call.args.nwg;
  const float* partials = call.partials + row * splits * partial_floats(kHeadDim);
  const auto lse_of = [&](unsigned split) {
    return *reinterpret_cast<const double*>(partials + split * partial_floats(kHeadDim) + kHeadDim);
  };
  const double sink = call.sinks != nullptr ? call.sinks[row % call.args.num_heads] : -HUGE_VAL;

  double max = sink;
  for (unsigned s = threadIdx.x; s < splits; s += kThreads) max = fmax(max, lse_of(s));
  max = over_block(max, [](double a, double b) { return fmax(a, b); });
  double sum = 0.0;
  for (unsigned s = threadIdx.x; s < splits; s += kThreads) {
    const double lse = lse_of(s);
    weights[s] = lse == -HUGE_VAL ? 0.0f : expf(static_cast<float>(lse - max));
    sum += weights[s];
  }
  sum = over_block(sum, [](double a, double b) { return a + b; });
  if (sink != -HUGE_VAL) sum += exp(sink - max);
  // Where no key is seen and there is no sink, the sum is 0, and so is the output.
  const float inverse = sum == 0.0 ? 0.0f : static_cast<float>(1.0 / sum);

  for (unsigned j = threadIdx.x; j < kHeadDim; j += kThreads) {
    float value = 0.0f;
    for (unsigned s = 0; s < splits; ++s) value = fmaf(weights[s], partials[s * partial_floats(kHeadDim) + j], value);
    merged[j] = value * inverse;
  }
  __syncthreads();
  float* output = call.output + row * kHeadDim;
  if (!call.unrotate) {
    for (unsigned j = threadIdx.x; j < kHeadDim; j += kThreads) output[j] = merged[j];
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
                [&](auto head_dim) { merge_kernel<head_dim><<<sizes.grid, sizes.block, 0, stream>>>(call); });
}

}  // namespace tq_hb
