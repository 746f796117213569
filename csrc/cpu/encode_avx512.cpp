#include <immintrin.h>

#include "cpu/encode_kernel.h"
#include "cpu/simd.h"

namespace tq_hb {
namespace {

inline Vec load_quarters(const float* const* rows, std::size_t offset) noexcept {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(rows[0] + offset));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(rows[4] + offset), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(rows[8] + offset), 2);
  return _mm512_insertf32x4(v, _mm_loadu_ps(rows[12] + offset), 3);
}

inline void store_quarters(std::uint8_t* const* rows, std::size_t offset, Vec v) noexcept {
  store(rows[0] + offset, _mm512_castps512_ps128(v));
  store(rows[4] + offset, _mm512_extractf32x4_ps(v, 1));
  store(rows[8] + offset, _mm512_extractf32x4_ps(v, 2));
  store(rows[12] + offset, _mm512_extractf32x4_ps(v, 3));
}

inline Vec unpack_low(Vec a, Vec b) noexcept {
  return _mm512_unpacklo_ps(a, b);
}
inline Vec unpack_high(Vec a, Vec b) noexcept {
  return _mm512_unpackhi_ps(a, b);
}
inline Vec unpack_low_pairs(Vec a, Vec b) noexcept {
  return _mm512_shuffle_ps(a, b, 0x44);
}
inline Vec unpack_high_pairs(Vec a, Vec b) noexcept {
  return _mm512_shuffle_ps(a, b, 0xEE);
}

/// The nodes' boundaries, out of kCount from kFirst on. Two registers have 32, told apart by the low bits of the node;
/// the choices of the levels from `right` on choose the registers.
template <std::size_t kFirst, std::size_t kCount>
inline __m512i look_up(const SearchTree& tree, __m512i node, const __mmask16* right) noexcept {
  const std::int32_t* table = tree.nodes + kFirst;
  if constexpr (kCount <= 16) {
    return _mm512_permutexvar_epi32(node, _mm512_load_si512(table));
  } else if constexpr (kCount == 32) {
    return _mm512_permutex2var_epi32(_mm512_load_si512(table), node, _mm512_load_si512(table + 16));
  } else {
    const __m512i low = look_up<kFirst, kCount / 2>(tree, node, right + 1);
    const __m512i high = look_up<kFirst + kCount / 2, kCount / 2>(tree, node, right + 1);
    return _mm512_mask_blend_epi32(*right, low, high);
  }
}

template <unsigned kLevels, unsigned kLevel = 0>
inline __m512i descend_from(__m512i node, __m512i keys, const SearchTree& tree, __mmask16* right) noexcept {
  if constexpr (kLevel == kLevels) {
    return node;
  } else {
    // The first four levels lie in one register.
    constexpr std::size_t kFirst = kLevel < 4 ? 0 : 1 << kLevel, kCount = kLevel < 4 ? 16 : 1 << kLevel;
    const __m512i boundaries = look_up<kFirst, kCount>(tree, node, right);
    right[kLevel] = _mm512_cmpgt_epi32_mask(keys, boundaries);
    const __m512i left = _mm512_add_epi32(node, node);
    return descend_from<kLevels, kLevel + 1>(_mm512_mask_add_epi32(left, right[kLevel], left, _mm512_set1_epi32(1)),
                                             keys, tree, right);
  }
}

template <unsigned kLevels>
inline IntVec descend(IntVec keys, const SearchTree& tree) noexcept {
  __mmask16 right[kLevels];
  return (IntVec)descend_from<kLevels>(_mm512_set1_epi32(1), (__m512i)keys, tree, right);
}

}  // namespace
}  // namespace tq_hb

// Its primitives come first.
#include "cpu/encode_rows.h"

namespace tq_hb {

std::uint32_t encode_rows_avx512(const EncodeTask& task) noexcept {
  return encode_rows(task);
}

}  // namespace tq_hb
