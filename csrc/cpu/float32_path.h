// Attention in float32: the strict path, and the only one where 16-bit products are no faster.
//
// A decoder says how codes become levels:
//
//   decode(side, rows, count, block, upcoming, levels)
//                       puts one norm block of `count` rows into `levels`, in an order of its own within the block, in
//                       which task.q is too, and asks for as many of the upcoming codes
//   kFusedRows          up to so many rows of queries, levels are multiplied as they are decoded; 0 if they never are
//   kPart               where they are: columns that are worked on in a row of instructions, without a loop
//   visit(side, use)    calls use(reader) if codes of the side's format can be read a chunk at a time, and returns
//                       whether they can: reader.at(row, chunk).vectors are the levels of kReadAtOnce codes, in that
//                       order
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

/// One level at a time, in the order of coordinates.
template <std::size_t kHeadDim>
struct ScalarDecoder {
  static constexpr std::size_t kFusedRows = 0;
  static constexpr std::size_t kDim = kBlockDim<kHeadDim>;

  static void decode(const HeadRows& side, const std::uint8_t* const* rows, std::size_t count, std::size_t block,
                     UpcomingCodes upcoming, float* levels) noexcept {
    for (std::size_t t = 0; t < count; ++t, levels += kDim) {
      for (std::size_t i = 0; i < kDim; i += kCodesPerRequest) upcoming.prefetch();
      switch (side.high_bits) {
        case 1:
          look_up_planes<1>(side, rows[t], block, levels);
          break;
        case 2:
          look_up_planes<2>(side, rows[t], block, levels);
          break;
        default:
          look_up<kDim>(rows[t] + block * kDim, side.levels->levels, levels);
      }
    }
  }

 private:
  template <unsigned kHighBits>
  static void look_up_planes(const HeadRows& side, const std::uint8_t* row, std::size_t block, float* levels) noexcept {
    std::uint32_t codes[kDim / 4];
    join_planes<kHeadDim, kHighBits>(row, block, codes);
    look_up<kDim>(reinterpret_cast<const std::uint8_t*>(codes), side.levels->levels, levels);
  }
};

// Sums that are in registers at once, of some rows and some keys or columns.
constexpr std::size_t kSums = kRegisters / 2;
constexpr std::size_t kSharingRows = kSums / 4;
/// Levels that a reader gives at a time, in four vectors.
constexpr std::size_t kReadAtOnce = 4 * kLanes;

/// Puts dot products of kRows rows with `count` keys, in the places of a block of as many rows, into the scores of a
/// block of `rows` rows, not yet scaled: norm * dot(query, key). They are added to those of the norm block before.
template <std::size_t kRows>
inline void add_scores(const float* dots, const float* norms, std::size_t count, bool is_first_block, std::size_t rows,
                       double* scores) noexcept {
  constexpr std::size_t kTogether = kRows == 1 ? 2 : 4;
  using Products = typename VectorOf<double, kTogether>::type;
  using Floats = typename VectorOf<float, kTogether>::type;
  for (std::size_t k = 0; k < count; k += 2, scores += 2 * rows) {
    const Products pair = __builtin_convertvector(spread_pairs<kRows, Floats>(norms + k), Products);
    for (std::size_t i = 0; i < 2 * kRows; i += kTogether, dots += kTogether) {
      const Products share = __builtin_convertvector(load_as<Floats>(dots), Products) * pair;
      store(scores + i, is_first_block ? share : load_as<Products>(scores + i) + share);
    }
  }
}

template <std::size_t kHeadDim, class Decoder>
class Float32Path {
 public:
  static constexpr std::size_t kTile = kAttendTile;

  explicit Float32Path(const AttendTask& task) noexcept : task_(task), block_rows_(block_rows(task.rows)) {
    for_each_block(
        task, [&](auto rows, RowBlock& block) { spread_rows(rows, task.q_scale + rows.first, block.score_units[0]); });
  }

