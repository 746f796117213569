// The primitives of float32_lookup.h in AVX2.
#pragma once

#include "cpu/int16_avx2.h"

namespace tq_hb {
namespace {

constexpr unsigned kMostTableBits = 6;
constexpr std::size_t kMostFusedRows = 2;

struct FloatLevels {
  Vec vectors[4];
};

/// Joins the bytes of 32 floats, the lowest first.
inline FloatLevels join_floats(const __m256i (&bytes)[4]) noexcept {
  FloatLevels levels;
  const auto put = [&](std::size_t i, __m256i low, __m256i high) {
    levels.vectors[i] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high));
    levels.vectors[i + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high));
  };
  put(0, _mm256_unpacklo_epi8(bytes[0], bytes[1]), _mm256_unpacklo_epi8(bytes[2], bytes[3]));
  put(2, _mm256_unpackhi_epi8(bytes[0], bytes[1]), _mm256_unpackhi_epi8(bytes[2], bytes[3]));
  return levels;
}

/// A codebook is symmetric: its lower half serves, negative levels, and the sign is put right by the code's.
template <unsigned kBits>
class FloatLookup {
 public:
  explicit FloatLookup(const LevelTable& levels) noexcept : levels_(levels) {}

  FloatLevels of(const Codes& codes) const noexcept {
    const __m256i index = folded_index(codes);
    const __m256i choice = _mm256_xor_si256(codes.bit4, codes.sign);
    __m256i bytes[4];
#pragma GCC unroll 4
    for (std::size_t plane = 0; plane < 4; ++plane) bytes[plane] = byte_of(plane, index, choice);
    bytes[3] = _mm256_xor_si256(bytes[3], _mm256_and_si256(codes.sign, _mm256_set1_epi8(static_cast<char>(0x80))));
    return join_floats(bytes);
  }

 private:
  __m256i entry(std::size_t plane, std::size_t table, __m256i index) const noexcept {
    const auto* levels = reinterpret_cast<const __m128i*>(levels_.bytes[plane] + 16 * table);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(levels)), index);
  }

  __m256i byte_of(std::size_t plane, __m256i index, __m256i choice) const noexcept {
    if constexpr (kBits == 5) {
      return entry(plane, 0, index);
    } else {
      return _mm256_blendv_epi8(entry(plane, 0, index), entry(plane, 1, index), choice);
    }
  }

  const LevelTable& levels_;
};

}  // namespace
}  // namespace tq_hb
