// Split-K decode attention that decodes each K and V row once for a tile of the rows of q that share it.
//
// Grid:        (tiles, KV heads, splits) threadgroups of (32, 2 * stripes, 1) threads.
// Work:        the rows of a tile are heads of the KV head's group, query by query. A split is a run of blocks of 32
//              keys that a row of the tile sees. The first half of the SIMD groups scores a block while the second
//              half adds up the values of the block before it; each owns one stripe of the row, and lane t four
//              coordinates of that (packing.h), for every row of the tile. Rows of 64 take half the lanes, and each
//              half takes half of the block's keys.
// Loads:       each byte once: lane t loads twice 8 bytes of row t % 4, less of a high plane, and four lanes then trade
//              so that each has its own four coordinates of all four rows.
// Registers:   a lane's `tile` float4 hold the queries in one half and the accumulators in the other.
// Threadgroup: attend_layout.h.
// Out:         o[split][row of q][D], then (sum, maximum)[split][row of q].
//
// Works in the rotated domain throughout. Scores, sums and accumulators are float32.

#include "core/abi.h"
#include "metal/kernels/attend_common.h"
#include "metal/kernels/attend_layout.h"
#include "metal/kernels/packing.h"
#include "metal/kernels/slots.h"

/// Some consecutive rows of those that share a KV head.
struct RowTile {
  uint first;
  uint count;            // the rest of the tile is padding
  uint first_head;       // of the KV head's
  uint heads_per_group;  // of each query

  uint query(uint i) const { return (first + i) / heads_per_group; }
  uint head(uint i) const { return first_head + (first + i) % heads_per_group; }
};

/// One side of the cache as one SIMD group sees it.
struct StripeCodes {
  device const uchar* rows;  // of the KV head
  LevelTable table;
  uint stripe;
};

/// Turns four pairs of bytes by 90 degrees inside each quad of lanes: lane t gets pair t % 4 of each.
inline ushort4 transpose_quad(ushort4 pairs, ushort lane) {
  const bool is_odd = (lane & 1) != 0;
  const ushort2 neighbours = simd_shuffle_xor(is_odd ? pairs.xz : pairs.yw, 1);
  const ushort2 from_even = is_odd ? neighbours : pairs.xz;
  const ushort2 from_odd = is_odd ? pairs.yw : neighbours;
  const bool is_upper = (lane & 2) != 0;
  const ushort2 kept = is_upper ? ushort2(from_even.y, from_odd.y) : ushort2(from_even.x, from_odd.x);
  const ushort2 sent = is_upper ? ushort2(from_even.x, from_odd.x) : ushort2(from_even.y, from_odd.y);
  const ushort2 received = simd_shuffle_xor(sent, 2);
  return is_upper ? ushort4(received, kept) : ushort4(kept, received);
}

/// The codes of keys first_key ... first_key + 3 of the block at the lane's coordinates; those of keys beyond `count`
/// mean nothing.
template <int D>
inline void load_keys(StripeCodes side, VisibleKeys keys, uint first, uint count, ushort first_key, ushort lane,
                      uint cbits, thread CodePairs (&codes)[4]) {
  const ushort stripe_lane = lane % tq_hb::stripe_lanes(D);
  const ushort part = stripe_lane / 4;  // of the row, whose lanes t % 4 have one key each
  const PairPlaces at = pair_places<D>(cbits, side.stripe, stripe_lane);
  const ushort key = first_key + lane % 4;
  device const uchar* row = side.rows + keys.slot(first + key) * ulong(row_bytes(D, cbits));
  uint2 firsts = uint2(0);
  uint2 seconds = uint2(0);
  if (key < count) firsts = ((device const uint2*)(row + at.first))[part];
  if (has_planes(cbits)) {
    // The high plane has no more words than the row has parts, and each part needs two of them.
    const ushort words = at.second_bytes / 4;
    uint loaded = 0;
    if (key < count && part < words) loaded = ((device const uint*)(row + at.second))[part];
    for (ushort i = 0; i < 2; ++i) {
      const ushort owner = (part * 2 + i) % words * 4 + lane % 4;
      seconds[i] = simd_shuffle(loaded, ushort(lane - stripe_lane + owner));
    }
  } else if (key < count) {
    seconds = ((device const uint2*)(row + at.second))[part];
  }
  firsts = as_type<uint2>(transpose_quad(as_type<ushort4>(firsts), lane));
  seconds = as_type<uint2>(transpose_quad(as_type<ushort4>(seconds), lane));
  for (ushort i = 0; i < 2; ++i) {
    codes[2 * i] = join_pairs(firsts[i], seconds[i], at);
    codes[2 * i + 1] = codes[2 * i].of_other_row();
  }
}