  void score(const Tile& tile) noexcept {
    const TileRows keys = rows_of<kTile>(task_.k, tile);
    const Norms norms(task_.k, tile);
    const UpcomingCodes upcoming = codes_from(task_.v, kHeadDim, tile.slots[0]);
    for (std::size_t b = 0; b < kBlocks; ++b) {
      const bool fused = visit_fused(task_.k, [&](auto rows, const auto& reader) {
        score_fused<decltype(rows)::value>(reader, keys, tile.count, norms.of_block[b], b, upcoming);
      });
      if (fused) continue;
      decode_in_parts(task_.k, keys, tile.count, b, upcoming, [&](std::size_t first, std::size_t count) {
        for_each_group<kSharingRows>(task_.rows, [&](auto rows, std::size_t r) {
          score_decoded<decltype(rows)::value>(first, count, norms.of_block[b], b, r);
        });
      });
    }
    for_each_block(task_, [&](auto rows, RowBlock& block) {
      for (std::size_t i = 0; i < kTile * rows.kSize; i += kDoubles) {
        const Doubles units = load_as<Doubles>(block.score_units[0] + i % kBlockLanes);
        store(block.scores + i, load_as<Doubles>(block.scores + i) * units);
      }
    });
  }

  void accumulate(const Tile& tile) noexcept {
    const TileRows values = rows_of<kTile>(task_.v, tile);
    const Norms norms(task_.v, tile);
    const UpcomingCodes upcoming = keys_after<kTile>(task_, tile);
    for (std::size_t b = 0; b < kBlocks; ++b) {
      for_each_block(
          task_, [&](auto rows, RowBlock& block) { fill_factors<kTile>(task_, tile, rows, norms.of_block[b], block); });
      const bool fused = visit_fused(task_.v, [&](auto rows, const auto& reader) {
        add_fused<decltype(rows)::value>(reader, values, tile.count, b, upcoming);
      });
      if (fused) continue;
      decode_in_parts(task_.v, values, tile.count, b, upcoming, [&](std::size_t first, std::size_t count) {
        for_each_group<kSharingRows>(
            task_.rows, [&](auto rows, std::size_t r) { add_decoded<decltype(rows)::value>(first, count, b, r); });
      });
    }
  }

 private:
  static constexpr std::size_t kBlocks = kNormBlocks<kHeadDim>, kDim = kBlockDim<kHeadDim>;
  /// Rows that are decoded to memory at a time: they stay in the first cache level.
  static constexpr std::size_t kDecoded = 16;
  using Norms = TileNorms<kTile, kBlocks>;

  /// Calls visit(Count<rows>, reader) if levels are to be multiplied as they are decoded. Returns whether they are.
  template <class Visit>
  bool visit_fused(const HeadRows& side, const Visit& visit) const noexcept {
    if constexpr (Decoder::kFusedRows > 0) {
      // One group has to be all rows, since each decodes anew.
      static_assert(Decoder::kFusedRows <= 4, "which other numbers of rows are no group");
      if (task_.rows > Decoder::kFusedRows || task_.rows == 3) return false;
      return Decoder::visit(side, [&](const auto& reader) {
        for_each_group<Decoder::kFusedRows>(task_.rows, [&](auto rows, std::size_t) { visit(rows, reader); });
      });
    } else {
      return false;
    }
  }

  /// Calls visit(first, count) for some rows of a tile after the other, while levels_ has their levels.
  template <class Visit>
  void decode_in_parts(const HeadRows& side, const TileRows& rows, std::size_t count, std::size_t b,
                       const UpcomingCodes& upcoming, const Visit& visit) noexcept {
    for (std::size_t first = 0; first < count; first += kDecoded) {
      const std::size_t part = count - first < kDecoded ? count - first : kDecoded;
      Decoder::decode(side, rows.at + first, part, b, upcoming.after((b * count + first) * kDim), levels_);
      visit(first, part);
    }
  }

