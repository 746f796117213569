// Merges the partials of flash_attn_vec_tq_hb_dk* over its workgroups, and un-rotates the row if asked.
//
// Grid:        (rows of q, 1, 1) threadgroups of (32 * nwg, 1, 1) threads.
// Work:        lane w stands for workgroup w; simdgroup s takes float4 s of the row, then every nwg-th one.
// Threadgroup: the row, for the un-rotation alone.

#include "core/abi.h"
#include "metal/kernels/attend_common.h"
#include "metal/kernels/rotation.h"
#include "metal/kernels/slots.h"

/// Merges into the output or, if it un-rotates, into `merged_row` first.
template <int D, bool kUndo>
inline void reduce_row(constant TqFlashAttnVecArgs& args, device const float* tmp, device float* output,
                       device const float* sinks, device const float* score_bias, device float* lse,
                       device atomic_uint* status, device const float* q, threadgroup float* merged_row, uint row,
                       ushort simdgroup, ushort lane) {
  const uint nwg = args.nwg;
  device const float* states = tmp + num_rows(args) * D * nwg + ulong(row) * nwg * 2;
  const bool takes_part = lane < nwg;
  constexpr int E = D / 32;
  float y[E];
  const float exponent = load_query<D>(args, q, score_bias, row, lane, y);
  if (isnan(exponent)) {
    if (simdgroup == 0 && lane == 0) atomic_fetch_min_explicit(status, row, memory_order_relaxed);
    return;
  }
  const ScoreScale scale = score_scale(args, exponent, 0.0f);
  const float sum = takes_part ? states[2 * lane] : 0.0f;
  const float own_maximum = takes_part ? states[2 * lane + 1] : kNoScore;
  const float maximum = simd_max(own_maximum);
  const float weight = scale.weight(own_maximum, maximum);
  const RowTotal total = row_total(args, sinks, score_bias, scale, row, maximum, simd_sum(sum * weight));
  const float scaled = weight * total.keys;
  if (simdgroup == 0 && lane == 0 && (args.flags & TQ_HAS_LSE) != 0) lse[row] = total.lse;

  device const float4* partials = (device const float4*)tmp + ulong(row) * (D / 4) * nwg;
  device float4* out = (device float4*)output + ulong(row) * (D / 4);
  for (uint i = simdgroup; i < D / 4; i += nwg) {
    const float4 merged = simd_sum(takes_part ? partials[i * nwg + lane] * scaled : float4(0.0f));
    if (lane > 0) continue;
    if (kUndo) {
      ((threadgroup float4*)merged_row)[i] = merged;
    } else {
      out[i] = merged;
    }
  }
  if (!kUndo) return;

  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup > 0) return;
  for (int i = 0; i < E; ++i) y[i] = merged_row[lane * E + i];
  unrotate_row<E>(y, lane);
  store_row<E>(output + ulong(row) * D, lane, y);
}

template <int D>
kernel void flash_attn_vec_reduce(
    constant TqFlashAttnVecArgs& args [[buffer(TQ_REDUCE_ARGS)]], device const float* tmp [[buffer(TQ_REDUCE_TMP)]],
    device float* output [[buffer(TQ_REDUCE_OUTPUT)]], device const float* sinks [[buffer(TQ_REDUCE_SINKS)]],
    device const float* score_bias [[buffer(TQ_REDUCE_SCORE_BIAS)]], device float* lse [[buffer(TQ_REDUCE_LSE)]],
    device atomic_uint* status [[buffer(TQ_REDUCE_STATUS)]], device const float* q [[buffer(TQ_REDUCE_Q)]],
    uint row [[threadgroup_position_in_grid]], ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  reduce_row<D, false>(args, tmp, output, sinks, score_bias, lse, status, q, nullptr, row, simdgroup, lane);
}

template <int D>
kernel void flash_attn_vec_reduce_undo(
    constant TqFlashAttnVecArgs& args [[buffer(TQ_REDUCE_ARGS)]], device const float* tmp [[buffer(TQ_REDUCE_TMP)]],
    device float* output [[buffer(TQ_REDUCE_OUTPUT)]], device const float* sinks [[buffer(TQ_REDUCE_SINKS)]],
    device const float* score_bias [[buffer(TQ_REDUCE_SCORE_BIAS)]], device float* lse [[buffer(TQ_REDUCE_LSE)]],
    device atomic_uint* status [[buffer(TQ_REDUCE_STATUS)]], device const float* q [[buffer(TQ_REDUCE_Q)]],
    threadgroup float* merged_row [[threadgroup(0)]], uint row [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]]) {
  reduce_row<D, true>(args, tmp, output, sinks, score_bias, lse, status, q, merged_row, row, simdgroup, lane);
}

#define TQ_INSTANTIATE(D)                                                                                         \
  template [[host_name("flash_attn_vec_reduce_dk" #D)]] kernel void flash_attn_vec_reduce<D>(                     \
      constant TqFlashAttnVecArgs&, device const float*, device float*, device const float*, device const float*, \
      device float*, device atomic_uint*, device const float*, uint, ushort, ushort);                             \
  template [[host_name("flash_attn_vec_reduce_tq_hb_undo_dk" #D)]] kernel void flash_attn_vec_reduce_undo<D>(     \
      constant TqFlashAttnVecArgs&, device const float*, device float*, device const float*, device const float*, \
      device float*, device atomic_uint*, device const float*, threadgroup float*, uint, ushort, ushort);
TQ_HB_FOR_EACH_HEAD_DIM(TQ_INSTANTIATE)
#undef TQ_INSTANTIATE
