// Split-K decode attention, one query head per threadgroup row.
//
// Grid:        (queries, heads, nwg) threadgroups of (32, nsg, 1) threads.
// Work:        simdgroup (w, s) takes blocks of 32 visible keys: w * nsg + s, then every nwg * nsg-th one.
// Lanes:       lane t owns four coordinates of every 128-wide stripe (packing.h); per key for norms and weights.
//              Rows of 64 take half the lanes, and each half takes half of the block's keys.
// Loads:       twice two bytes per lane, row and stripe; lanes that share bytes of the high plane all load them.
// Threadgroup: attend_layout.h.
// Out:         the row itself if the pipeline is direct, else a partial (o[D], sum, maximum) per (row of q, w), the
//              partials of one float4 side by side.
//
// Works in the rotated domain throughout. Scores, sums and accumulators are float32.

#include "core/abi.h"
#include "metal/kernels/attend_common.h"
#include "metal/kernels/attend_layout.h"
#include "metal/kernels/packing.h"
#include "metal/kernels/slots.h"

constant bool tq_direct [[function_constant(TQ_CONSTANT_DIRECT)]];

inline bool writes_output() {
  return is_function_constant_defined(tq_direct) ? tq_direct : false;
}

/// Keys whose dot products are summed over the lanes of a row together.
enum : ushort { kKeysPerStep = 8 };

/// One simdgroup's running softmax over the keys it has seen.
template <int D>
struct HeadState {
  float4 out[tq_hb::stripes(D)];
  float sum;  // of the lane's own keys
  float maximum;
};

/// Scores of a block's keys, lane t's being key t's; keys from `count` on have none.
template <int D>
inline float score_block(thread const float4 (&q)[tq_hb::stripes(D)], device const uchar* packed, float2 factors,
                         LevelTable table, VisibleKeys keys, uint first, uint count, ushort lane) {
  constexpr ushort kLanes = tq_hb::stripe_lanes(D);
  constexpr uint kNormStripes = tq_hb::stripes_per_norm(D);
  constexpr bool kHasTwoNorms = tq_hb::norm_blocks(D) == 2;
  const ushort stripe_lane = lane % kLanes;
  float score = 0.0f;
  for (ushort step = 0; step < kLanes; step += kKeysPerStep) {
    if (step >= count) break;
    float dots[kKeysPerStep];
    for (ushort k = 0; k < kKeysPerStep; ++k) {
      dots[k] = 0.0f;
      const ushort key = lane - stripe_lane + step + k;
      if (key >= count) continue;
      device const uchar* codes = packed + keys.slot(first + key) * ulong(row_bytes(D, k_cbits()));
      for (uint b = 0; b < tq_hb::norm_blocks(D); ++b) {
        float part = 0.0f;
        for (uint s = b * kNormStripes; s < (b + 1) * kNormStripes; ++s) {
          part += dot(q[s], table.decode(load_codes<D>(codes, k_cbits(), s, stripe_lane)));
        }
        // With two norms the halves of the row weigh differently, so the key's own factors are needed here.
        dots[k] += kHasTwoNorms ? part * simd_broadcast(b == 0 ? factors.x : factors.y, key) : part;
      }
    }
    const float total = simd_sum_scatter<kKeysPerStep, kLanes>(dots, lane);
    if (stripe_lane / kKeysPerStep == step / kKeysPerStep) score = total;
  }
  return kHasTwoNorms ? score : score * factors.x;
}

/// Adds the block's values, weighted: lane t's weights are key t's, one for each norm block.
template <int D>
inline void add_block(thread float4 (&out)[tq_hb::stripes(D)], device const uchar* packed, float2 weights,
                      LevelTable table, VisibleKeys keys, uint first, uint count, ushort lane) {
  constexpr ushort kLanes = tq_hb::stripe_lanes(D);
  const ushort stripe_lane = lane % kLanes;
  for (ushort k = 0; k < kLanes; ++k) {
    if (k >= count) break;
    const ushort key = lane - stripe_lane + k;
    const float lower = simd_shuffle(weights.x, key);
    const float upper = tq_hb::norm_blocks(D) == 2 ? simd_shuffle(weights.y, key) : lower;
    if (key >= count) continue;
    device const uchar* codes = packed + keys.slot(first + key) * ulong(row_bytes(D, v_cbits()));
    for (uint s = 0; s < tq_hb::stripes(D); ++s) {
      const float weight = s < tq_hb::stripes_per_norm(D) ? lower : upper;
      out[s] += weight * table.decode(load_codes<D>(codes, v_cbits(), s, stripe_lane));
    }
  }
}

