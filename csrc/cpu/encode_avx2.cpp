#include <immintrin.h>

#include "cpu/encode_kernel.h"
#include "cpu/simd.h"

namespace tq_hb {
namespace {

inline Vec load_quarters(const float* const* rows, std::size_t offset) noexcept {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[0] + offset)), _mm_loadu_ps(rows[4] + offset),
                              1);
}

inline void store_quarters(std::uint8_t* const* rows, std::size_t offset, Vec v) noexcept {
  store(rows[0] + offset, _mm256_castps256_ps128(v));
  store(rows[4] + offset, _mm256_extractf128_ps(v, 1));
}

inline Vec unpack_low(Vec a, Vec b) noexcept {
  return _mm256_unpacklo_ps(a, b);
}
inline Vec unpack_high(Vec a, Vec b) noexcept {
  return _mm256_unpackhi_ps(a, b);
}
inline Vec unpack_low_pairs(Vec a, Vec b) noexcept {
  return _mm256_shuffle_ps(a, b, 0x44);
}
inline Vec unpack_high_pairs(Vec a, Vec b) noexcept {
  return _mm256_shuffle_ps(a, b, 0xEE);
}

/// The nodes' boundaries, out of kCount from kFirst on. A register has eight, told apart by the low bits of the node;
/// the choices of the levels from `right` on choose the register.
template <std::size_t kFirst, std::size_t kCount>
inline __m256i look_up(const SearchTree& tree, __m256i node, const __m256i* right) noexcept {
  if constexpr (kCount <= 8) {
    const __m256i* table = reinterpret_cast<const __m256i*>(tree.nodes + kFirst);
    return _mm256_permutevar8x32_epi32(_mm256_load_si256(table), node);
  } else {
    const __m256i low = look_up<kFirst, kCount / 2>(tree, node, right + 1);
    const __m256i high = look_up<kFirst + kCount / 2, kCount / 2>(tree, node, right + 1);
    return _mm256_blendv_epi8(low, high, *right);
  }
}

template <unsigned kLevels, unsigned kLevel = 0>
inline __m256i descend_from(__m256i node, __m256i keys, const SearchTree& tree, __m256i* right) noexcept {
  if constexpr (kLevel == kLevels) {
    return node;
  } else {
    // The first three levels lie in one register.
    constexpr std::size_t kFirst = kLevel < 3 ? 0 : 1 << kLevel, kCount = kLevel < 3 ? 8 : 1 << kLevel;
    right[kLevel] = _mm256_cmpgt_epi32(keys, look_up<kFirst, kCount>(tree, node, right));
    return descend_from<kLevels, kLevel + 1>(_mm256_sub_epi32(_mm256_add_epi32(node, node), right[kLevel]), keys, tree,
                                             right);
  }
}

template <unsigned kLevels>
inline IntVec descend(IntVec keys, const SearchTree& tree) noexcept {
  __m256i right[kLevels];
  return (IntVec)descend_from<kLevels>(_mm256_set1_epi32(1), (__m256i)keys, tree, right);
}

}  // namespace
}  // namespace tq_hb

// Its primitives come first.
#include "cpu/encode_rows.h"

namespace tq_hb {

std::uint32_t encode_rows_avx2(const EncodeTask& task) noexcept {
  return encode_rows(task);
}

}  // namespace tq_hb
