// Split-K decode attention that decodes each K and V row once for a tile of the query heads sharing it.
//
// Grid:        (head tiles, KV heads, splits) threadgroups of (32, 2 * stripes, 1) threads.
// Work:        a split is a run of blocks of 32 visible keys. The first half of the SIMD groups scores a block
//              while the second half adds up the values of the block before it; each owns one 128-wide stripe of
//              the row, and lane t coordinates 4t ... 4t + 3 of that, for every head of the tile.
// Loads:       16 bytes per lane, four rows per load: lane t takes 16 codes of row t % 4, and four lanes then
//              trade words so that each has its own four coordinates of all four rows.
// Registers:   a lane's `tile` float4 hold the queries in one half and the accumulators in the other.
// Threadgroup: attend_layout.h.
// Out:         o[split][head][D], then (sum, maximum)[split][head].
//
// Works in the rotated domain throughout. Scores, sums and accumulators are float32.

#include "core/abi.h"
#include "metal/kernels/attend_common.h"
#include "metal/kernels/attend_layout.h"

/// A tile of query heads of one KV head.
struct HeadTile {
  uint first;  // query head
  uint count;  // real heads; the rest of the tile is padding
};

/// One side of the cache as one SIMD group sees it: its KV head, its stripe.
struct StripeCodes {
  device const uchar* codes;  // slot 0 of the KV head, at the lane's 16 bytes
  LevelTable table;
};

/// Turns four words per lane by 90 degrees inside each quad of lanes: lane t gets word t % 4 of each.
inline void transpose_quad(thread uint (&words)[4], ushort lane) {
  for (ushort mask = 1; mask < 4; mask *= 2) {
    const bool upper = (lane & mask) != 0;
    for (ushort i = 0; i < 4; ++i) {
      if ((i & mask) != 0) continue;
      const uint received = simd_shuffle_xor(upper ? words[i] : words[i + mask], mask);
      words[i] = upper ? received : words[i];
      words[i + mask] = upper ? words[i + mask] : received;
    }
  }
}

/// The codes of keys first_key ... first_key + 3 of the block at the lane's coordinates; 0 for keys beyond `count`.
template <int D>
inline void load_codes(StripeCodes side, VisibleKeys keys, uint first, uint count, ushort first_key, ushort lane,
                       thread uint (&words)[4]) {
  const ushort key = first_key + lane % 4;
  uint4 loaded = uint4(0);
  if (key < count) loaded = *(device const uint4*)(side.codes + ulong(keys.slot(first + key)) * D);
  for (ushort i = 0; i < 4; ++i) words[i] = loaded[i];
  transpose_quad(words, lane);
}

/// Partial dot products of a block's keys with the tile's queries over one stripe, as [head][key].
template <int D, int kTile>
inline void score_stripe(thread const float4 (&q)[kTile], StripeCodes side, VisibleKeys keys, uint first, uint count,
                         threadgroup float* scores, ushort lane) {
  // At most 16 sums at a time, which keeps the registers few.
  constexpr ushort kSums = kTile * 4 < 16 ? kTile * 4 : 16;
  constexpr ushort kKeys = kSums / kTile;
  for (ushort step = 0; step < 32; step += 4) {
    if (step >= count) break;
    uint words[4];
    load_codes<D>(side, keys, first, count, step, lane, words);
    for (ushort k = 0; k < 4; k += kKeys) {
      float sums[kSums];
      for (ushort i = 0; i < kKeys; ++i) {
        const float4 key = side.table.decode(words[k + i]);
        for (ushort h = 0; h < kTile; ++h) sums[i * kTile + h] = dot(q[h], key);
      }
      const float sum = simd_sum_scatter<kSums>(sums, lane);
      if (lane < kSums) scores[lane % kTile * tq_hb::kScoresStride + step + k + lane / kTile] = sum;
    }
  }
}

/// Running softmax of a tile over the keys of one split. The sums are the lane's own keys'.
template <int kTile>
struct TileState {
  float sum[kTile];
  float maximum[kTile];
};

