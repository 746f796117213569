// The primitives of int16_path.h in AVX2, and with AVX-VNNI. A table of bytes has 16 entries here, so the sign of a
// level is folded away first, and what is left of a code beyond 4 bits chooses between tables.
#pragma once

#include <immintrin.h>

#include "core/layout.h"
#include "cpu/attend_kernel.h"
#include "cpu/simd.h"

namespace tq_hb {
namespace {

typedef __m256i Sums;
constexpr std::size_t kChunk = 32;
constexpr unsigned kSumShift = 3;
constexpr std::size_t kLaneStep = 1;
constexpr std::size_t kDecodedKeys = 8;
constexpr std::size_t kDots = 1;  // every key alone: there are few registers
constexpr std::size_t kValueRows = 2;
constexpr std::size_t kFusedRows = 2;
constexpr std::size_t kFusedSums = 8;
constexpr std::size_t kNearRows = 0;

struct Levels {
  Sums first, second;
};

/// Of two rows: of every 16 codes, vector i has the levels from 4 * i on, as pairs.
struct PairLevels {
  Sums vectors[4];
};

inline Sums add_products(Sums sums, Sums a, Sums b) noexcept {
#if defined(__AVXVNNI__)
  return _mm256_dpwssd_avx_epi32(sums, a, b);
#else
  return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
#endif
}

inline Sums add(Sums a, Sums b) noexcept {
  return _mm256_add_epi32(a, b);
}

template <unsigned kBits>
inline Sums cut(Sums sums) noexcept {
  return kBits == 0 ? sums : _mm256_srai_epi32(sums, kBits);
}

inline void pin(Sums& sums) noexcept {
  asm("" : "+x"(sums));
}

inline IntVec sums_across(const Sums* sums) noexcept {
  const auto two = [&](std::size_t i) {
    return _mm256_hadd_epi32(cut<kSumShift>(sums[i]), cut<kSumShift>(sums[i + 1]));
  };
  const auto four = [&](std::size_t i) { return _mm256_hadd_epi32(two(i), two(i + 2)); };
  const __m256i a = four(0), b = four(4);
  return reinterpret_cast<IntVec>(
      _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)));
}

inline Sums broadcast_pair(const std::int16_t* pair) noexcept {
  std::int32_t both;
  __builtin_memcpy(&both, pair, sizeof(both));
  return _mm256_set1_epi32(both);
}

inline Sums fill(std::int32_t value) noexcept {
  return _mm256_set1_epi32(value);
}

/// Every byte's bits moved up by kBits within its pair: only the bits that stay in their byte mean anything.
template <int kBits>
inline __m256i up(__m256i bytes) noexcept {
  return _mm256_slli_epi16(bytes, kBits);
}

/// The bytes whose top bit is set, all ones.
inline __m256i top_set(__m256i bytes) noexcept {
  return _mm256_cmpgt_epi8(_mm256_setzero_si256(), bytes);
}

/// 16 bytes to look up.
template <class Byte>
inline __m256i table_of(const Byte* bytes) noexcept {
  static_assert(sizeof(Byte) == 1, "bytes");
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

/// 16 levels as two tables of bytes.
struct ByteTables {
  explicit ByteTables(const std::int16_t* levels) noexcept {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels));
    const __m256i mask = _mm256_set1_epi16(0xff);
    const auto narrow = [](__m256i bytes) {
      return _mm256_broadcastsi128_si256(
          _mm_packus_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
    };
    low = narrow(_mm256_and_si256(words, mask));
    high = narrow(_mm256_srli_epi16(words, 8));
  }
  __m256i low, high;
};

/// The low and the high bytes of some levels.
struct Halves {
  __m256i low, high;
};

inline Halves look_up(const ByteTables& table, __m256i index) noexcept {
  return {_mm256_shuffle_epi8(table.low, index), _mm256_shuffle_epi8(table.high, index)};
}

/// Levels of their bytes.
inline Levels join(Halves halves) noexcept {
  return {_mm256_unpacklo_epi8(halves.low, halves.high), _mm256_unpackhi_epi8(halves.low, halves.high)};
}

/// b where the top bit of `choice` is set, else a.
inline Halves choose(Halves a, Halves b, __m256i choice) noexcept {
  return {_mm256_blendv_epi8(a.low, b.low, choice), _mm256_blendv_epi8(a.high, b.high, choice)};
}

