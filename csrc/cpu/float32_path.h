// Attention in float32: the strict path, and the only one where 16-bit products are no faster.
//
// A decoder says how codes become levels: decode(side, tile, block, rows) puts those of one norm block of a tile's rows
// into `rows`, in an order of its own within the block, in which task.q is too, and order(out, count) puts outputs in
// the order of coordinates.
#pragma once

#include "cpu/flash.h"

namespace tq_hb {
namespace {

/// Joins the nibble plane and the high plane of a row's norm block to codes of a byte each, four to a word: see
/// core/packing.h.
///
/// A word of a plane holds, at each shift, four consecutive codes, in the order of its bytes.
template <std::size_t kHeadDim, unsigned kHighBits>
inline void join_planes(const std::uint8_t* row, std::size_t block, std::uint32_t* codes) noexcept {
  constexpr std::size_t kBlock = kHeadDim < kPlaneBlock ? kHeadDim : kPlaneBlock;
  constexpr std::size_t kLowWords = kBlock * kNibbleBits / 32;
  constexpr std::size_t kHighWords = kBlock * kHighBits / 32;
  constexpr std::uint32_t kEveryByte = 0x01010101u;
  constexpr std::uint32_t kLowMask = kEveryByte * ((1u << kNibbleBits) - 1);
  constexpr std::uint32_t kHighMask = kEveryByte * ((1u << kHighBits) - 1);
  for (std::size_t first = 0; first < kBlockDim<kHeadDim>; first += kBlock) {
    const std::size_t at = block * kBlockDim<kHeadDim> + first;
    std::uint32_t low[kLowWords], high[kHighWords];
    __builtin_memcpy(low, row + at * kNibbleBits / 8, sizeof(low));
    __builtin_memcpy(high, row + kHeadDim * kNibbleBits / 8 + at * kHighBits / 8, sizeof(high));
    for (unsigned field = 0; field < 8 / kHighBits; ++field) {
      const unsigned low_shift = static_cast<unsigned>(field * kHighWords / kLowWords) * kNibbleBits;
      const std::uint32_t* nibbles = low + field * kHighWords % kLowWords;
      std::uint32_t* out = codes + first / 4 + field * kHighWords;
      for (std::size_t w = 0; w < kHighWords; ++w) {
        const std::uint32_t top = (high[w] >> (field * kHighBits)) & kHighMask;
        out[w] = ((nibbles[w] >> low_shift) & kLowMask) | (top << kNibbleBits);
      }
    }
  }
}

/// Eight codes at a time in one word: a level that is stored might else overlay the codes yet to be read.
template <std::size_t kCount>
inline void look_up(const std::uint8_t* codes, const float* levels, float* row) noexcept {
  for (std::size_t j = 0; j < kCount; j += 8) {
    const std::uint64_t eight = load_as<std::uint64_t>(codes + j);
    for (std::size_t i = 0; i < 8; ++i) row[j + i] = levels[(eight >> (8 * i)) & 0xff];
  }
}

template <std::size_t kHeadDim, unsigned kHighBits>
void decode_planes(const HeadRows& side, const Tile& tile, std::size_t block, float* rows) noexcept {
  constexpr std::size_t kDim = kBlockDim<kHeadDim>;
  for (std::size_t t = 0; t < tile.count; ++t) {
    std::uint32_t codes[kDim / 4];
    join_planes<kHeadDim, kHighBits>(row_of(side, tile.slots[t]), block, codes);
    look_up<kDim>(reinterpret_cast<const std::uint8_t*>(codes), side.levels->levels, rows + t * kDim);
  }
}

/// One level at a time, in the order of coordinates.
template <std::size_t kHeadDim>
struct ScalarDecoder {
  static void decode(const HeadRows& side, const Tile& tile, std::size_t block, float* rows) noexcept {
    constexpr std::size_t kDim = kBlockDim<kHeadDim>;
    switch (side.high_bits) {
      case 1:
        return decode_planes<kHeadDim, 1>(side, tile, block, rows);
      case 2:
        return decode_planes<kHeadDim, 2>(side, tile, block, rows);
      default:
        for (std::size_t t = 0; t < tile.count; ++t) {
          look_up<kDim>(row_of(side, tile.slots[t]) + block * kDim, side.levels->levels, rows + t * kDim);
        }
    }
  }
  static void order(float*, std::size_t) noexcept {}
};

// Sums that are in registers at once, of some rows and some keys or columns.
constexpr std::size_t kSums = kRegisters / 2;
constexpr std::size_t kSharingRows = kSums / 4;

/// Scores of kRows rows and of kKeys keys from `first` on over one norm block, not yet scaled: norm * dot(query, key).
/// They are added to those of the block before.
///
/// Each pair has one accumulator, so its bits do not depend on what it shares a block with.
template <std::size_t kHeadDim, std::size_t kRows, std::size_t kKeys>
inline void score_block(const float* q, const float* keys, const float* norms, bool is_first_block, RowScratch* rows,
                        std::size_t first) noexcept {
  Vec sums[kRows * kKeys] = {};
  for (std::size_t i = 0; i < kBlockDim<kHeadDim>; i += kLanes) {
    Vec key[kKeys];
#pragma GCC unroll 16
    for (std::size_t k = 0; k < kKeys; ++k) key[k] = load(keys + (first + k) * kBlockDim<kHeadDim> + i);
#pragma GCC unroll 4
    for (std::size_t r = 0; r < kRows; ++r) {
      const Vec query = load(q + r * kHeadDim + i);
#pragma GCC unroll 16
      for (std::size_t k = 0; k < kKeys; ++k) sums[r * kKeys + k] += query * key[k];
    }
  }
  float totals[kRows * kKeys];
#pragma GCC unroll 4
  for (std::size_t i = 0; i < kRows * kKeys; i += kLanes) store(totals + i, sums_of_lanes(sums + i));
#pragma GCC unroll 4
  for (std::size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (std::size_t k = 0; k < kKeys; k += 4) {
      const Double4 total = __builtin_convertvector(load_as<Float4>(totals + r * kKeys + k), Double4);
      const Double4 share = total * __builtin_convertvector(load_as<Float4>(norms + first + k), Double4);
      double* scores = rows[r].scores + first + k;
      store(scores, is_first_block ? share : load_as<Double4>(scores) + share);
    }
  }
}

template <std::size_t kHeadDim, class Decoder>
class Float32Path {
 public:
  static constexpr std::size_t kTile = 16;