/// Folds a scored block into the running softmax and the stripe's accumulators.
template <int D, int kTile>
inline void add_stripe(thread float4 (&out)[kTile], thread TileState<kTile>& state, StripeCodes side, VisibleKeys keys,
                       uint first, uint count, threadgroup const float* scores, threadgroup const float* norms,
                       threadgroup const float* exponents, constant TqFlashAttnVecArgs& args, uint stripe,
                       ushort lane) {
  constexpr uint kNormBlocks = D / 256;
  const bool has_key = lane < count;
  const float to_value = row_scale<D>(args);
  const float v_factor = has_key ? norms[(kNormBlocks + stripe / 2) * 32 + lane] * to_value : 0.0f;
  float weights[kTile];
  for (ushort h = 0; h < kTile; ++h) {
    float product = 0.0f;
    for (uint b = 0; b < kNormBlocks && has_key; ++b) {
      threadgroup const float* halves = scores + (2 * b * kTile + h) * tq_hb::kScoresStride + lane;
      product += (halves[0] + halves[kTile * tq_hb::kScoresStride]) * (norms[b * 32 + lane] * to_value);
    }
    const ScoreScale scale = score_scale(args, int(exponents[h]));
    const float score = has_key ? scale.apply(product) : kNoScore;
    const float maximum = max(state.maximum[h], simd_max(score));
    const float decay = exp(state.maximum[h] - maximum);
    const float weight = has_key ? exp(score - maximum) : 0.0f;
    state.sum[h] = state.sum[h] * decay + weight;
    state.maximum[h] = maximum;
    out[h] *= decay;
    weights[h] = weight * v_factor;
  }
  for (ushort step = 0; step < 32; step += 4) {
    if (step >= count) break;
    uint words[4];
    load_codes<D>(side, keys, first, count, step, lane, words);
    for (ushort k = 0; k < 4; ++k) {
      const float4 value = side.table.decode(words[k]);
      for (ushort h = 0; h < kTile; ++h) out[h] += simd_broadcast(weights[h], ushort(step + k)) * value;
    }
  }
}

/// Copies the norms of a block's keys to threadgroup memory: the half of the row that this stripe begins.
template <int D>
inline void stage_norms(device const float* k_norms, device const float* v_norms, ulong first_row, VisibleKeys keys,
                        uint first, uint count, threadgroup float* norms, uint stripe, ushort lane) {
  constexpr uint kNormBlocks = D / 256;
  if (stripe % 2 != 0 || lane >= count) return;
  const uint b = stripe / 2;
  const ulong at = (first_row + keys.slot(first + lane)) * kNormBlocks + b;
  norms[b * 32 + lane] = k_norms[at];
  norms[(kNormBlocks + b) * 32 + lane] = v_norms[at];
}

/// Puts the tile's queries into threadgroup memory, [head][D]; exponents[h] is NaN where a query is not finite.
template <int D, int kTile>
inline void stage_queries(device const float* q, HeadTile tile, bool rotated, threadgroup float* staged,
                          threadgroup float* exponents, uint simdgroup, ushort lane) {
  for (uint h = simdgroup; h < kTile; h += tq_hb::group_simdgroups(D)) {
    if (h < tile.count) {
      stage_query<D>(q + ulong(tile.first + h) * D, rotated, staged + h * D, exponents + h, lane);
      continue;
    }
    for (int i = 0; i < D / 32; ++i) staged[h * D + 32 * i + lane] = 0.0f;
    if (lane == 0) exponents[h] = 0.0f;
  }
}