/// Gives levels the sign that was folded away, and joins their bytes.
inline Levels unfold(Halves halves, __m256i sign) noexcept {
  return join({_mm256_xor_si256(halves.low, sign), _mm256_xor_si256(halves.high, sign)});
}

/// Codes taken apart. Bits other than those named mean nothing.
struct Codes {
  __m256i low;   ///< in bits 0 ... 3 of every byte, the code's
  __m256i bit4;  ///< in bit 7, the code's bit 4; only where a code has 6 bits
  __m256i sign;  ///< all ones where the code's top bit is set
};

/// Of codes that take up a byte, or lie in planes: see core/packing.h.
template <unsigned kBits, bool kPlane, std::size_t kHeadDim>
struct CodeReader;

template <unsigned kBits, std::size_t kHeadDim>
struct CodeReader<kBits, false, kHeadDim> {
  /// Whether rows are interleaved before they are looked up: what 8 bits are looked up by leaves no register for it.
  static constexpr bool kPairsBytes = kBits < 8;

  static Codes of(__m256i bytes) noexcept { return {bytes, up<3>(bytes), top_set(up<8 - kBits>(bytes))}; }
  static __m256i load(const std::uint8_t* row, std::size_t chunk) noexcept {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + chunk * kChunk));
  }
  static Codes at(const std::uint8_t* row, std::size_t chunk) noexcept { return of(load(row, chunk)); }
};

template <unsigned kBits, std::size_t kHeadDim>
struct CodeReader<kBits, true, kHeadDim> {
  static constexpr bool kPairsBytes = false;
  static constexpr std::size_t kBlock = kHeadDim < kPlaneBlock ? kHeadDim : kPlaneBlock;
  static constexpr std::size_t kChunks = kBlock / kChunk;
  static constexpr unsigned kHighBits = kBits - kNibbleBits;
  static constexpr std::size_t kLowBytes = kBlock * kNibbleBits / 8, kHighBytes = kBlock * kHighBits / 8;

  /// For every chunk of a block and every high bit, how far the bit is from the top of its byte in the high plane. The
  /// bytes that share a 32-bit lane have it in the same place.
  struct Shifts {
    constexpr Shifts() noexcept {
      for (std::size_t chunk = 0; chunk < kChunks; ++chunk) {
        for (unsigned bit = 0; bit < kHighBits; ++bit) {
          for (std::size_t lane = 0; lane < kChunk / 4; ++lane) {
            const std::size_t field = (chunk * kChunk + 4 * lane) / kHighBytes;
            counts[chunk][bit][lane] = static_cast<std::uint32_t>(7 - (field * kHighBits + bit));
          }
        }
      }
    }
    alignas(32) std::uint32_t counts[kChunks][kHighBits][kChunk / 4] = {};
  };
  static constexpr Shifts kShifts{};

  static __m256i high_plane(const std::uint8_t* bytes) noexcept {
    if constexpr (kHighBytes == 8) {
      return _mm256_set1_epi64x(load_as<long long>(bytes));
    } else if constexpr (kHighBytes == 16) {
      return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    } else {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
    }
  }

  /// The bytes with a high bit in their bit 7.
  static __m256i to_top(__m256i high, std::size_t chunk, unsigned bit) noexcept {
    return _mm256_sllv_epi32(high, _mm256_load_si256(reinterpret_cast<const __m256i*>(kShifts.counts[chunk][bit])));
  }

  static Codes at(const std::uint8_t* row, std::size_t chunk) noexcept {
    const std::size_t block = chunk / kChunks, within = chunk % kChunks;
    const std::size_t byte = within * kChunk % kLowBytes;
    const bool in_upper_nibbles = within * kChunk >= kLowBytes;
    __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + block * kLowBytes + byte));
    if (in_upper_nibbles) low = _mm256_srli_epi16(low, kNibbleBits);
    const __m256i high = high_plane(row + kHeadDim * kNibbleBits / 8 + block * kHighBytes);
    return {low, to_top(high, within, 0), top_set(to_top(high, within, kHighBits - 1))};
  }
};

inline __m256i folded_index(const Codes& codes) noexcept {
  return _mm256_and_si256(_mm256_xor_si256(codes.low, codes.sign), _mm256_set1_epi8(15));
}