/// Partial dot products of a block's keys with the tile's queries over one stripe, as [row][key].
template <int D, int kTile>
inline void score_stripe(thread const float4 (&q)[kTile], StripeCodes side, VisibleKeys keys, uint first, uint count,
                         threadgroup float* scores, ushort lane) {
  constexpr ushort kLanes = tq_hb::stripe_lanes(D);
  // At most 16 sums at a time, which keeps the registers few.
  constexpr ushort kSums = kTile * 4 < 16 ? kTile * 4 : 16;
  constexpr ushort kKeys = kSums / kTile;
  const ushort stripe_lane = lane % kLanes;
  for (ushort step = 0; step < kLanes; step += 4) {
    if (step >= count) break;
    const ushort first_key = lane - stripe_lane + step;
    CodePairs codes[4];
    load_keys<D>(side, keys, first, count, first_key, lane, k_cbits(), codes);
    for (ushort k = 0; k < 4; k += kKeys) {
      float sums[kSums];
      for (ushort i = 0; i < kKeys; ++i) {
        const float4 key = side.table.decode(codes[k + i]);
        for (ushort r = 0; r < kTile; ++r) sums[i * kTile + r] = dot(q[r], key);
      }
      const float sum = simd_sum_scatter<kSums, kLanes>(sums, lane);
      const uint at = stripe_lane % kTile * tq_hb::kScoresStride + first_key + k + stripe_lane / kTile;
      if (stripe_lane < kSums) scores[at] = sum;
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
///
/// What a row does not see it leaves out by selection, since a product with weight 0 may still be NaN.
template <int D, int kTile>
inline void add_stripe(thread float4 (&out)[kTile], thread TileState<kTile>& state, StripeCodes side, VisibleKeys keys,
                       uint first, uint count, threadgroup const float* scores, threadgroup const float* norms,
                       threadgroup const QueryRow* rows, constant TqFlashAttnVecArgs& args, ushort lane) {
  constexpr ushort kLanes = tq_hb::stripe_lanes(D);
  constexpr uint kNormBlocks = tq_hb::norm_blocks(D);
  constexpr uint kNormStripes = tq_hb::stripes_per_norm(D);
  const bool has_key = lane < count;
  const uint age = rows->begin + first + lane;  // the tile's first row sees the oldest key
  const float to_value = row_scale<D>(args);
  const float v_factor =
      has_key ? norms[(kNormBlocks + side.stripe / kNormStripes) * tq_hb::kBlock + lane] * (to_value * kValueHeadroom)
              : 0.0f;
  float weights[kTile];
  for (ushort r = 0; r < kTile; ++r) {
    const bool sees = has_key && age >= rows[r].begin && age < rows[r].end;
    float product = 0.0f;
    for (uint b = 0; b < kNormBlocks && sees; ++b) {
      float part = 0.0f;
      for (uint s = b * kNormStripes; s < (b + 1) * kNormStripes; ++s) {
        part += scores[(s * kTile + r) * tq_hb::kScoresStride + lane];
      }
      product += part * (norms[b * tq_hb::kBlock + lane] * to_value);
    }
    const ScoreScale scale = score_scale(args, rows[r].exponent, rows[r].bias);
    const float score = sees ? scale.apply(product) : kNoScore;
    const float maximum = max(state.maximum[r], simd_max(score));
    const float decay = scale.weight(state.maximum[r], maximum);
    const float weight = sees ? scale.weight(score, maximum) : 0.0f;
    state.sum[r] = state.sum[r] * decay + weight;
    state.maximum[r] = maximum;
    out[r] *= decay;
    weights[r] = sees ? weight * v_factor : 0.0f;
  }
  for (ushort step = 0; step < kLanes; step += 4) {
    if (step >= count) break;
    const ushort first_key = lane - lane % kLanes + step;
    CodePairs codes[4];
    load_keys<D>(side, keys, first, count, first_key, lane, v_cbits(), codes);
    for (ushort k = 0; k < 4; ++k) {
      const float4 value = side.table.decode(codes[k]);
      for (ushort r = 0; r < kTile; ++r) out[r] += simd_shuffle(weights[r], ushort(first_key + k)) * value;
    }
  }
}

/// Copies the norms of a block's keys to threadgroup memory: those of the norm block that this stripe begins.
template <int D>
inline void stage_norms(device const float* k_norms, device const float* v_norms, ulong first_row, VisibleKeys keys,
                        uint first, uint count, threadgroup float* norms, uint stripe, ushort lane) {
  constexpr uint kNormBlocks = tq_hb::norm_blocks(D);
  if (stripe % tq_hb::stripes_per_norm(D) != 0 || lane >= count) return;
  const uint b = stripe / tq_hb::stripes_per_norm(D);
  const ulong at = (first_row + keys.slot(first + lane)) * kNormBlocks + b;
  norms[b * tq_hb::kBlock + lane] = k_norms[at];
  norms[(kNormBlocks + b) * tq_hb::kBlock + lane] = v_norms[at];
}

/// Puts the tile's queries into threadgroup memory, [row][D]. Padding sees no key.
template <int D, int kTile>
inline void stage_queries(constant TqFlashAttnVecArgs& args, device const float* q, device const float* score_bias,
                          RowTile tile, threadgroup float* staged, threadgroup QueryRow* rows, uint simdgroup,
                          ushort lane) {
  for (uint r = simdgroup; r < kTile; r += tq_hb::group_simdgroups(D)) {
    if (r < tile.count) {
      stage_query<D>(args, q, score_bias, tile.query(r), tile.head(r), staged + r * D, rows + r, lane);
      continue;
    }
    for (uint i = lane; i < D; i += 32) staged[r * D + i] = 0.0f;
    if (lane > 0) continue;
    rows[r].exponent = 0.0f;
    rows[r].bias = 0.0f;
    rows[r].begin = 0;
    rows[r].end = 0;
  }
}

template <int D, int kTile>
kernel void flash_attn_vec_tq_hb_gqa(
    constant TqFlashAttnVecArgs& args [[buffer(TQ_ATTEND_ARGS)]], device const float* q [[buffer(TQ_ATTEND_Q)]],
    device const uchar* k_packed [[buffer(TQ_ATTEND_K_PACKED)]],
    device const float* k_norms [[buffer(TQ_ATTEND_K_NORMS)]],
    device const uchar* v_packed [[buffer(TQ_ATTEND_V_PACKED)]],
    device const float* v_norms [[buffer(TQ_ATTEND_V_NORMS)]], device float* dst [[buffer(TQ_ATTEND_DST)]],
    device const float* score_bias [[buffer(TQ_ATTEND_SCORE_BIAS)]], threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]], ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr uint kStripes = tq_hb::stripes(D);
  const ushort stripe_lane = lane % tq_hb::stripe_lanes(D);
  const uint kv_head = group.y;
  const uint split = group.z;
  RowTile tile;
  tile.heads_per_group = args.num_heads / args.num_kv_heads;
  tile.first_head = kv_head * tile.heads_per_group;
  tile.first = group.x * kTile;
  tile.count = min(uint(kTile), args.num_queries * tile.heads_per_group - tile.first);
  const bool scores_keys = simdgroup < kStripes;

  threadgroup QueryRow* rows = (threadgroup QueryRow*)shared;
  threadgroup float* working = shared + TQ_GQA_MAX_TILE * tq_hb::kQueryRowWords;
  stage_queries<D, kTile>(args, q, score_bias, tile, working, rows, simdgroup, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  StripeCodes side;
  side.stripe = simdgroup % kStripes;
  float4 own[kTile];  // queries or accumulators
  for (ushort r = 0; r < kTile; ++r) {
    own[r] = scores_keys ? load_own<D>(working + r * D, side.stripe, stripe_lane) : float4(0.0f);
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
  side.rows =
      scores_keys ? k_packed + first_row * row_bytes(D, k_cbits()) : v_packed + first_row * row_bytes(D, v_cbits());
  side.table =
      scores_keys ? level_table(k_table, k_cbits(), k_copies, lane) : level_table(v_table, v_cbits(), v_copies, lane);
  TileState<kTile> state;
  for (ushort r = 0; r < kTile; ++r) {
    state.sum[r] = 0.0f;
    state.maximum[r] = kNoScore;
  }

  // A later query sees no older key and no fewer of the newest, so these are all that the tile sees.
  const VisibleKeys keys = visible_keys(args, rows[0].begin, rows[tile.count - 1].end);
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
                     side.stripe, lane);
      score_stripe<D, kTile>(
          own, side, keys, first, count,
          scores + buffer * tq_hb::group_scores_words(D, kTile) + side.stripe * kTile * tq_hb::kScoresStride, lane);
    } else if (!scores_keys && block > begin) {
      const uint first = uint(block - 1) * 32;
      const uint count = min(32u, keys.count - first);
      const uint buffer = (block - 1) % 2;
      add_stripe<D, kTile>(own, state, side, keys, first, count, scores + buffer * tq_hb::group_scores_words(D, kTile),
                           norms + buffer * tq_hb::group_norms_words(D), rows, args, lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (scores_keys) return;

  device float* states = dst + num_rows(args) * args.nwg * D;
  for (ushort r = 0; r < kTile; ++r) {
    if (r >= tile.count) break;
    const ulong at = split * num_rows(args) + ulong(tile.query(r)) * args.num_heads + tile.head(r);
    const float4 total = sum_over_rows<D>(own[r]);
    if (lane == stripe_lane) {
      store_own<D>((device float4*)(dst + at * D), 1, side.stripe, stripe_lane, total);
    }
    const float sum = simd_sum(state.sum[r]);
    if (side.stripe == 0 && lane == 0) {
      states[2 * at] = sum;
      states[2 * at + 1] = state.maximum[r];
    }
  }
}

#define TQ_INSTANTIATE_TILE(D, tile)                                                                                   \
  template [[host_name("flash_attn_vec_tq_hb_gqa" #tile "_dk" #D)]] kernel void flash_attn_vec_tq_hb_gqa<D, tile>(     \
      constant TqFlashAttnVecArgs&, device const float*, device const uchar*, device const float*,                     \
      device const uchar*, device const float*, device float*, device const float*, threadgroup float*, uint3, ushort, \
      ushort);
#define TQ_INSTANTIATE(D)   \
  TQ_INSTANTIATE_TILE(D, 2) \
  TQ_INSTANTIATE_TILE(D, 4) \
  TQ_INSTANTIATE_TILE(D, 8)
TQ_HB_FOR_EACH_HEAD_DIM(TQ_INSTANTIATE)
#undef TQ_INSTANTIATE
#undef TQ_INSTANTIATE_TILE
