// The primitives of int16_path.h in NEON. A lookup takes bytes out of four registers: 64 levels at once.
#pragma once

#include <arm_neon.h>

#include "core/layout.h"
#include "cpu/attend_kernel.h"
#include "cpu/simd.h"

namespace tq_hb {
namespace {

typedef int32x4_t Sums;
constexpr std::size_t kChunk = 16;
constexpr unsigned kSumShift = 2;
constexpr std::size_t kLaneStep = 4;
constexpr std::size_t kDecodedKeys = 8;
constexpr std::size_t kDots = 8;
constexpr std::size_t kValueRows = 4;
constexpr std::size_t kFusedRows = 2;
constexpr std::size_t kFusedSums = 8;
constexpr std::size_t kNearRows = 0;

struct Levels {
  Sums first, second;
};

inline int16x8_t words(Sums sums) noexcept {
  return vreinterpretq_s16_s32(sums);
}

inline Sums add_products(Sums sums, Sums a, Sums b) noexcept {
  sums = vmlal_s16(sums, vget_low_s16(words(a)), vget_low_s16(words(b)));
  return vmlal_high_s16(sums, words(a), words(b));
}

/// Of two rows: of every 16 codes, vector i has the levels from 4 * i on, as pairs.
struct PairLevels {
  Sums vectors[4];
};

inline Sums broadcast_pair(const std::int16_t* pair) noexcept {
  return vreinterpretq_s32_s16(vcombine_s16(vdup_n_s16(pair[0]), vdup_n_s16(pair[1])));
}

inline Sums fill(std::int32_t value) noexcept {
  return vdupq_n_s32(value);
}

inline Sums add(Sums a, Sums b) noexcept {
  return vaddq_s32(a, b);
}

template <unsigned kBits>
inline Sums cut(Sums sums) noexcept {
  return kBits == 0 ? sums : vshrq_n_s32(sums, kBits == 0 ? 1 : kBits);
}

inline void pin(Sums& sums) noexcept {
  asm("" : "+w"(sums));
}

inline IntVec sums_across(const Sums* sums) noexcept {
  const auto two = [&](std::size_t i) { return vpaddq_s32(cut<kSumShift>(sums[i]), cut<kSumShift>(sums[i + 1])); };
  return vpaddq_s32(two(0), two(2));
}

/// 64 levels as two tables of bytes.
struct ByteTables {
  explicit ByteTables(const std::int16_t* levels) noexcept {
    for (std::size_t i = 0; i < 4; ++i) {
      const uint8x16x2_t bytes = vld2q_u8(reinterpret_cast<const std::uint8_t*>(levels + 16 * i));
      low.val[i] = bytes.val[0];
      high.val[i] = bytes.val[1];
    }
  }
  uint8x16x4_t low, high;
};

inline Levels join(uint8x16_t low, uint8x16_t high) noexcept {
  return {vreinterpretq_s32_u8(vzip1q_u8(low, high)), vreinterpretq_s32_u8(vzip2q_u8(low, high))};
}

/// Codes that take up a byte, or lie in planes: see core/packing.h. Bits above the width mean nothing.
template <unsigned kBits, bool kPlane, std::size_t kHeadDim>
struct CodeReader;

template <unsigned kBits, std::size_t kHeadDim>
struct CodeReader<kBits, false, kHeadDim> {
  static uint8x16_t at(const std::uint8_t* row, std::size_t chunk) noexcept { return vld1q_u8(row + chunk * kChunk); }
};

template <unsigned kBits, std::size_t kHeadDim>
struct CodeReader<kBits, true, kHeadDim> {
  static constexpr std::size_t kBlock = kHeadDim < kPlaneBlock ? kHeadDim : kPlaneBlock;
  static constexpr std::size_t kChunks = kBlock / kChunk;