template <unsigned kBits>
class Lookup {
 public:
  explicit Lookup(const Int16Levels& levels) noexcept : first_(levels.values), second_(levels.values + 16) {}

  [[gnu::always_inline]] Levels of(const Codes& codes) const noexcept {
    const __m256i index = folded_index(codes);
    const Halves halves = look_up(first_, index);
    if constexpr (kBits == 5) {
      return unfold(halves, codes.sign);
    } else {
      return unfold(choose(halves, look_up(second_, index), _mm256_xor_si256(codes.bit4, codes.sign)), codes.sign);
    }
  }

 private:
  ByteTables first_, second_;
};

/// Of every segment, what turns the lowest bit of its number, bit 3 of an index, into one that names its shapes.
struct ShapeBits {
  constexpr ShapeBits() noexcept {
    for (std::size_t s = 0; s < Int16Segments::kSegments; ++s) {
      of_segment[s] = static_cast<std::uint8_t>((s % 2 ^ Int16Segments::family_of(s)) << 3);
    }
  }
  alignas(16) std::uint8_t of_segment[Int16Segments::kSegments] = {};
};
constexpr ShapeBits kShapeBits;

/// A table for 128 levels would be eight of 16 entries and the blends between them. Segments take fewer steps.
template <>
class Lookup<8> {
 public:
  explicit Lookup(const Int16Levels& levels) noexcept
      : starts_(levels.segments.starts), shape_bits_(table_of(kShapeBits.of_segment)) {
    for (std::size_t i = 0; i < 2; ++i) {
      shares_[i] = table_of(levels.segments.shares[i]);
      shapes_[i] = table_of(levels.segments.shapes[i]);
    }
  }

  [[gnu::always_inline]] Levels of(const Codes& codes) const noexcept {
    const __m256i index = _mm256_xor_si256(codes.low, codes.sign);
    const __m256i segment = _mm256_and_si256(_mm256_srli_epi16(index, 3), _mm256_set1_epi8(15));
    const __m256i step = _mm256_xor_si256(index, _mm256_shuffle_epi8(shape_bits_, segment));
    const Levels start = join(look_up(starts_, segment)), sign = join({codes.sign, codes.sign});
    const Levels share = join({_mm256_shuffle_epi8(shares_[0], segment), _mm256_shuffle_epi8(shares_[1], segment)});
    const Levels shape = join({_mm256_shuffle_epi8(shapes_[0], step), _mm256_shuffle_epi8(shapes_[1], step)});
    return {value(start.first, share.first, shape.first, sign.first),
            value(start.second, share.second, shape.second, sign.second)};
  }

 private:
  /// See Int16Segments.
  static __m256i value(__m256i start, __m256i shares, __m256i shapes, __m256i sign) noexcept {
    constexpr short kScale = 0x8000 / Int16Segments::kFraction;
    const __m256i rise = _mm256_mulhrs_epi16(_mm256_maddubs_epi16(shares, shapes), _mm256_set1_epi16(kScale));
    return _mm256_xor_si256(_mm256_add_epi16(start, rise), sign);
  }

  ByteTables starts_;
  __m256i shape_bits_, shares_[2], shapes_[2];
};

template <class Reader, class CodesLookup>
[[gnu::always_inline]] inline PairLevels pairs_of(const CodesLookup& lookup, const std::uint8_t* even,
                                                  const std::uint8_t* odd, std::size_t chunk) noexcept {
  if constexpr (Reader::kPairsBytes) {
    // Bytes in pairs are looked up as pairs, and there are half as many of them to put together.
    const __m256i a = Reader::load(even, chunk), b = Reader::load(odd, chunk);
    const Levels first = lookup.of(Reader::of(_mm256_unpacklo_epi8(a, b)));
    const Levels second = lookup.of(Reader::of(_mm256_unpackhi_epi8(a, b)));
    return {{first.first, first.second, second.first, second.second}};
  } else {
    const Levels a = lookup.of(Reader::at(even, chunk)), b = lookup.of(Reader::at(odd, chunk));
    return {{_mm256_unpacklo_epi16(a.first, b.first), _mm256_unpackhi_epi16(a.first, b.first),
             _mm256_unpacklo_epi16(a.second, b.second), _mm256_unpackhi_epi16(a.second, b.second)}};
  }
}

}  // namespace
}  // namespace tq_hb
