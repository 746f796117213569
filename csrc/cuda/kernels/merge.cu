// Merges the partial results of a row's splits, adds the sink, un-rotates, and writes the row.
//
// Grid: a block for each row, of as few threads as the splits allow, so that it finds room beside a block that attends
//       and waits there for it.
// Work: a thread merges four coordinates of every kGroups-th split, of which there are at most kMostOfThread. Every
//       warp computes all weights. The first one un-rotates.
//
// A row whose query or bias is not finite is reported and left.

#include "cuda/kernels/dispatch.h"
#include "cuda/kernels/kernels.h"
#include "cuda/kernels/overlap.cuh"
#include "cuda/kernels/partials.cuh"
#include "cuda/kernels/query.cuh"
#include "cuda/kernels/row.cuh"

namespace tq_hb {
namespace {

constexpr unsigned kThreadsChoices[] = {128, 512, 1024};
/// Splits of a thread; the largest blocks may have to take more. It asks for all before it knows their weights.
constexpr unsigned kMostOfThread = 8;

template <class State, unsigned kHeadDim, unsigned kThreads>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ AttendCall call) {
  constexpr unsigned kColumns = kHeadDim / 4;  // of four coordinates each
  constexpr unsigned kGroups = kThreads / kColumns;
  constexpr unsigned kMostSplits = kThreads == kThreadsChoices[0] ? 64 : TQ_GQA_MAX_SPLITS;
  constexpr unsigned kStates = kMostSplits / kWarp;  // of a lane
  __shared__ float weights[kMostSplits];
  __shared__ float4 group_sums[kGroups][kColumns];
  __shared__ __align__(16) float merged[kHeadDim];
  let_next_start();
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned signs = Row<kHeadDim>::signs(lane);
  wait_for_previous();
  const std::uint64_t row = blockIdx.x;
  const unsigned splits = call.args.nwg;
  const unsigned column = threadIdx.x % kColumns, group = threadIdx.x / kColumns;
  const float4* outputs = reinterpret_cast<const float4*>(outputs_of_row<kHeadDim>(call, row)) + column;
  const auto output_of = [&](unsigned split) { return outputs[split * (kHeadDim / 4)]; };

  // Everything that is read first, before any of it is waited for.
  const State* of_splits = states_of_row<State, kHeadDim>(call, row);
  State states[kStates];
#pragma unroll
  for (unsigned i = 0; i < kStates; ++i) {
    if (lane + i * kWarp < splits) states[i] = of_splits[lane + i * kWarp];
  }
  float4 first[kMostOfThread];
#pragma unroll
  for (unsigned i = 0; i < kMostOfThread; ++i) {
    const unsigned split = group + i * kGroups;
    first[i] = split < splits ? output_of(split) : make_float4(0, 0, 0, 0);
  }
  const double sink = call.sinks != nullptr ? call.sinks[row % call.args.num_heads] : -HUGE_VAL;
  const float bias = call.score_bias != nullptr ? call.score_bias[row] : 0.0f;
  bool is_usable = isfinite(bias);
#pragma unroll
  for (unsigned j = threadIdx.x; j < kHeadDim; j += kThreads) {
    is_usable = isfinite(call.q[row * kHeadDim + j]) && is_usable;
  }

  typename State::Max largest = State::kLowest;
#pragma unroll
  for (unsigned i = 0; i < kStates; ++i) {
    if (lane + i * kWarp < splits) largest = fmax(largest, states[i].largest());
  }
  largest = warp_max(largest);
  float sum = 0.0f;
#pragma unroll
  for (unsigned i = 0; i < kStates; ++i) {
    if (lane + i * kWarp >= splits) continue;
    const float weight = states[i].weight(largest);
    if (warp == i) weights[lane + i * kWarp] = weight;
    sum += weight;
  }
  sum = warp_sum(sum);
  __syncthreads();

  float4 value = make_float4(0, 0, 0, 0);
#pragma unroll
  for (unsigned i = 0; i < kMostOfThread; ++i) {
    if (group + i * kGroups < splits) value = multiply_add(weights[group + i * kGroups], first[i], value);
  }
#pragma unroll 4
  for (unsigned split = group + kMostOfThread * kGroups; split < splits; split += kGroups) {
    value = multiply_add(weights[split], output_of(split), value);
  }
  group_sums[group][column] = value;
  if (__syncthreads_and(is_usable) == 0) {
    if (threadIdx.x == 0) atomicMin(call.status, static_cast<std::uint32_t>(row));
    return;
  }

  // Where no key is seen and there is no sink, the sum is 0, and so is the output.
  float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  double max = 0.0, total = sum;
  if (call.sinks != nullptr || call.lse != nullptr) {
    // Without a softcap the bias is the same for all keys, and the group kernel leaves it out.
    const double left_out = State::kUnit != 1.0 && call.args.softcap == 0.0f ? bias : 0.0;
    if (sum != 0.0f) max = largest * State::kUnit + left_out;
    if (sink != -HUGE_VAL) {
      const double of_keys = sum == 0.0f ? -HUGE_VAL : max;
      max = fmax(of_keys, sink);
      const float factor = expf(static_cast<float>(of_keys - max));
      total = sum * factor + expf(static_cast<float>(sink - max));
      inverse = factor / static_cast<float>(total);
    }
  }
  for (unsigned j = threadIdx.x; j < kHeadDim; j += kThreads) {
    float coordinate = 0.0f;
#pragma unroll
    for (unsigned i = 0; i < kGroups; ++i) coordinate += reinterpret_cast<const float*>(group_sums[i])[j];
    merged[j] = coordinate * inverse;
  }
  __syncthreads();

  float* output = call.output + row * kHeadDim;
  if (!call.unrotate) {
    for (unsigned j = threadIdx.x; j < kHeadDim; j += kThreads) output[j] = merged[j];
  } else if (warp == 0) {
    Row<kHeadDim> result;
    result.load(merged, lane);
    result.unrotate(lane, signs);
    result.store(output, lane);
  }
  if (call.lse != nullptr && threadIdx.x == 0) call.lse[row] = static_cast<float>(max + log(total));
}

unsigned threads_of(const AttendCall& call) {
  for (const unsigned threads : kThreadsChoices) {
    if (call.args.nwg * (call.args.head_dim / 4) <= threads * kMostOfThread) return threads;
  }
  return kThreadsChoices[2];
}

template <class State, unsigned kHeadDim>
void launch_merge(const AttendCall& call, const Launch& sizes, cudaStream_t stream) {
  switch (sizes.block.x) {
    case kThreadsChoices[0]:
      return launch_overlapping(merge_kernel<State, kHeadDim, kThreadsChoices[0]>, sizes, stream, call);
    case kThreadsChoices[1]:
      return launch_overlapping(merge_kernel<State, kHeadDim, kThreadsChoices[1]>, sizes, stream, call);
    default:
      launch_overlapping(merge_kernel<State, kHeadDim, kThreadsChoices[2]>, sizes, stream, call);
  }
}

}  // namespace

Launch merge_launch(const AttendCall& call) {
  return {{call.args.num_queries * call.args.num_heads}, {threads_of(call)}};
}

void launch_merge(const AttendCall& call, cudaStream_t stream) {
  const Launch sizes = merge_launch(call);
  with_head_dim(call.args.head_dim, [&](auto head_dim) {
    constexpr unsigned kHeadDim = decltype(head_dim)::value;
    if (call.is_group) {
      launch_merge<GroupState, kHeadDim>(call, sizes, stream);
    } else {
      launch_merge<HeadState, kHeadDim>(call, sizes, stream);
    }
  });
}

}  // namespace tq_hb
