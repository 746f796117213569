// Split-K decode attention, one query head per threadgroup row.
//
// Grid:        (1, heads, nwg) threadgroups of (32, nsg, 1) threads.
// Work:        simdgroup (w, s) takes blocks of 32 visible keys: w * nsg + s, then every nwg * nsg-th one.
// Lanes:       lane t owns coordinates 4t ... 4t + 3 of every 128-wide stripe; per key for norms and weights.
// Threadgroup: attend_layout.h.
// Out:         the row itself if the pipeline is direct, else a partial (o[D], sum, maximum) per (head, w), the
//              partials of one float4 side by side.
//
// Works in the rotated domain throughout. Scores, sums and accumulators are float32.

#include "core/abi.h"
#include "metal/kernels/attend_common.h"
#include "metal/kernels/attend_layout.h"

constant bool tq_direct [[function_constant(TQ_CONSTANT_DIRECT)]];

inline bool writes_output() {
  return is_function_constant_defined(tq_direct) ? tq_direct : false;
}

/// Keys whose dot products are summed over the SIMD group together.
enum : ushort { kKeysPerStep = 8 };

/// One simdgroup's running softmax over the keys it has seen.
template <int D>
struct HeadState {
  float4 out[D / 128];
  float sum;  // of the lane's own keys
  float maximum;
};

/// Scores of a block's keys, lane t's being key t's; keys from `count` on have none.
template <int D>
inline float score_block(thread const float4 (&q)[D / 128], device const uchar* packed, float2 factors,
                         LevelTable table, VisibleKeys keys, uint first, uint count, ushort lane) {
  float score = 0.0f;
  for (ushort step = 0; step < 32; step += kKeysPerStep) {
    if (step >= count) break;
    float dots[kKeysPerStep];
    for (ushort k = 0; k < kKeysPerStep; ++k) {
      dots[k] = 0.0f;
      const ushort key = step + k;
      if (key >= count) continue;
      device const uint* codes = (device const uint*)(packed + ulong(keys.slot(first + key)) * D) + lane;
      for (int i = 0; i < D / 128; i += 2) {
        const float part = dot(q[i], table.decode(codes[32 * i])) + dot(q[i + 1], table.decode(codes[32 * (i + 1)]));
        // With two norms the halves of the row weigh differently, so the key's own factors are needed here.
        dots[k] += D == 512 ? part * simd_broadcast(i == 0 ? factors.x : factors.y, key) : part;
      }
    }
    const float total = simd_sum_scatter<kKeysPerStep>(dots, lane);
    if (lane / kKeysPerStep == step / kKeysPerStep) score = total;
  }
  return D == 512 ? score : score * factors.x;
}

/// Adds the block's values, weighted: lane t's weights are key t's, one for each norm block.
template <int D>
inline void add_block(thread float4 (&out)[D / 128], device const uchar* packed, float2 weights, LevelTable table,
                      VisibleKeys keys, uint first, uint count, ushort lane) {
  for (ushort key = 0; key < count; ++key) {
    device const uint* codes = (device const uint*)(packed + ulong(keys.slot(first + key)) * D) + lane;
    const float lower = simd_broadcast(weights.x, key);
    const float upper = D == 512 ? simd_broadcast(weights.y, key) : lower;
    for (int i = 0; i < D / 128; ++i) out[i] += (i < 2 ? lower : upper) * table.decode(codes[32 * i]);
  }
}

/// The norms of one row: the second is the first again where there is one norm.
template <int D>
inline float2 load_norms(device const float* norms, ulong row) {
  return D == 512 ? float2(norms[2 * row], norms[2 * row + 1]) : float2(norms[row]);
}

/// Merges the simdgroups' states, which lie in threadgroup memory, into one for lane's coordinates.
template <int D>
inline HeadState<D> merge_simdgroups(threadgroup const float* states, uint nsg, ushort lane) {
  HeadState<D> merged;
  merged.maximum = kNoScore;
  merged.sum = 0.0f;
  for (int i = 0; i < D / 128; ++i) merged.out[i] = float4(0.0f);
  for (uint s = 0; s < nsg; ++s) {
    merged.maximum = max(merged.maximum, states[s * tq_hb::per_head_state_words(D) + D + 1]);
  }
  for (uint s = 0; s < nsg; ++s) {
    threadgroup const float* state = states + s * tq_hb::per_head_state_words(D);
    const float weight = exp(state[D + 1] - merged.maximum);
    merged.sum += state[D] * weight;
    for (int i = 0; i < D / 128; ++i) merged.out[i] += weight * ((threadgroup const float4*)state)[lane + 32 * i];
  }
  return merged;
}

