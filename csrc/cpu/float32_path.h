// Attention in float32: the strict path, and the only one where 16-bit products are no faster.
//
// A decoder says how codes become levels: decode(side, tile, rows) puts those of a tile's rows into `rows`, in an order
// of its own within a row, in which task.q is too, and order(out, count) puts outputs in the order of coordinates.
#pragma once

#include "cpu/flash.h"

namespace tq_hb {
namespace {

/// Joins the nibble plane and the high plane of a row to codes of a byte each, four to a word: see core/packing.h.
///
/// A word of a plane holds, at each shift, four consecutive codes, in the order of its bytes.
template <std::size_t kHeadDim, unsigned kHighBits>
inline void join_planes(const std::uint8_t* row, std::uint32_t* codes) noexcept {
  constexpr std::size_t kBlock = kHeadDim < kPlaneBlock ? kHeadDim : kPlaneBlock;
  constexpr std::size_t kLowWords = kBlock * kNibbleBits / 32;
  constexpr std::size_t kHighWords = kBlock * kHighBits / 32;
  constexpr std::uint32_t kEveryByte = 0x01010101u;
  constexpr std::uint32_t kLowMask = kEveryByte * ((1u << kNibbleBits) - 1);
  constexpr std::uint32_t kHighMask = kEveryByte * ((1u << kHighBits) - 1);
  for (std::size_t first = 0; first < kHeadDim; first += kBlock) {
    std::uint32_t low[kLowWords], high[kHighWords];
    __builtin_memcpy(low, row + first * kNibbleBits / 8, sizeof(low));
    __builtin_memcpy(high, row + kHeadDim * kNibbleBits / 8 + first * kHighBits / 8, sizeof(high));
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
template <std::size_t kHeadDim>
inline void look_up(const std::uint8_t* codes, const float* levels, float* row) noexcept {
  for (std::size_t j = 0; j < kHeadDim; j += 8) {
    const std::uint64_t eight = load_as<std::uint64_t>(codes + j);
    for (std::size_t i = 0; i < 8; ++i) row[j + i] = levels[(eight >> (8 * i)) & 0xff];
  }
}

template <std::size_t kHeadDim, unsigned kHighBits>
void decode_planes(const HeadRows& side, const Tile& tile, float* rows) noexcept {
  for (std::size_t t = 0; t < tile.count; ++t) {
    std::uint32_t codes[kHeadDim / 4];
    join_planes<kHeadDim, kHighBits>(row_of(side, tile.slots[t]), codes);
    look_up<kHeadDim>(reinterpret_cast<const std::uint8_t*>(codes), side.levels->levels, rows + t * kHeadDim);
  }
}

/// One level at a time, in the order of coordinates.
template <std::size_t kHeadDim>
struct ScalarDecoder {
  static void decode(const HeadRows& side, const Tile& tile, float* rows) noexcept {
    switch (side.high_bits) {
      case 1:
        return decode_planes<kHeadDim, 1>(side, tile, rows);
      case 2:
        return decode_planes<kHeadDim, 2>(side, tile, rows);
      default:
        for (std::size_t t = 0; t < tile.count; ++t) {
          look_up<kHeadDim>(row_of(side, tile.slots[t]), side.levels->levels, rows + t * kHeadDim);
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
    for (std::size_t k = 0; k < kKeys; ++k) key[k] = load(keys + (first + k) * kHeadDim + i);
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
    const TileRows values = rows_of<kTile>(task_.v, tile);
    for (std::size_t t = 0; t < tile.count; ++t) values.prefetch(t);
    Decoder::decode(task_.k, tile, rows_);
    const Norms norms(task_.k, tile);
    for_each_group<kSharingRows>(task_.rows,
                                 [&](auto rows, std::size_t r) { score_rows<decltype(rows)::value>(tile, norms, r); });
  }

  void accumulate(const Tile& tile) noexcept {
    const TileRows keys = keys_after<kTile>(task_, tile);
    for (std::size_t t = 0; t < kTile; ++t) keys.prefetch(t);
    Decoder::decode(task_.v, tile, rows_);
    const Norms norms(task_.v, tile);
    for_each_group<kSharingRows>(
        task_.rows, [&](auto rows, std::size_t r) { accumulate_rows<decltype(rows)::value>(tile, norms, r); });
  }

  void finish() noexcept { Decoder::order(task_.out, task_.rows * kHeadDim); }

 private:
  static constexpr std::size_t kBlocks = kNormBlocks<kHeadDim>;
  using Norms = TileNorms<kTile, kBlocks>;

  /// Scaled scores of kRows rows from `r` on; those of keys that a row does not see mean nothing, nor do keys beyond
  /// the tile's last, of which there is what an earlier tile left.
  template <std::size_t kRows>
  void score_rows(const Tile& tile, const Norms& norms, std::size_t r) noexcept {
    constexpr std::size_t kKeys = kSums / kRows;
    for (std::size_t b = 0; b < kBlocks; ++b) {
      const std::size_t at = b * kBlockDim<kHeadDim>;
      const float* q = task_.q + r * kHeadDim + at;
      for (std::size_t t = 0; t < tile.count; t += kKeys) {
        score_block<kHeadDim, kRows, kKeys>(q, rows_ + at, norms.of_block[b], b == 0, task_.scratch + r, t);
      }
    }
    for (std::size_t i = 0; i < kRows; ++i) {
      for (std::size_t t = 0; t < kTile; ++t) task_.scratch[r + i].scores[t] *= task_.q_scale[r + i];
    }
  }

  /// Adds weights * values to the outputs of kRows rows from `r` on, some columns in registers at a time.
  template <std::size_t kRows>
  void accumulate_rows(const Tile& tile, const Norms& norms, std::size_t r) noexcept {
    constexpr std::size_t kColumns = 4;  // vectors
    constexpr std::size_t kDim = kBlockDim<kHeadDim>;
    static_assert(kDim % (kColumns * kLanes) == 0);
    float* out = task_.out + r * kHeadDim;
    for (std::size_t b = 0; b < kBlocks; ++b) {
      alignas(64) float factors[kRows][kTile];
      for (std::size_t i = 0; i < kRows; ++i) {
        for (std::size_t t = 0; t < kTile; t += kLanes) {
          const Vec norm = load(norms.of_block[b] + t) * task_.v_scale;
          store(factors[i] + t, load(task_.scratch[r + i].weights + t) * norm);
        }
        // 0 times a norm that is not finite is no 0.
        const Span seen = seen_of(task_.seen[r + i], tile);
        if (seen.begin > 0 || seen.end < kTile) {
          fill_outside<kTile>(factors[i], seen.begin < seen.end ? seen : Span{kTile, kTile}, 0.0f);
        }
      }
      for (std::size_t j = b * kDim; j < (b + 1) * kDim; j += kColumns * kLanes) {
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
            const Vec value = load(rows_ + t * kHeadDim + j + c * kLanes);
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
  }

  const AttendTask& task_;
  alignas(64) float rows_[kTile * kHeadDim];  // K's or V's, as levels
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
