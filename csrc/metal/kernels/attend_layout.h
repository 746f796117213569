// How the attention kernels divide their threadgroup memory. Read by the host, which has to reserve it.
//
// Sizes count 4-byte words.
#pragma once

#include "core/abi.h"
#include "metal/kernels/row_shape.h"

namespace tq_hb {

// Enumerators, since a variable out here would have to name an address space in MSL, which C++ lacks.
enum : TqU32 {
  kBlock = TQ_BLOCK,
  /// Words between the scores of one row and the next: odd, so that writing a key's scores of all rows and reading
  /// a row's scores of all keys both spread over the memory banks.
  kScoresStride = kBlock + 1,
  /// What a threadgroup knows about a row of q: QueryRow in attend_common.h.
  kQueryRowWords = 4,
  /// SIMD groups of the merge kernel.
  kMergeSimdgroups = 8,
};

/// Copies of a table in the group kernel: lanes that look up different levels at once then rarely meet in one
/// memory bank. 8 KiB per table at most.
constexpr TqU32 table_copies(TqU32 cbits) {
  return (2048u >> cbits) < 32u ? 2048u >> cbits : 32u;
}

/// K's and V's tables; one serves both where the widths agree.
constexpr TqU32 tables_words(TqU32 k_words, TqU32 v_words, bool same) {
  return same ? k_words : k_words + v_words;
}

// --- flash_attn_vec_tq_hb_dk*: q and its QueryRow, tables, then each SIMD group's accumulator, sum and maximum ---

constexpr TqU32 per_head_query_words(TqU32 head_dim) {
  return head_dim + kQueryRowWords;
}

constexpr TqU32 per_head_tables_words(TqU32 k_cbits, TqU32 v_cbits) {
  return tables_words(1u << k_cbits, 1u << v_cbits, k_cbits == v_cbits);
}

constexpr TqU32 per_head_state_words(TqU32 head_dim) {
  return head_dim + 4;  // padded to 16 bytes
}

constexpr TqU32 per_head_threadgroup_bytes(TqU32 head_dim, TqU32 nsg, TqU32 k_cbits, TqU32 v_cbits) {
  return 4 * (per_head_query_words(head_dim) + per_head_tables_words(k_cbits, v_cbits) +
              nsg * per_head_state_words(head_dim));
}

// --- flash_attn_vec_tq_hb_gqa*: a QueryRow per row of the tile, then the staged queries, which make way for tables,
//     two buffers of partial scores [stripe][row][key], and two of norms [K | V][norm block][key] ----------------

constexpr TqU32 group_simdgroups(TqU32 head_dim) {
  return 2 * stripes(head_dim);
}

constexpr TqU32 group_tables_words(TqU32 k_cbits, TqU32 v_cbits) {
  return tables_words(table_copies(k_cbits) << k_cbits, table_copies(v_cbits) << v_cbits, k_cbits == v_cbits);
}

constexpr TqU32 group_scores_words(TqU32 head_dim, TqU32 tile) {
  return stripes(head_dim) * tile * kScoresStride;
}

constexpr TqU32 group_norms_words(TqU32 head_dim) {
  return 2 * norm_blocks(head_dim) * kBlock;
}

constexpr TqU32 group_working_words(TqU32 head_dim, TqU32 tile, TqU32 k_cbits, TqU32 v_cbits) {
  return group_tables_words(k_cbits, v_cbits) + 2 * (group_scores_words(head_dim, tile) + group_norms_words(head_dim));
}

constexpr TqU32 group_threadgroup_bytes(TqU32 head_dim, TqU32 tile, TqU32 k_cbits, TqU32 v_cbits) {
  return 4 *
         (TQ_GQA_MAX_TILE * kQueryRowWords + (tile * head_dim > group_working_words(head_dim, tile, k_cbits, v_cbits)
                                                  ? tile * head_dim
                                                  : group_working_words(head_dim, tile, k_cbits, v_cbits)));
}

#define TQ_CHECK(head_dim)                                                               \
  static_assert(group_threadgroup_bytes(head_dim, TQ_GQA_MAX_TILE, 8, 6) <= 32768 &&     \
                    group_threadgroup_bytes(head_dim, TQ_GQA_MAX_TILE, 6, 8) <= 32768 && \
                    per_head_threadgroup_bytes(head_dim, 4, 8, 6) <= 32768,              \
                "a threadgroup has 32 KiB");
TQ_HB_FOR_EACH_HEAD_DIM(TQ_CHECK)
#undef TQ_CHECK

// --- flash_attn_vec_merge_tq_hb*: a weight per split, the merged row, and one word per SIMD group for each of
//     two reductions ------------------------------------------------------------------------------------------

constexpr TqU32 merge_threadgroup_bytes(TqU32 head_dim) {
  return 4 * (TQ_GQA_MAX_SPLITS + head_dim + 2 * kMergeSimdgroups);
}

static_assert(32 * kMergeSimdgroups == TQ_GQA_MAX_SPLITS, "a thread weighs one split");

}  // namespace tq_hb