  explicit Float32Path(const AttendTask& task) noexcept : task_(task) {}

  void score(const Tile& tile) noexcept {
    prefetch(codes_from(task_.v, kHeadDim, tile.slots[0]));
    const Norms norms(task_.k, tile);
    for (std::size_t b = 0; b < kBlocks; ++b) {
      Decoder::decode(task_.k, tile, b, rows_);
      for_each_group<kSharingRows>(task_.rows, [&](auto rows, std::size_t r) {
        score_rows<decltype(rows)::value>(tile, norms.of_block[b], b, r);
      });
    }
    for (std::size_t r = 0; r < task_.rows; ++r) {
      double* scores = task_.scratch[r].scores;
      const double scale = task_.q_scale[r];
      for (std::size_t t = 0; t < kTile; t += kDoubles) store(scores + t, load_as<Doubles>(scores + t) * scale);
    }
  }

  void accumulate(const Tile& tile) noexcept {
    prefetch(keys_after<kTile>(task_, tile));
    const Norms norms(task_.v, tile);
    for (std::size_t b = 0; b < kBlocks; ++b) {
      Decoder::decode(task_.v, tile, b, rows_);
      for_each_group<kSharingRows>(task_.rows, [&](auto rows, std::size_t r) {
        accumulate_rows<decltype(rows)::value>(tile, norms.of_block[b], b, r);
      });
    }
  }