template <int D, int kTile>
kernel void flash_attn_vec_tq_hb_gqa(
    constant TqFlashAttnVecArgs& args [[buffer(TQ_ATTEND_ARGS)]], device const float* q [[buffer(TQ_ATTEND_Q)]],
    device const uchar* k_packed [[buffer(TQ_ATTEND_K_PACKED)]],
    device const float* k_norms [[buffer(TQ_ATTEND_K_NORMS)]],
    device const uchar* v_packed [[buffer(TQ_ATTEND_V_PACKED)]],
    device const float* v_norms [[buffer(TQ_ATTEND_V_NORMS)]], device float* dst [[buffer(TQ_ATTEND_DST)]],
    threadgroup float* shared [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]]) {
  constexpr uint kStripes = D / 128;
  const uint heads_per_group = args.num_heads / args.num_kv_heads;
  const uint kv_head = group.y;
  const uint split = group.z;
  const HeadTile tile = {kv_head * heads_per_group + group.x * kTile,
                         min(uint(kTile), heads_per_group - group.x * kTile)};
  const bool scores_keys = simdgroup < kStripes;
  const uint stripe = simdgroup % kStripes;

  threadgroup float* exponents = shared;
  threadgroup float* working = shared + TQ_GQA_MAX_TILE;
  stage_queries<D, kTile>(q, tile, args.fuse_fwht_pre == 0, working, exponents, simdgroup, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float4 own[kTile];  // queries or accumulators
  for (ushort h = 0; h < kTile; ++h) {
    own[h] = scores_keys ? ((threadgroup const float4*)(working + h * D))[stripe * 32 + lane] : float4(0.0f);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const uint thread_index = simdgroup * 32 + lane;
  const uint k_copies = tq_hb::table_copies(k_cbits());
  const uint v_copies = tq_hb::table_copies(v_cbits());
  threadgroup float* k_table = working;
  threadgroup float* v_table = k_cbits() == v_cbits() ? k_table : k_table + (k_copies << k_cbits());
  fill_table(k_table, codebook_levels(args.codebook, k_cbits()), k_cbits(), k_copies, thread_index, 64 * kStripes);
  if (k_cbits() != v_cbits()) {
    fill_table(v_table, codebook_levels(args.codebook, v_cbits()), v_cbits(), v_copies, thread_index, 64 * kStripes);
  }
  threadgroup float* scores = working + tq_hb::group_tables_words(k_cbits(), v_cbits());
  threadgroup float* norms = scores + 2 * tq_hb::group_scores_words(D, kTile);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const ulong first_row = ulong(kv_head) * args.kv_capacity;
  StripeCodes side;
  side.codes = (scores_keys ? k_packed : v_packed) + first_row * D + stripe * 128 + lane / 4 * 16;
  side.table =
      scores_keys ? level_table(k_table, k_cbits(), k_copies, lane) : level_table(v_table, v_cbits(), v_copies, lane);
  TileState<kTile> state;
  for (ushort h = 0; h < kTile; ++h) {
    state.sum[h] = 0.0f;
    state.maximum[h] = kNoScore;
  }

  const VisibleKeys keys = visible_keys(args);
  const uint blocks = keys.count / 32 + (keys.count % 32 != 0);
  const uint blocks_per_split = blocks / args.nwg + (blocks % args.nwg != 0);
  const ulong begin = ulong(split) * blocks_per_split;
  const ulong end = min(begin + blocks_per_split, ulong(blocks));
  for (ulong block = begin; block <= end; ++block) {
    if (scores_keys && block < end) {
      const uint first = uint(block) * 32;
      const uint count = min(32u, keys.count - first);
      const uint buffer = block % 2;
      stage_norms<D>(k_norms, v_norms, first_row, keys, first, count, norms + buffer * tq_hb::group_norms_words(D),
                     stripe, lane);
      score_stripe<D, kTile>(
          own, side, keys, first, count,
          scores + buffer * tq_hb::group_scores_words(D, kTile) + stripe * kTile * tq_hb::kScoresStride, lane);
    } else if (!scores_keys && block > begin) {
      const uint first = uint(block - 1) * 32;
      const uint count = min(32u, keys.count - first);
      const uint buffer = (block - 1) % 2;
      add_stripe<D, kTile>(own, state, side, keys, first, count, scores + buffer * tq_hb::group_scores_words(D, kTile),
                           norms + buffer * tq_hb::group_norms_words(D), exponents, args, stripe, lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (scores_keys) return;

  device float* states = dst + ulong(args.nwg) * args.num_heads * D;
  for (ushort h = 0; h < kTile; ++h) {
    if (h >= tile.count) break;
    const ulong at = ulong(split) * args.num_heads + tile.first + h;
    ((device float4*)(dst + at * D))[stripe * 32 + lane] = own[h];
    const float sum = simd_sum(state.sum[h]);
    if (stripe == 0 && lane == 0) {
      states[2 * at] = isnan(exponents[h]) ? kBadQuery : sum;
      states[2 * at + 1] = state.maximum[h];
    }
  }
}

#define TQ_INSTANTIATE(D, tile)                                                                                    \
  template [[host_name("flash_attn_vec_tq_hb_gqa" #tile "_dk" #D)]] kernel void flash_attn_vec_tq_hb_gqa<D, tile>( \
      constant TqFlashAttnVecArgs&, device const float*, device const uchar*, device const float*,                 \
      device const uchar*, device const float*, device float*, threadgroup float*, uint3, ushort, ushort);
TQ_INSTANTIATE(256, 2)
TQ_INSTANTIATE(256, 4)
TQ_INSTANTIATE(256, 8)
TQ_INSTANTIATE(512, 2)
TQ_INSTANTIATE(512, 4)
TQ_INSTANTIATE(512, 8)
#undef TQ_INSTANTIATE