  /// The part of the codes from coordinate `first` of a block on that a plane of kWidth bits per code holds, in the low
  /// bits of the bytes.
  template <unsigned kWidth>
  static uint8x16_t fields(const std::uint8_t* block, std::size_t first) noexcept {
    constexpr std::size_t kBytes = kBlock * kWidth / 8;
    const auto shift = [&](std::size_t u) { return static_cast<std::int8_t>(-static_cast<int>(u / kBytes * kWidth)); };
    uint8x16_t bytes;
    int8x16_t shifts;
    if constexpr (kBytes < kChunk) {  // two fields of eight bytes
      const uint8x8_t half = vld1_u8(block);
      bytes = vcombine_u8(half, half);
      shifts = vcombine_s8(vdup_n_s8(shift(first)), vdup_n_s8(shift(first + kBytes)));
    } else {
      bytes = vld1q_u8(block + first % kBytes);
      shifts = vdupq_n_s8(shift(first));
    }
    return vandq_u8(vshlq_u8(bytes, shifts), vdupq_n_u8((1 << kWidth) - 1));
  }

  static uint8x16_t at(const std::uint8_t* row, std::size_t chunk) noexcept {
    constexpr unsigned kHighBits = kBits - kNibbleBits;
    const std::size_t block = chunk / kChunks, first = chunk % kChunks * kChunk;
    const std::uint8_t* high_plane = row + kHeadDim * kNibbleBits / 8;
    const uint8x16_t low = fields<kNibbleBits>(row + block * (kBlock * kNibbleBits / 8), first);
    const uint8x16_t high = fields<kHighBits>(high_plane + block * (kBlock * kHighBits / 8), first);
    return vorrq_u8(low, vshlq_n_u8(high, kNibbleBits));
  }
};

/// Of 5 or 6 bits: the levels are repeated up to 64.
template <unsigned kBits>
class Lookup {
 public:
  explicit Lookup(const Int16Levels& levels) noexcept : tables_(levels.values) {}

  [[gnu::always_inline]] Levels of(uint8x16_t codes) const noexcept {
    const uint8x16_t index = vandq_u8(codes, vdupq_n_u8(63));
    return join(vqtbl4q_u8(tables_.low, index), vqtbl4q_u8(tables_.high, index));
  }

 private:
  ByteTables tables_;
};

/// Of 8 bits: the sign of a level is folded away, and 128 levels are left, twice 64.
template <>
class Lookup<8> {
 public:
  explicit Lookup(const Int16Levels& levels) noexcept : first_(levels.values), second_(levels.values + 64) {}

  [[gnu::always_inline]] Levels of(uint8x16_t codes) const noexcept {
    const uint8x16_t sign = vcltzq_s8(vreinterpretq_s8_u8(codes));
    const uint8x16_t index = veorq_u8(codes, sign), beyond = vsubq_u8(index, vdupq_n_u8(64));
    // An index outside a table gives 0 in the first and leaves what was found in the second.
    const uint8x16_t low = vqtbx4q_u8(vqtbl4q_u8(first_.low, index), second_.low, beyond);
    const uint8x16_t high = vqtbx4q_u8(vqtbl4q_u8(first_.high, index), second_.high, beyond);
    return join(veorq_u8(low, sign), veorq_u8(high, sign));
  }

 private:
  ByteTables first_, second_;
};

template <class Reader, class CodesLookup>
[[gnu::always_inline]] inline PairLevels pairs_of(const CodesLookup& lookup, const std::uint8_t* even,
                                                  const std::uint8_t* odd, std::size_t chunk) noexcept {
  const Levels a = lookup.of(Reader::at(even, chunk)), b = lookup.of(Reader::at(odd, chunk));
  const auto low = [](Sums x, Sums y) { return vcombine_s32(vget_low_s32(x), vget_low_s32(y)); };
  const auto high = [](Sums x, Sums y) { return vcombine_s32(vget_high_s32(x), vget_high_s32(y)); };
  return {{low(a.first, b.first), high(a.first, b.first), low(a.second, b.second), high(a.second, b.second)}};
}

}  // namespace
}  // namespace tq_hb