  void finish() noexcept { Decoder::order(task_.out, task_.rows * kHeadDim); }

 private:
  static constexpr std::size_t kBlocks = kNormBlocks<kHeadDim>, kDim = kBlockDim<kHeadDim>;
  using Norms = TileNorms<kTile, kBlocks>;

  static void prefetch(UpcomingCodes tile) noexcept {
    for (std::size_t code = 0; code < kTile * kHeadDim; code += kCodesPerRequest) tile.prefetch();
  }

  /// Scores of kRows rows from `r` on and one norm block, not yet scaled; those of keys that a row does not see mean
  /// nothing, nor do keys beyond the tile's last, of which there is what an earlier tile left.
  template <std::size_t kRows>
  void score_rows(const Tile& tile, const float* norms, std::size_t b, std::size_t r) noexcept {
    constexpr std::size_t kKeys = kSums / kRows;
    const float* q = task_.q + r * kHeadDim + b * kDim;
    for (std::size_t t = 0; t < tile.count; t += kKeys) {
      score_block<kHeadDim, kRows, kKeys>(q, rows_, norms, b == 0, task_.scratch + r, t);
    }
  }

  /// Adds weights * values of one norm block to the outputs of kRows rows from `r` on, some columns in registers at a
  /// time.
  template <std::size_t kRows>
  void accumulate_rows(const Tile& tile, const float* norms, std::size_t b, std::size_t r) noexcept {
    constexpr std::size_t kColumns = 4;  // vectors
    static_assert(kDim % (kColumns * kLanes) == 0);
    alignas(64) float factors[kRows][kTile];
    for (std::size_t i = 0; i < kRows; ++i) {
      for (std::size_t t = 0; t < kTile; t += kLanes) {
        const Vec norm = load(norms + t) * task_.v_scale;
        store(factors[i] + t, load(task_.scratch[r + i].weights + t) * norm);
      }
      // 0 times a norm that is not finite is no 0.
      const Span seen = seen_of(task_.seen[r + i], tile);
      if (seen.begin > 0 || seen.end < kTile) {
        fill_outside<kTile>(factors[i], seen.begin < seen.end ? seen : Span{kTile, kTile}, 0.0f);
      }
    }
    float* out = task_.out + r * kHeadDim + b * kDim;
    for (std::size_t j = 0; j < kDim; j += kColumns * kLanes) {
      Vec sums[kRows][kColumns];
#pragma GCC unroll 8
      for (std::size_t i = 0; i < kRows; ++i) {
        const float correction = task_.scratch[r + i].correction;
#pragma GCC unroll 4
        for (std::size_t c = 0; c < kColumns; ++c) {
          sums[i][c] = load(out + i * kHeadDim + j + c * kLanes) * correction;
        }
      }
      for (std::size_t t = 0; t < tile.count; ++t) {
#pragma GCC unroll 4
        for (std::size_t c = 0; c < kColumns; ++c) {
          const Vec value = load(rows_ + t * kDim + j + c * kLanes);
#pragma GCC unroll 8
          for (std::size_t i = 0; i < kRows; ++i) sums[i][c] += factors[i][t] * value;
        }
      }
#pragma GCC unroll 8
      for (std::size_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (std::size_t c = 0; c < kColumns; ++c) store(out + i * kHeadDim + j + c * kLanes, sums[i][c]);
      }
    }
  }

  const AttendTask& task_;
  alignas(64) float rows_[kTile * kDim];  // of a norm block of K or V, as levels
};

template <template <std::size_t> class Decoder>
void attend_in_float32(const AttendTask& task) noexcept {
#define TQ_ATTEND(size) \
  if (task.head_dim == size) return attend_range<Float32Path<size, Decoder<size>>>(task);
  TQ_HB_FOR_EACH_HEAD_DIM(TQ_ATTEND)
#undef TQ_ATTEND
}

}  // namespace
}  // namespace tq_hb
