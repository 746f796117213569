// Merges the partials of flash_attn_vec_tq_hb_gqa* over any number of splits, and un-rotates the row if asked.
//
// Grid:        (heads, 1, 1) threadgroups of (256, 1, 1) threads.
// Work:        thread s weighs split s, then thread t sums coordinate t, then the first SIMD group un-rotates.
// Threadgroup: attend_layout.h.

#include "core/abi.h"
#include "metal/kernels/attend_common.h"
#include "metal/kernels/attend_layout.h"
#include "metal/kernels/rotation.h"

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
    constant uint& num_heads [[buffer(TQ_REDUCE_NUM_HEADS)]], device const float* tmp [[buffer(TQ_REDUCE_TMP)]],
    device float* output [[buffer(TQ_REDUCE_OUTPUT)]], constant uint& splits [[buffer(TQ_REDUCE_SPLITS)]],
    device atomic_uint* status [[buffer(TQ_REDUCE_STATUS)]], threadgroup float* shared [[threadgroup(0)]],
    uint head [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup float* weights = shared;
  threadgroup float* row = weights + TQ_GQA_MAX_SPLITS;
  threadgroup float* words = row + D;

  device const float* states = tmp + ulong(splits) * num_heads * D;
  const bool takes_part = thread_index < splits;
  const ulong at = ulong(thread_index) * num_heads + head;
  const float sum = takes_part ? states[2 * at] : 0.0f;
  const float is_bad = threadgroup_max(sum == kBadQuery ? 1.0f : 0.0f, words, simdgroup, lane);
  if (is_bad > 0.0f) {
    if (thread_index == 0) atomic_fetch_min_explicit(status, head, memory_order_relaxed);
    return;
  }
  const float own_maximum = takes_part ? states[2 * at + 1] : kNoScore;
  const float maximum = threadgroup_max(own_maximum, words + tq_hb::kMergeSimdgroups, simdgroup, lane);
  const float weight = takes_part ? exp(own_maximum - maximum) : 0.0f;
  weights[thread_index] = weight;
  const float total = threadgroup_sum(sum * weight, words + 2 * tq_hb::kMergeSimdgroups, simdgroup, lane);
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;

  for (uint d = thread_index; d < D; d += 32 * tq_hb::kMergeSimdgroups) {
    float merged = 0.0f;
    for (uint s = 0; s < splits; ++s) merged += weights[s] * tmp[(ulong(s) * num_heads + head) * D + d];
    if (kUndo) {
      row[d] = merged * inverse;
    } else {
      output[ulong(head) * D + d] = merged * inverse;
    }
  }
  if (!kUndo) return;

  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup > 0) return;
  constexpr int E = D / 32;
  float y[E];
  for (int i = 0; i < E; ++i) y[i] = row[lane * E + i];
  unrotate_row<E>(y, lane);
  store_row<E>(output + ulong(head) * D, lane, y);
}

#define TQ_INSTANTIATE(name, D, undo)                                                                              \
  template [[host_name(name #D)]] kernel void flash_attn_vec_merge_tq_hb<D, undo>(                                 \
      constant uint&, device const float*, device float*, constant uint&, device atomic_uint*, threadgroup float*, \
      uint, uint, ushort, ushort);
TQ_INSTANTIATE("flash_attn_vec_merge_tq_hb_dk", 256, false)
TQ_INSTANTIATE("flash_attn_vec_merge_tq_hb_dk", 512, false)
TQ_INSTANTIATE("flash_attn_vec_merge_tq_hb_undo_dk", 256, true)
TQ_INSTANTIATE("flash_attn_vec_merge_tq_hb_undo_dk", 512, true)
#undef TQ_INSTANTIATE