  /// Scores of all rows, of which there are kRows, over one norm block. Those of keys beyond the tile's last mean
  /// nothing.
  ///
  /// A row has one accumulator for a key, as in score_decoded, so its bits do not depend on how many rows there are.
  template <std::size_t kRows, class Reader>
  [[gnu::noinline]] void score_fused(const Reader& reader, const TileRows& keys, std::size_t count, const float* norms,
                                     std::size_t b, UpcomingCodes upcoming) const noexcept {
    constexpr std::size_t kPart = Decoder::kPart;
    const float* q = task_.q + b * kDim;
    upcoming = upcoming.after(b * count * kDim);
    for (std::size_t first = 0; first < count; first += kLanes) {
      Vec sums[kRows * kLanes];
      for (std::size_t t = 0; t < kLanes; t += 2) {
        // Of two keys at a time, so that a sum need not wait for itself.
        const std::uint8_t *even_row = keys.at[first + t], *odd_row = keys.at[first + t + 1];
        Vec pair[kRows][2] = {};
#pragma GCC unroll 1
        for (std::size_t part = 0; part < kDim; part += kPart) {
#pragma GCC unroll 8
          for (std::size_t j = part; j < part + kPart; j += kReadAtOnce) {
            if (2 * j % kCodesPerRequest == 0) {
              for (std::size_t i = 0; i < 2 * kReadAtOnce; i += kCodesPerRequest) upcoming.prefetch();
            }
            const std::size_t chunk = (b * kDim + j) / kReadAtOnce;
            const auto even = reader.at(even_row, chunk), odd = reader.at(odd_row, chunk);
#pragma GCC unroll 4
            for (std::size_t i = 0; i < 4; ++i) {
#pragma GCC unroll 4
              for (std::size_t r = 0; r < kRows; ++r) {
                const Vec query = load(q + r * kHeadDim + j + i * kLanes);
                pair[r][0] += query * even.vectors[i];
                pair[r][1] += query * odd.vectors[i];
              }
            }
          }
        }
#pragma GCC unroll 4
        for (std::size_t r = 0; r < kRows; ++r) {
          sums[RowBlock::place_of(t, r, kRows)] = pair[r][0];
          sums[RowBlock::place_of(t + 1, r, kRows)] = pair[r][1];
        }
      }
      float dots[kRows * kLanes];
      for (std::size_t i = 0; i < kRows * kLanes; i += kLanes) store(dots + i, sums_of_lanes(sums + i));
      add_scores<kRows>(dots, norms + first, kLanes, b == 0, kRows, task_.blocks->scores + first * kRows);
    }
  }

  /// Scores of kRows rows from `r` on and `count` keys from `first` on over one norm block. Those of keys beyond the
  /// tile's last mean nothing: levels_ has none of theirs.
  template <std::size_t kRows>
  void score_decoded(std::size_t first, std::size_t count, const float* norms, std::size_t b,
                     std::size_t r) const noexcept {
    constexpr std::size_t kKeys = kSums / kRows;
    const float* q = task_.q + r * kHeadDim + b * kDim;
    for (std::size_t t = 0; t < count; t += kKeys) {
      Vec sums[kRows * kKeys] = {};
      for (std::size_t i = 0; i < kDim; i += kLanes) {
        Vec key[kKeys];
#pragma GCC unroll 16
        for (std::size_t k = 0; k < kKeys; ++k) key[k] = load(levels_ + (t + k) * kDim + i);
#pragma GCC unroll 4
        for (std::size_t j = 0; j < kRows; ++j) {
          const Vec query = load(q + j * kHeadDim + i);
#pragma GCC unroll 16
          for (std::size_t k = 0; k < kKeys; ++k) sums[RowBlock::place_of(k, j, kRows)] += query * key[k];
        }
      }
      float dots[kRows * kKeys];
#pragma GCC unroll 4
      for (std::size_t i = 0; i < kRows * kKeys; i += kLanes) store(dots + i, sums_of_lanes(sums + i));
      const std::size_t place = RowBlock::place_of(first + t, row_in_block(r), block_rows_);
      add_scores<kRows>(dots, norms + first + t, kKeys, b == 0, block_rows_, block_of(r).scores + place);
    }
  }

