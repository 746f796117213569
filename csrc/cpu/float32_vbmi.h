// The primitives of float32_lookup.h in AVX-512 with VBMI.
#pragma once

#include "cpu/int16_vbmi.h"

namespace tq_hb {
namespace {

constexpr unsigned kMostTableBits = 8;
constexpr std::size_t kMostFusedRows = 4;

struct FloatLevels {
  Vec vectors[4];
};

/// Joins the bytes of 64 floats, the lowest first.
inline FloatLevels join_floats(const __m512i (&bytes)[4]) noexcept {
  FloatLevels levels;
  const auto put = [&](std::size_t i, __m512i low, __m512i high) {
    levels.vectors[i] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high));
    levels.vectors[i + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high));
  };
  put(0, _mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpacklo_epi8(bytes[2], bytes[3]));
  put(2, _mm512_unpackhi_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[2], bytes[3]));
  return levels;
}

/// Codes of 5 and 6 bits are looked up as they are: the levels are repeated. A codebook is symmetric: for 8 bits its
/// lower half serves, and the sign is put right by the code's.
template <unsigned kBits>
class FloatLookup {
 public:
  explicit FloatLookup(const LevelTable& levels) noexcept : levels_(levels) {}

  FloatLevels of(__m512i codes) const noexcept {
    __m512i bytes[4];
    if constexpr (kBits < 8) {
#pragma GCC unroll 4
      for (std::size_t plane = 0; plane < 4; ++plane) bytes[plane] = _mm512_permutexvar_epi8(codes, table(plane, 0));
    } else {
      // Signs stay a mask: to make them bytes would keep a lookup or a step of unpacking waiting.
      const __mmask64 sign = _mm512_movepi8_mask(codes);
      const __m512i index = _mm512_mask_sub_epi8(codes, sign, _mm512_set1_epi8(-1), codes);
      const __mmask64 in_second = _mm512_test_epi8_mask(index, _mm512_set1_epi8(64));
#pragma GCC unroll 4
      for (std::size_t plane = 0; plane < 4; ++plane) {
        // A second lookup under a mask takes fewer steps than one in two registers.
        const __m512i found = _mm512_permutexvar_epi8(index, table(plane, 0));
        bytes[plane] = _mm512_mask_permutexvar_epi8(found, in_second, index, table(plane, 64));
      }
      // The same as to flip the sign of a float.
      bytes[3] = _mm512_mask_add_epi8(bytes[3], sign, bytes[3], _mm512_set1_epi8(static_cast<char>(0x80)));
    }
    return join_floats(bytes);
  }

 private:
  __m512i table(std::size_t plane, std::size_t first) const noexcept {
    return _mm512_load_si512(levels_.bytes[plane] + first);
  }

  const LevelTable& levels_;
};

/// 32 levels fit into two registers: every lane's code is looked up as it is, with no bytes to join.
template <>
class FloatLookup<5> {
 public:
  explicit FloatLookup(const LevelTable& levels) noexcept
      : low_(load(levels.levels)), high_(load(levels.levels + kLanes)) {}

  FloatLevels of(__m512i codes) const noexcept {
    const __m512i columns = _mm512_shuffle_epi8(codes, transposed());
    FloatLevels levels;
#pragma GCC unroll 4
    for (unsigned i = 0; i < 4; ++i) {
      levels.vectors[i] = _mm512_permutex2var_ps(low_, _mm512_srli_epi32(columns, 8 * i), high_);
    }
    return levels;
  }

 private:
  /// Puts byte 4 * i + lane of every 16 where a shift by i bytes takes it to the lane's lowest.
  static __m512i transposed() noexcept {
    return _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  }

  Vec low_, high_;
};

}  // namespace
}  // namespace tq_hb
