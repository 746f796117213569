// Float32 levels by lookups of bytes: what an instruction set with tables of bytes gives to float32_path.h.
//
// A file that includes this one defines before, beside kChunk and CodeReader (see int16_path.h):
//
//   FloatLookup<bits>   FloatLookup(levels), .of(codes) -> FloatLevels{Vec vectors[4]}: of every 16 codes, vector i has
//                       those from 4 * i on, 128 bits after 128 bits
//   kMostTableBits      wider codes are looked up one by one, since so many tables would be slower
#pragma once

#include "cpu/float32_path.h"

namespace tq_hb {
namespace {

/// Where the lookup leaves coordinate j of a chunk.
constexpr std::size_t place_of_level(std::size_t j) noexcept {
  return j % 16 / 4 * kLanes + j / 16 * 4 + j % 4;
}

void place_query(const float* q, std::size_t head_dim, float* placed) noexcept {
  for (std::size_t chunk = 0; chunk < head_dim; chunk += kChunk) {
#pragma GCC unroll 16
    for (std::size_t j = 0; j < kChunk; j += 4) {
      __builtin_memcpy(placed + chunk + place_of_level(j), q + chunk + j, 4 * sizeof(*q));
    }
  }
}

template <std::size_t kHeadDim>
struct ByteTableDecoder {
  /// What is looked up in a row of instructions: planes are laid out in blocks.
  static constexpr std::size_t kPart = kHeadDim < kPlaneBlock ? kHeadDim : kPlaneBlock;
  static constexpr std::size_t kDim = kBlockDim<kHeadDim>;

  template <unsigned kBits, bool kPlane>
  static void decode_as(const HeadRows& side, const Tile& tile, std::size_t block, float* rows) noexcept {
    using Reader = CodeReader<kBits, kPlane, kHeadDim>;
    const FloatLookup<kBits> lookup(*side.levels);
    for (std::size_t t = 0; t < tile.count; ++t) {
      const std::uint8_t* row = row_of(side, tile.slots[t]);
      float* out = rows + t * kDim;
#pragma GCC unroll 1
      for (std::size_t part = 0; part < kDim; part += kPart) {
#pragma GCC unroll 8
        for (std::size_t j = part; j < part + kPart; j += kChunk) {
          const FloatLevels levels = lookup.of(Reader::at(row, (block * kDim + j) / kChunk));
#pragma GCC unroll 4
          for (std::size_t i = 0; i < 4; ++i) store(out + j + i * kLanes, levels.vectors[i]);
        }
      }
    }
  }

  /// One level after the other, into the same places. Loads are what it is bound by, so four codes are one.
  static void decode_one_by_one(const HeadRows& side, const Tile& tile, std::size_t block, float* rows) noexcept {
    const float* levels = side.levels->levels;
    for (std::size_t t = 0; t < tile.count; ++t) {
      const std::uint8_t* row = row_of(side, tile.slots[t]) + block * kDim;
      float* out = rows + t * kDim;
      for (std::size_t chunk = 0; chunk < kDim; chunk += kChunk) {
#pragma GCC unroll 8
        for (std::size_t j = 0; j < kChunk; j += 4) {
          const auto codes = load_as<std::uint32_t>(row + chunk + j);
          const std::uint32_t upper = codes >> 16;
          const Float4 four{levels[codes & 0xff], levels[codes >> 8 & 0xff], levels[upper & 0xff], levels[upper >> 8]};
          store(out + chunk + place_of_level(j), four);
        }
      }
    }
  }

  static void decode(const HeadRows& side, const Tile& tile, std::size_t block, float* rows) noexcept {
    const bool plane = side.high_bits != 0;
    if (side.cbits == 5) return (plane ? decode_as<5, true> : decode_as<5, false>)(side, tile, block, rows);
    if (side.cbits == 6) return (plane ? decode_as<6, true> : decode_as<6, false>)(side, tile, block, rows);
    if constexpr (kMostTableBits == 8) {
      decode_as<8, false>(side, tile, block, rows);
    } else {
      decode_one_by_one(side, tile, block, rows);
    }
  }

  static void order(float* out, std::size_t count) noexcept { order_columns<kChunk>(out, count); }
};

/// Unused where only single keys are looked up: see rescore.h.
[[maybe_unused]] void attend_float32(const AttendTask& task) noexcept {
  attend_in_float32<ByteTableDecoder>(task);
}

}  // namespace
}  // namespace tq_hb
