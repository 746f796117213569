// Float32 levels by lookups of bytes: what an instruction set with tables of bytes gives to float32_path.h.
//
// A file that includes this one defines before, beside kChunk and CodeReader (see int16_path.h):
//
//   FloatLookup<bits>   FloatLookup(levels), .of(codes) -> FloatLevels{Vec vectors[4]}: of every 16 codes, vector i has
//                       those from 4 * i on, 128 bits after 128 bits
//   kMostTableBits      wider codes are looked up one by one, since so many tables would be slower
//   kMostFusedRows      see kFusedRows in float32_path.h
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

static_assert(kReadAtOnce == kChunk, "a reader gives what is looked up at a time");

template <unsigned kBits, bool kPlane, std::size_t kHeadDim>
class LevelReader {
 public:
  explicit LevelReader(const LevelTable& levels) noexcept : lookup_(levels) {}

  [[gnu::always_inline]] FloatLevels at(const std::uint8_t* row, std::size_t chunk) const noexcept {
    return lookup_.of(CodeReader<kBits, kPlane, kHeadDim>::at(row, chunk));
  }

 private:
  FloatLookup<kBits> lookup_;
};

template <std::size_t kHeadDim>
struct ByteTableDecoder {
  static constexpr std::size_t kFusedRows = kMostFusedRows;
  /// What is looked up in a row of instructions: planes are laid out in blocks.
  static constexpr std::size_t kPart = kHeadDim < kPlaneBlock ? kHeadDim : kPlaneBlock;
  static constexpr std::size_t kDim = kBlockDim<kHeadDim>;

  template <class Use>
  static bool visit(const HeadRows& side, const Use& use) noexcept {
    const auto with = [&](const auto& reader) {
      use(reader);
      return true;
    };
    const LevelTable& levels = *side.levels;
    const bool plane = side.high_bits != 0;
    if (side.cbits == 5 && plane) return with(LevelReader<5, true, kHeadDim>(levels));
    if (side.cbits == 5) return with(LevelReader<5, false, kHeadDim>(levels));
    if (side.cbits == 6 && plane) return with(LevelReader<6, true, kHeadDim>(levels));
    if (side.cbits == 6) return with(LevelReader<6, false, kHeadDim>(levels));
    if constexpr (kMostTableBits == 8) return with(LevelReader<8, false, kHeadDim>(levels));
    return false;
  }

  static void decode(const HeadRows& side, const std::uint8_t* const* rows, std::size_t count, std::size_t block,
                     UpcomingCodes upcoming, float* levels) noexcept {
    const bool decoded =
        visit(side, [=](const auto& reader) { decode_with(reader, rows, count, block, upcoming, levels); });
    if (!decoded) decode_one_by_one(side, rows, count, block, upcoming, levels);
  }

 private:
  template <class Reader>
  [[gnu::noinline]] static void decode_with(const Reader& reader, const std::uint8_t* const* rows, std::size_t count,
                                            std::size_t block, UpcomingCodes upcoming, float* levels) noexcept {
    for (std::size_t t = 0; t < count; ++t, levels += kDim) {
#pragma GCC unroll 1
      for (std::size_t part = 0; part < kDim; part += kPart) {
#pragma GCC unroll 8
        for (std::size_t j = part; j < part + kPart; j += kChunk) {
          if (j % kCodesPerRequest == 0) upcoming.prefetch();
          const FloatLevels chunk = reader.at(rows[t], (block * kDim + j) / kChunk);
#pragma GCC unroll 4
          for (std::size_t i = 0; i < 4; ++i) store(levels + j + i * kLanes, chunk.vectors[i]);
        }
      }
    }
  }

  /// One level after the other, into the same places. Loads are what it is bound by, so four codes are one.
  [[gnu::noinline]] static void decode_one_by_one(const HeadRows& side, const std::uint8_t* const* rows,
                                                  std::size_t count, std::size_t block, UpcomingCodes upcoming,
                                                  float* levels) noexcept {
    const float* table = side.levels->levels;
    for (std::size_t t = 0; t < count; ++t) {
      const std::uint8_t* row = rows[t] + block * kDim;
      for (std::size_t i = 0; i < kDim; i += kCodesPerRequest, row += kCodesPerRequest, levels += kCodesPerRequest) {
        upcoming.prefetch();
#pragma GCC unroll 16
        for (std::size_t j = 0; j < kCodesPerRequest; j += 4) {
          const auto codes = load_as<std::uint32_t>(row + j);
          const std::uint32_t upper = codes >> 16;
          const Float4 four{table[codes & 0xff], table[codes >> 8 & 0xff], table[upper & 0xff], table[upper >> 8]};
          store(levels + j / kChunk * kChunk + place_of_level(j % kChunk), four);
        }
      }
    }
  }
};

/// Unused where only single keys are looked up: see rescore.h.
[[maybe_unused]] void attend_float32(const AttendTask& task) noexcept {
  attend_in_float32<ByteTableDecoder>(task);
}

}  // namespace
}  // namespace tq_hb
