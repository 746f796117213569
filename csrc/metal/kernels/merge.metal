// Merges the partials of flash_attn_vec_tq_hb_gqa* over any number of splits, and un-rotates the row if asked.
//
// Grid:        (rows of q, 1, 1) threadgroups of (256, 1, 1) threads.
// Work:        thread s weighs split s, then thread t sums coordinate t, then the first SIMD group un-rotates.
// Threadgroup: attend_layout.h.

#include "core/abi.h"
#include "metal/kernels/attend_common.h"
#include "metal/kernels/attend_layout.h"
#include "metal/kernels/rotation.h"
#include "metal/kernels/slots.h"

/// The maximum of one value per thread, in every thread. `words` holds one word for each SIMD group.
inline float threadgroup_max(float value, threadgroup float* words, ushort simdgroup, ushort lane) {
  const float own = simd_max(value);
  if (lane == 0) words[simdgroup] = own;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float result = words[0];
  for (uint s = 1; s < tq_hb::kMergeSimdgroups; ++s) result = max(result, words[s]);
  return result;
}

inline float threadgroup_sum(float value, threadgroup float* words, ushort simdgroup, ushort lane) {
  const float own = simd_sum(value);
  if (lane == 0) words[simdgroup] = own;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float result = words[0];
  for (uint s = 1; s < tq_hb::kMergeSimdgroups; ++s) result += words[s];
  return result;
}

template <int D, bool kUndo>
kernel void flash_attn_vec_merge_tq_hb(
    constant TqFlashAttnVecArgs& args [[buffer(TQ_REDUCE_ARGS)]], device const float* tmp [[buffer(TQ_REDUCE_TMP)]],
    device float* output [[buffer(TQ_REDUCE_OUTPUT)]], device const float* sinks [[buffer(TQ_REDUCE_SINKS)]],
    device const float* score_bias [[buffer(TQ_REDUCE_SCORE_BIAS)]], device float* lse [[buffer(TQ_REDUCE_LSE)]],
    device atomic_uint* status [[buffer(TQ_REDUCE_STATUS)]], device const float* q [[buffer(TQ_REDUCE_Q)]],
    threadgroup float* shared [[threadgroup(0)]], uint row [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]], ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup float* weights = shared;
  threadgroup float* merged_row = weights + TQ_GQA_MAX_SPLITS;
  threadgroup float* words = merged_row + D;

  const uint splits = args.nwg;
  device const float* states = tmp + splits * num_rows(args) * D;
  const bool takes_part = thread_index < splits;
  const ulong at = thread_index * num_rows(args) + row;
  const float sum = takes_part ? states[2 * at] : 0.0f;
  constexpr int E = D / 32;
  float y[E];
  const float exponent = load_query<D>(args, q, score_bias, row, lane, y);
  if (isnan(exponent)) {
    if (thread_index == 0) atomic_fetch_min_explicit(status, row, memory_order_relaxed);
    return;
  }
  const ScoreScale scale = score_scale(args, exponent, 0.0f);
  const float own_maximum = takes_part ? states[2 * at + 1] : kNoScore;
  const float maximum = threadgroup_max(own_maximum, words, simdgroup, lane);
  const float weight = takes_part ? scale.weight(own_maximum, maximum) : 0.0f;
  weights[thread_index] = weight;
  const float keys_sum = threadgroup_sum(sum * weight, words + tq_hb::kMergeSimdgroups, simdgroup, lane);
  const RowTotal total = row_total(args, sinks, score_bias, scale, row, maximum, keys_sum);
  if (thread_index == 0 && (args.flags & TQ_HAS_LSE) != 0) lse[row] = total.lse;

  for (uint d = thread_index; d < D; d += 32 * tq_hb::kMergeSimdgroups) {
    float merged = 0.0f;
    for (uint s = 0; s < splits; ++s) merged += weights[s] * tmp[(s * num_rows(args) + row) * D + d];
    if (kUndo) {
      merged_row[d] = merged * total.keys;
    } else {
      output[ulong(row) * D + d] = merged * total.keys;
    }
  }
  if (!kUndo) return;

  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup > 0) return;
  for (int i = 0; i < E; ++i) y[i] = merged_row[lane * E + i];
  unrotate_row<E>(y, lane);
  store_row<E>(output + ulong(row) * D, lane, y);
}

#define TQ_INSTANTIATE_ONE(name, D, undo)                                                                         \
  template [[host_name(name #D)]] kernel void flash_attn_vec_merge_tq_hb<D, undo>(                                \
      constant TqFlashAttnVecArgs&, device const float*, device float*, device const float*, device const float*, \
      device float*, device atomic_uint*, device const float*, threadgroup float*, uint, uint, ushort, ushort);
#define TQ_INSTANTIATE(D)                                       \
  TQ_INSTANTIATE_ONE("flash_attn_vec_merge_tq_hb_dk", D, false) \
  TQ_INSTANTIATE_ONE("flash_attn_vec_merge_tq_hb_undo_dk", D, true)
TQ_HB_FOR_EACH_HEAD_DIM(TQ_INSTANTIATE)
#undef TQ_INSTANTIATE
#undef TQ_INSTANTIATE_ONE
