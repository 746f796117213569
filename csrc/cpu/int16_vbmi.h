// The primitives of int16_path.h in AVX-512 with VBMI and VNNI. A table of bytes has 64 entries here, or 128 in two
// registers, so codes of 5 and 6 bits are looked up as they are.
#pragma once

#include <immintrin.h>

#include "core/layout.h"
#include "cpu/attend_kernel.h"
#include "cpu/simd.h"

namespace tq_hb {
namespace {

typedef __m512i Sums;
constexpr std::size_t kChunk = 64;
constexpr unsigned kSumShift = 4;
constexpr std::size_t kLaneStep = 1;
constexpr std::size_t kDecodedKeys = 16;
constexpr std::size_t kDots = 16;
constexpr std::size_t kValueRows = 4;
constexpr std::size_t kFusedRows = 8;
constexpr std::size_t kFusedSums = 16;
constexpr std::size_t kNearRows = 2;

struct Levels {
  Sums first, second;
};

/// Of two rows: of every 16 codes, vector i has the levels from 4 * i on, as pairs.
struct PairLevels {
  Sums vectors[4];
};

inline Sums add_products(Sums sums, Sums a, Sums b) noexcept {
  return _mm512_dpwssd_epi32(sums, a, b);
}

inline Sums add(Sums a, Sums b) noexcept {
  return _mm512_add_epi32(a, b);
}

template <unsigned kBits>
inline Sums cut(Sums sums) noexcept {
  return kBits == 0 ? sums : _mm512_srai_epi32(sums, kBits);
}

inline void pin(Sums& sums) noexcept {
  asm("" : "+v"(sums));
}

inline IntVec sums_across(const Sums* sums) noexcept {
  const auto two = [&](std::size_t i) {
    const __m512i a = cut<kSumShift>(sums[i]), b = cut<kSumShift>(sums[i + 1]);
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  };
  const auto four = [&](std::size_t i) {
    const __m512i a = two(i), b = two(i + 2);
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  };
  const auto eight = [&](std::size_t i) {
    const __m512i a = four(i), b = four(i + 4);
    return _mm512_add_epi32(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd));
  };
  const __m512i a = eight(0), b = eight(8);
  return reinterpret_cast<IntVec>(_mm512_add_epi32(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd)));
}

inline Sums broadcast_pair(const std::int16_t* pair) noexcept {
  std::int32_t both;
  __builtin_memcpy(&both, pair, sizeof(both));
  return _mm512_set1_epi32(both);
}

inline Sums fill(std::int32_t value) noexcept {
  return _mm512_set1_epi32(value);
}

/// 64 levels as two tables of bytes.
struct ByteTables {
  explicit ByteTables(const std::int16_t* levels) noexcept {
    alignas(64) std::uint8_t low_bytes[64], high_bytes[64];
    for (std::size_t i = 0; i < 64; ++i) {
      low_bytes[i] = static_cast<std::uint8_t>(levels[i] & 0xff);
      high_bytes[i] = static_cast<std::uint8_t>((levels[i] >> 8) & 0xff);
    }
    low = _mm512_load_si512(low_bytes);
    high = _mm512_load_si512(high_bytes);
  }
  __m512i low, high;
};

