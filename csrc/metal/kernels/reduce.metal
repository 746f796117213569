// Merges the partials of flash_attn_vec_tq_hb_dk* over its workgroups, and un-rotates the row if asked.
//
// Grid:        (heads, 1, 1) threadgroups of (32 * nwg, 1, 1) threads.
// Work:        lane w stands for workgroup w; simdgroup s takes float4 s of the row, then every nwg-th one.
// Threadgroup: the row, for the un-rotation alone.

#include "core/abi.h"
#include "metal/kernels/attend_common.h"
#include "metal/kernels/rotation.h"

template <int D>
inline void reduce_head(device const float* tmp, device float* output, uint num_heads, uint nwg,
                        device atomic_uint* status, threadgroup float* row, uint head, ushort simdgroup, ushort lane) {
  device const float* states = tmp + ulong(num_heads) * D * nwg + ulong(head) * nwg * 2;
  const bool takes_part = lane < nwg;
  const float sum = takes_part ? states[2 * lane] : 0.0f;
  if (simd_any(sum == kBadQuery)) {
    if (simdgroup == 0 && lane == 0) atomic_fetch_min_explicit(status, head, memory_order_relaxed);
    return;
  }
  const float maximum = takes_part ? states[2 * lane + 1] : kNoScore;
  const float weight = exp(maximum - simd_max(maximum));
  const float total = simd_sum(sum * weight);
  const float scaled = total == 0.0f ? 0.0f : weight / total;

  device const float4* partials = (device const float4*)tmp + ulong(head) * (D / 4) * nwg;
  device float4* out = (device float4*)output + ulong(head) * (D / 4);
  for (uint i = simdgroup; i < D / 4; i += nwg) {
    const float4 merged = simd_sum(takes_part ? partials[i * nwg + lane] * scaled : float4(0.0f));
    if (lane > 0) continue;
    if (row == nullptr) {
      out[i] = merged;
    } else {
      ((threadgroup float4*)row)[i] = merged;
    }
  }
  if (row == nullptr) return;

  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup > 0) return;
  constexpr int E = D / 32;
  float y[E];
  for (int i = 0; i < E; ++i) y[i] = row[lane * E + i];
  unrotate_row<E>(y, lane);
  store_row<E>(output + ulong(head) * D, lane, y);
}

template <int D>
kernel void flash_attn_vec_reduce(
    constant uint& num_heads [[buffer(TQ_REDUCE_NUM_HEADS)]], device const float* tmp [[buffer(TQ_REDUCE_TMP)]],
    device float* output [[buffer(TQ_REDUCE_OUTPUT)]], constant uint& nwg [[buffer(TQ_REDUCE_SPLITS)]],
    device atomic_uint* status [[buffer(TQ_REDUCE_STATUS)]], uint head [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]]) {
  reduce_head<D>(tmp, output, num_heads, nwg, status, nullptr, head, simdgroup, lane);
}

template <int D>
kernel void flash_attn_vec_reduce_undo(
    constant uint& num_heads [[buffer(TQ_REDUCE_NUM_HEADS)]], device const float* tmp [[buffer(TQ_REDUCE_TMP)]],
    device float* output [[buffer(TQ_REDUCE_OUTPUT)]], constant uint& nwg [[buffer(TQ_REDUCE_SPLITS)]],
    device atomic_uint* status [[buffer(TQ_REDUCE_STATUS)]], threadgroup float* row [[threadgroup(0)]],
    uint head [[threadgroup_position_in_grid]], ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  reduce_head<D>(tmp, output, num_heads, nwg, status, row, head, simdgroup, lane);
}

#define TQ_INSTANTIATE(D)                                                                                             \
  template [[host_name("flash_attn_vec_reduce_dk" #D)]] kernel void flash_attn_vec_reduce<D>(                         \
      constant uint&, device const float*, device float*, constant uint&, device atomic_uint*, uint, ushort, ushort); \
  template [[host_name("flash_attn_vec_reduce_tq_hb_undo_dk" #D)]] kernel void flash_attn_vec_reduce_undo<D>(         \
      constant uint&, device const float*, device float*, constant uint&, device atomic_uint*, threadgroup float*,    \
      uint, ushort, ushort);
TQ_INSTANTIATE(256)
TQ_INSTANTIATE(512)
#undef TQ_INSTANTIATE