  /// Adds factors * values of one norm block to the outputs of all rows, of which there are kRows.
  template <std::size_t kRows, class Reader>
  [[gnu::noinline]] void add_fused(const Reader& reader, const TileRows& values, std::size_t count, std::size_t b,
                                   UpcomingCodes upcoming) const noexcept {
    upcoming = upcoming.after(b * count * kDim);
    const RowBlock& block = *task_.blocks;
    for (std::size_t j = b * kDim; j < (b + 1) * kDim; j += kReadAtOnce) {
      Vec sums[kRows][4];
#pragma GCC unroll 4
      for (std::size_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (std::size_t c = 0; c < 4; ++c) {
          sums[i][c] = load(task_.out + i * kHeadDim + j + c * kLanes) * correction_of(block, i);
        }
      }
      for (std::size_t t = 0; t < count; ++t) {
        if (t * kReadAtOnce % kCodesPerRequest == 0) upcoming.prefetch();
        const auto value = reader.at(values.at[t], j / kReadAtOnce);
#pragma GCC unroll 4
        for (std::size_t c = 0; c < 4; ++c) {
#pragma GCC unroll 4
          for (std::size_t i = 0; i < kRows; ++i) {
            sums[i][c] += block.factors[RowBlock::place_of(t, i, kRows)] * value.vectors[c];
          }
        }
      }
#pragma GCC unroll 4
      for (std::size_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (std::size_t c = 0; c < 4; ++c) store(task_.out + i * kHeadDim + j + c * kLanes, sums[i][c]);
      }
    }
  }

  /// The same of `count` values from `first` on and kRows rows from `r` on, some columns in registers at a time.
  template <std::size_t kRows>
  void add_decoded(std::size_t first, std::size_t count, std::size_t b, std::size_t r) const noexcept {
    constexpr std::size_t kColumns = 4;  // vectors
    static_assert(kDim % (kColumns * kLanes) == 0);
    const RowBlock& block = block_of(r);
    float* out = task_.out + r * kHeadDim + b * kDim;
    for (std::size_t j = 0; j < kDim; j += kColumns * kLanes) {
      Vec sums[kRows][kColumns];
#pragma GCC unroll 8
      for (std::size_t i = 0; i < kRows; ++i) {
        const float correction = first == 0 ? correction_of(block, row_in_block(r) + i) : 1.0f;
#pragma GCC unroll 4
        for (std::size_t c = 0; c < kColumns; ++c) {
          sums[i][c] = load(out + i * kHeadDim + j + c * kLanes) * correction;
        }
      }
      for (std::size_t t = 0; t < count; ++t) {
        const float* factors = block.factors + RowBlock::place_of(first + t, row_in_block(r), block_rows_);
#pragma GCC unroll 4
        for (std::size_t c = 0; c < kColumns; ++c) {
          const Vec value = load(levels_ + t * kDim + j + c * kLanes);
#pragma GCC unroll 8
          for (std::size_t i = 0; i < kRows; ++i) sums[i][c] += factors[2 * i] * value;
        }
      }
#pragma GCC unroll 8
      for (std::size_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (std::size_t c = 0; c < kColumns; ++c) store(out + i * kHeadDim + j + c * kLanes, sums[i][c]);
      }
    }
  }

  /// Where row `r` is. A group of rows that share loads is in one block.
  RowBlock& block_of(std::size_t r) const noexcept { return task_.blocks[r / block_rows_]; }
  std::size_t row_in_block(std::size_t r) const noexcept { return r % block_rows_; }
  static float correction_of(const RowBlock& block, std::size_t row) noexcept {
    return block.corrections[RowBlock::first_lane(row)];
  }

  const AttendTask& task_;
  const std::size_t block_rows_;
  alignas(64) float levels_[kDecoded * kDim];  // of a norm block of K or V
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