inline Levels join(__m512i low, __m512i high) noexcept {
  return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

/// Codes that take up a byte, or lie in planes: see core/packing.h. Bits above the width mean nothing.
template <unsigned kBits, bool kPlane, std::size_t kHeadDim>
struct CodeReader;

template <unsigned kBits, std::size_t kHeadDim>
struct CodeReader<kBits, false, kHeadDim> {
  static __m512i at(const std::uint8_t* row, std::size_t chunk) noexcept {
    return _mm512_loadu_si512(row + chunk * kChunk);
  }
};

template <unsigned kBits, std::size_t kHeadDim>
struct CodeReader<kBits, true, kHeadDim> {
  static constexpr std::size_t kBlock = kHeadDim < kPlaneBlock ? kHeadDim : kPlaneBlock;
  static constexpr std::size_t kChunks = kBlock / kChunk;
  static constexpr unsigned kHighBits = kBits - kNibbleBits;
  static constexpr std::size_t kLowBytes = kBlock * kNibbleBits / 8, kHighBytes = kBlock * kHighBits / 8;

  /// For every chunk of a block, how far its codes' high bits are from the nibbles that they follow. The bytes that
  /// share a 32-bit lane have them in the same place.
  struct Turns {
    constexpr Turns() noexcept {
      for (std::size_t chunk = 0; chunk < kChunks; ++chunk) {
        for (std::size_t lane = 0; lane < kChunk / 4; ++lane) {
          const std::size_t field = (chunk * kChunk + 4 * lane) / kHighBytes;
          counts[chunk][lane] = static_cast<std::uint32_t>(32 + kNibbleBits - field * kHighBits) % 32;
        }
      }
    }
    alignas(64) std::uint32_t counts[kChunks][kChunk / 4] = {};
  };
  static constexpr Turns kTurns{};

  static __m256i load_half(const std::uint8_t* bytes) noexcept {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  }

  /// The high plane of a block, repeated.
  static __m512i high_plane(const std::uint8_t* bytes) noexcept {
    if constexpr (kHighBytes == 8) {
      return _mm512_set1_epi64(load_as<long long>(bytes));
    } else if constexpr (kHighBytes == 16) {
      return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    } else {
      return _mm512_broadcast_i64x4(load_half(bytes));
    }
  }

  /// The nibbles of a chunk, in the low bits of the bytes.
  static __m512i nibbles(const std::uint8_t* bytes, std::size_t chunk) noexcept {
    if constexpr (kLowBytes < kChunk) {
      // The low nibbles are the first half of the chunk, the high ones the second.
      const __m256i both = load_half(bytes);
      return _mm512_inserti64x4(_mm512_castsi256_si512(both), _mm256_srli_epi16(both, kNibbleBits), 1);
    } else {
      const __m512i both = _mm512_loadu_si512(bytes);
      return chunk == 0 ? both : _mm512_srli_epi16(both, kNibbleBits);
    }
  }

  static __m512i at(const std::uint8_t* row, std::size_t chunk) noexcept {
    const std::size_t block = chunk / kChunks, within = chunk % kChunks;
    const __m512i high = high_plane(row + kHeadDim * kNibbleBits / 8 + block * kHighBytes);
    const __m512i turned = _mm512_rolv_epi32(high, _mm512_load_si512(kTurns.counts[within]));
    constexpr int kChoose = 0xca;  // bits of the second where the first has a 1, else of the third
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), nibbles(row + block * kLowBytes, within), turned, kChoose);
  }
};

/// Of 5 or 6 bits: the levels are repeated up to 64, so an index needs no mask.
template <unsigned kBits>
class Lookup {
 public:
  explicit Lookup(const Int16Levels& levels) noexcept : tables_(levels.values) {}

  [[gnu::always_inline]] Levels of(__m512i codes) const noexcept {
    return join(_mm512_permutexvar_epi8(codes, tables_.low), _mm512_permutexvar_epi8(codes, tables_.high));
  }

 private:
  ByteTables tables_;
};

/// Of 8 bits: the sign of a level is folded away, and 128 levels are left.
template <>
class Lookup<8> {
 public:
  explicit Lookup(const Int16Levels& levels) noexcept : first_(levels.values), second_(levels.values + 64) {}

  [[gnu::always_inline]] Levels of(__m512i codes) const noexcept {
    const __m512i ones = _mm512_set1_epi8(-1);
    const __mmask64 sign = _mm512_movepi8_mask(codes);
    const auto flip = [&](__m512i bytes) { return _mm512_mask_sub_epi8(bytes, sign, ones, bytes); };
    const __m512i index = flip(codes);
    const __m512i low = _mm512_permutex2var_epi8(first_.low, index, second_.low);
    const __m512i high = _mm512_permutex2var_epi8(first_.high, index, second_.high);
    return join(flip(low), flip(high));
  }

 private:
  ByteTables first_, second_;
};

/// Codes are interleaved before they are looked up: that takes fewer steps than after.
template <class Reader, class CodesLookup>
[[gnu::always_inline]] inline PairLevels pairs_of(const CodesLookup& lookup, const std::uint8_t* even,
                                                  const std::uint8_t* odd, std::size_t chunk) noexcept {
  const __m512i a = Reader::at(even, chunk), b = Reader::at(odd, chunk);
  const Levels low = lookup.of(_mm512_unpacklo_epi8(a, b)), high = lookup.of(_mm512_unpackhi_epi8(a, b));
  return {{low.first, low.second, high.first, high.second}};
}

}  // namespace
}  // namespace tq_hb
