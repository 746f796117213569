// What an instruction set implements for appending: the codec's encoder over several rows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tq_hb {

struct Codebook;

/// Rows of one call of an encoder, at most.
constexpr std::size_t kEncodeRows = 16;

/// The positive boundaries of a codebook, whose negative ones are the same, in the order of a binary search: node 1 is
/// the root, and below node n are 2n and 2n + 1.
///
/// They are kept as the integers that their bits are, which have the same order, less 1. So a value is above a node if
/// the integer of its magnitude is, less 1 for a positive one: a tie goes towards zero there, away from it elsewhere.
struct SearchTree {
  alignas(64) std::int32_t nodes[128];
};

struct EncodeTask {
  const float* src;  ///< [rows][head_dim]
  std::size_t rows;
  std::size_t head_dim;
  float scale_factor_d512;
  const Codebook* codebook;  ///< read by the portable encoder alone
  const SearchTree* tree;    ///< the same, for the others
  unsigned cbits;
  std::uint8_t* const* codes;  ///< [rows]: where a row's codes go, one byte each
  float* const* norms;         ///< [rows]
};

/// Encodes rows as encode_row does, to the same bytes. Of a row that it would refuse nothing is written, and its bit of
/// the result is set.
using EncodeRows = std::uint32_t(const EncodeTask& task) noexcept;

EncodeRows encode_rows_portable;
#if defined(TQ_HB_HAVE_X86_KERNELS)
EncodeRows encode_rows_avx2, encode_rows_avx512;
#elif defined(TQ_HB_HAVE_NEON_KERNELS)
EncodeRows encode_rows_neon;
#endif

}  // namespace tq_hb