template <int D>
kernel void flash_attn_vec_tq_hb(
    constant TqFlashAttnVecArgs& args [[buffer(TQ_ATTEND_ARGS)]], device const float* q [[buffer(TQ_ATTEND_Q)]],
    device const uchar* k_packed [[buffer(TQ_ATTEND_K_PACKED)]],
    device const float* k_norms [[buffer(TQ_ATTEND_K_NORMS)]],
    device const uchar* v_packed [[buffer(TQ_ATTEND_V_PACKED)]],
    device const float* v_norms [[buffer(TQ_ATTEND_V_NORMS)]], device float* dst [[buffer(TQ_ATTEND_DST)]],
    device atomic_uint* status [[buffer(TQ_ATTEND_STATUS)]], threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]], ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr int kStripes = D / 128;
  const uint head = group.y;
  const uint workgroup = group.z;
  const uint nsg = args.nsg;
  const uint nwg = args.nwg;
  const ulong kv_head = head / (args.num_heads / args.num_kv_heads);
  threadgroup float* exponent = shared + D;
  threadgroup float* k_table = shared + tq_hb::per_head_query_words(D);
  threadgroup float* v_table = k_cbits() == v_cbits() ? k_table : k_table + (1u << k_cbits());
  threadgroup float* states = k_table + tq_hb::per_head_tables_words(k_cbits(), v_cbits());
  device float* partial_state = dst + ulong(args.num_heads) * D * nwg + (ulong(head) * nwg + workgroup) * 2;

  if (simdgroup == 0) stage_query<D>(q + ulong(head) * D, args.fuse_fwht_pre == 0, shared, exponent, lane);
  const uint thread_index = simdgroup * 32 + lane;
  fill_table(k_table, codebook_levels(args.codebook, k_cbits()), k_cbits(), 1, thread_index, 32 * nsg);
  if (k_cbits() != v_cbits()) {
    fill_table(v_table, codebook_levels(args.codebook, v_cbits()), v_cbits(), 1, thread_index, 32 * nsg);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (isnan(*exponent)) {
    if (simdgroup == 0 && lane == 0) {
      if (writes_output()) {
        atomic_fetch_min_explicit(status, head, memory_order_relaxed);
      } else {
        partial_state[0] = kBadQuery;
      }
    }
    return;
  }

  float4 query[kStripes];
  HeadState<D> state;
  for (int i = 0; i < kStripes; ++i) {
    query[i] = ((threadgroup const float4*)shared)[lane + 32 * i];
    state.out[i] = float4(0.0f);
  }
  state.sum = 0.0f;
  state.maximum = kNoScore;

  const LevelTable k_levels = level_table(k_table, k_cbits(), 1, lane);
  const LevelTable v_levels = level_table(v_table, v_cbits(), 1, lane);
  const ScoreScale scale = score_scale(args, int(*exponent));
  const VisibleKeys keys = visible_keys(args);
  const float to_value = row_scale<D>(args);
  const ulong first_row = kv_head * args.kv_capacity;
  const uint blocks = keys.count / 32 + (keys.count % 32 != 0);
  for (ulong block = ulong(workgroup) * nsg + simdgroup; block < blocks; block += nwg * nsg) {
    const uint first = uint(block) * 32;
    const uint count = min(32u, keys.count - first);
    const bool has_key = lane < count;
    const ulong row = first_row + (has_key ? keys.slot(first + lane) : 0);
    const float2 k_factors = has_key ? load_norms<D>(k_norms, row) * to_value : float2(0.0f);
    const float2 v_factors = has_key ? load_norms<D>(v_norms, row) * to_value : float2(0.0f);

    const float product =
        score_block<D>(query, k_packed + first_row * D, k_factors, k_levels, keys, first, count, lane);
    const float score = has_key ? scale.apply(product) : kNoScore;
    const float maximum = max(state.maximum, simd_max(score));
    const float decay = exp(state.maximum - maximum);
    const float weight = has_key ? exp(score - maximum) : 0.0f;
    state.sum = state.sum * decay + weight;
    state.maximum = maximum;
    for (int i = 0; i < kStripes; ++i) state.out[i] *= decay;
    add_block<D>(state.out, v_packed + first_row * D, weight * v_factors, v_levels, keys, first, count, lane);
  }
  state.sum = simd_sum(state.sum);

  if (nsg > 1) {
    threadgroup float* mine = states + simdgroup * tq_hb::per_head_state_words(D);
    for (int i = 0; i < kStripes; ++i) ((threadgroup float4*)mine)[lane + 32 * i] = state.out[i];
    if (lane == 0) {
      mine[D] = state.sum;
      mine[D + 1] = state.maximum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup > 0) return;
    state = merge_simdgroups<D>(states, nsg, lane);
  }

  if (writes_output()) {
    const float inverse = state.sum == 0.0f ? 0.0f : 1.0f / state.sum;
    device float4* out = (device float4*)dst + ulong(head) * (D / 4);
    for (int i = 0; i < kStripes; ++i) out[lane + 32 * i] = state.out[i] * inverse;
    return;
  }
  device float4* out = (device float4*)dst + ulong(head) * (D / 4) * nwg + workgroup;
  for (int i = 0; i < kStripes; ++i) out[(lane + 32 * i) * nwg] = state.out[i];
  if (lane == 0) {
    partial_state[0] = state.sum;
    partial_state[1] = state.maximum;
  }
}

#define TQ_INSTANTIATE(D)                                                                                              \
  template [[host_name("flash_attn_vec_tq_hb_dk" #D)]] kernel void flash_attn_vec_tq_hb<D>(                            \
      constant TqFlashAttnVecArgs&, device const float*, device const uchar*, device const float*,                     \
      device const uchar*, device const float*, device float*, device atomic_uint*, threadgroup float*, uint3, ushort, \
      ushort);
TQ_INSTANTIATE(256)
TQ_INSTANTIATE(512)
#undef TQ_INSTANTIATE