/// The norms of one row: the second is the first again where there is one norm.
template <int D>
inline float2 load_norms(device const float* norms, ulong row) {
  return tq_hb::norm_blocks(D) == 2 ? float2(norms[2 * row], norms[2 * row + 1]) : float2(norms[row]);
}

/// Merges the simdgroups' states, which lie in threadgroup memory, into one for lane's coordinates.
template <int D>
inline HeadState<D> merge_simdgroups(threadgroup const float* states, ScoreScale scale, uint nsg, ushort stripe_lane) {
  constexpr uint kLanes = tq_hb::stripe_lanes(D);
  HeadState<D> merged;
  merged.maximum = kNoScore;
  merged.sum = 0.0f;
  for (uint i = 0; i < tq_hb::stripes(D); ++i) merged.out[i] = float4(0.0f);
  for (uint s = 0; s < nsg; ++s) {
    merged.maximum = max(merged.maximum, states[s * tq_hb::per_head_state_words(D) + D + 1]);
  }
  for (uint s = 0; s < nsg; ++s) {
    threadgroup const float* state = states + s * tq_hb::per_head_state_words(D);
    const float weight = scale.weight(state[D + 1], merged.maximum);
    merged.sum += state[D] * weight;
    for (uint i = 0; i < tq_hb::stripes(D); ++i) {
      merged.out[i] += weight * ((threadgroup const float4*)state)[stripe_lane + kLanes * i];
    }
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
    device atomic_uint* status [[buffer(TQ_ATTEND_STATUS)]],
    device const float* score_bias [[buffer(TQ_ATTEND_SCORE_BIAS)]], threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]], ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr uint kStripes = tq_hb::stripes(D);
  constexpr uint kLanes = tq_hb::stripe_lanes(D);
  const ushort stripe_lane = lane % kLanes;
  const uint query = group.x;
  const uint head = group.y;
  const uint workgroup = group.z;
  const uint nsg = args.nsg;
  const uint nwg = args.nwg;
  const ulong row = ulong(query) * args.num_heads + head;
  const ulong kv_head = head / (args.num_heads / args.num_kv_heads);
  threadgroup QueryRow* about = (threadgroup QueryRow*)(shared + D);
  threadgroup float* k_table = shared + tq_hb::per_head_query_words(D);
  threadgroup float* v_table = k_cbits() == v_cbits() ? k_table : k_table + (1u << k_cbits());
  threadgroup float* states = k_table + tq_hb::per_head_tables_words(k_cbits(), v_cbits());
  device float* partial_state = dst + num_rows(args) * D * nwg + (row * nwg + workgroup) * 2;

  if (simdgroup == 0) stage_query<D>(args, q, score_bias, query, head, shared, about, lane);
  const uint thread_index = simdgroup * 32 + lane;
  fill_table(k_table, codebook_levels(args.codebook, k_cbits()), k_cbits(), 1, thread_index, 32 * nsg);
  if (k_cbits() != v_cbits()) {
    fill_table(v_table, codebook_levels(args.codebook, v_cbits()), v_cbits(), 1, thread_index, 32 * nsg);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (isnan(about->exponent)) {
    // Where partials are merged, the merge reports the row.
    if (writes_output() && simdgroup == 0 && lane == 0) {
      atomic_fetch_min_explicit(status, uint(row), memory_order_relaxed);
    }
    return;
  }

  float4 own_query[kStripes];
  HeadState<D> state;
  for (uint i = 0; i < kStripes; ++i) {
    own_query[i] = load_own<D>(shared, i, stripe_lane);
    state.out[i] = float4(0.0f);
  }
  state.sum = 0.0f;
  state.maximum = kNoScore;

  const LevelTable k_levels = level_table(k_table, k_cbits(), 1, lane);
  const LevelTable v_levels = level_table(v_table, v_cbits(), 1, lane);
  const ScoreScale scale = score_scale(args, about->exponent, about->bias);
  const VisibleKeys keys = visible_keys(args, about->begin, about->end);
  const float to_value = row_scale<D>(args);
  const ulong first_row = kv_head * args.kv_capacity;
  device const uchar* k_rows = k_packed + first_row * row_bytes(D, k_cbits());
  device const uchar* v_rows = v_packed + first_row * row_bytes(D, v_cbits());
  const uint blocks = keys.count / 32 + (keys.count % 32 != 0);
  for (ulong block = ulong(workgroup) * nsg + simdgroup; block < blocks; block += nwg * nsg) {
    const uint first = uint(block) * 32;
    const uint count = min(32u, keys.count - first);
    const bool has_key = lane < count;
    const ulong key_row = first_row + (has_key ? keys.slot(first + lane) : 0);
    const float2 k_factors = has_key ? load_norms<D>(k_norms, key_row) * to_value : float2(0.0f);
    const float2 v_factors = has_key ? load_norms<D>(v_norms, key_row) * (to_value * kValueHeadroom) : float2(0.0f);

    const float product = score_block<D>(own_query, k_rows, k_factors, k_levels, keys, first, count, lane);
    const float score = has_key ? scale.apply(product) : kNoScore;
    const float maximum = max(state.maximum, simd_max(score));
    const float decay = scale.weight(state.maximum, maximum);
    const float weight = has_key ? scale.weight(score, maximum) : 0.0f;
    state.sum = state.sum * decay + weight;
    state.maximum = maximum;
    for (uint i = 0; i < kStripes; ++i) state.out[i] *= decay;
    add_block<D>(state.out, v_rows, weight * v_factors, v_levels, keys, first, count, lane);
  }
  state.sum = simd_sum(state.sum);
  for (uint i = 0; i < kStripes; ++i) state.out[i] = sum_over_rows<D>(state.out[i]);

  if (nsg > 1) {
    threadgroup float* mine = states + simdgroup * tq_hb::per_head_state_words(D);
    for (uint i = 0; i < kStripes && lane < kLanes; ++i) {
      ((threadgroup float4*)mine)[stripe_lane + kLanes * i] = state.out[i];
    }
    if (lane == 0) {
      mine[D] = state.sum;
      mine[D + 1] = state.maximum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup > 0) return;
    state = merge_simdgroups<D>(states, scale, nsg, stripe_lane);
  }

  if (lane >= kLanes) return;
  if (writes_output()) {
    const float inverse = state.sum == 0.0f ? 0.0f : 1.0f / (state.sum * kValueHeadroom);
    device float4* out = (device float4*)dst + row * (D / 4);
    for (uint i = 0; i < kStripes; ++i) store_own<D>(out, 1, i, stripe_lane, state.out[i] * inverse);
    return;
  }
  device float4* out = (device float4*)dst + row * (D / 4) * nwg + workgroup;
  for (uint i = 0; i < kStripes; ++i) store_own<D>(out, nwg, i, stripe_lane, state.out[i]);
  if (lane == 0) {
    partial_state[0] = state.sum;
    partial_state[1] = state.maximum;
  }
}

#define TQ_INSTANTIATE(D)                                                                                \
  template [[host_name("flash_attn_vec_tq_hb_dk" #D)]] kernel void flash_attn_vec_tq_hb<D>(              \
      constant TqFlashAttnVecArgs&, device const float*, device const uchar*, device const float*,       \
      device const uchar*, device const float*, device float*, device atomic_uint*, device const float*, \
      threadgroup float*, uint3, ushort, ushort);
TQ_HB_FOR_EACH_HEAD_DIM(TQ_INSTANTIATE)
#undef TQ_INSTANTIATE
