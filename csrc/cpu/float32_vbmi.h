// The primitives of float32_lookup.h in AVX-512 with VBMI.
#pragma once

#include "cpu/int16_vbmi.h"

namespace tq_hb {
namespace {

constexpr unsigned kMostTableBits = 8;

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
template <unsigned kBits, bool kPlane, std::size_t kHeadDim>
class FloatLookup {
 public:
  explicit FloatLookup(const LevelTable& levels) noexcept : levels_(levels) {}

  FloatLevels at(const std::uint8_t* row, std::size_t chunk) const noexcept {
    const __m512i codes = CodeReader<kBits, kPlane, kHeadDim>::at(row, chunk);
    __m512i bytes[4];
    if constexpr (kBits < 8) {
#pragma GCC unroll 4
      for (std::size_t plane = 0; plane < 4; ++plane) bytes[plane] = _mm512_permutexvar_epi8(codes, table(plane, 0));
    } else {
      const __m512i sign = _mm512_movm_epi8(_mm512_movepi8_mask(codes));
      const __m512i index = _mm512_xor_si512(codes, sign);
#pragma GCC unroll 4
      for (std::size_t plane = 0; plane < 4; ++plane) {
        bytes[plane] = _mm512_permutex2var_epi8(table(plane, 0), index, table(plane, 64));
      }
      bytes[3] = _mm512_xor_si512(bytes[3], _mm512_and_si512(sign, _mm512_set1_epi8(static_cast<char>(0x80))));
    }
    return join_floats(bytes);
  }

 private:
  __m512i table(std::size_t plane, std::size_t first) const noexcept {
    return _mm512_load_si512(levels_.bytes[plane] + first);
  }

  const LevelTable& levels_;
};

}  // namespace
}  // namespace tq_hb
