// Vectors of the widest register that a file is compiled for, by the extension that g++ and clang share.
//
// In an unnamed namespace, like all that the attend_<isa>.cpp files include: a function shared between files
// with different flags could be linked from the wrong one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

// Where the extension has no good way to put vectors together.
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace tq_hb {
namespace {

// Registers for vectors.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr std::size_t kRegisters = 32;
#else
constexpr std::size_t kRegisters = 16;
#endif

#if defined(__AVX512F__)
constexpr std::size_t kLanes = 16;
#elif defined(__AVX__)
constexpr std::size_t kLanes = 8;
#else
constexpr std::size_t kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef std::int32_t IntVec __attribute__((vector_size(kLanes * sizeof(std::int32_t))));
typedef std::int16_t ShortVec __attribute__((vector_size(kLanes * sizeof(std::int16_t))));
// Scores are doubles: this many fill a register, or two of the small ones.
constexpr std::size_t kDoubles = kLanes == 16 ? 8 : 4;
typedef double Doubles __attribute__((vector_size(kDoubles * sizeof(double))));
constexpr std::size_t kVecDoubles = kLanes / kDoubles;  // vectors of them for one of floats
typedef float DoublesAsFloats __attribute__((vector_size(kDoubles * sizeof(float))));
typedef float Float4 __attribute__((vector_size(4 * sizeof(float))));

template <class V, class T>
inline V load_as(const T* source) noexcept {
  V vec;
  __builtin_memcpy(&vec, source, sizeof(vec));
  return vec;
}

inline Vec load(const float* source) noexcept {
  return load_as<Vec>(source);
}

template <class V, class T>
inline void store(T* target, V vec) noexcept {
  __builtin_memcpy(target, &vec, sizeof(vec));
}

/// Out of kVecDoubles vectors.
inline Vec to_floats(const Doubles* doubles) noexcept {
  const auto part = [&](std::size_t i) { return __builtin_convertvector(doubles[i], DoublesAsFloats); };
#if defined(__AVX512F__)
  return _mm512_insertf32x8(_mm512_castps256_ps512(part(0)), part(1), 1);
#elif defined(__AVX__)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(part(0)), part(1), 1);
#else
  return part(0);
#endif
}

inline Doubles to_doubles(DoublesAsFloats floats) noexcept {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(floats);
#elif defined(__AVX__)
  return _mm256_cvtps_pd(floats);
#else
  return __builtin_convertvector(floats, Doubles);
#endif
}

/// Into kVecDoubles vectors.
inline void to_doubles(Vec floats, Doubles* doubles) noexcept {
#if defined(__AVX512F__)
  doubles[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(floats));
  doubles[1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(floats, 1));
#elif defined(__AVX__)
  doubles[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(floats));
  doubles[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(floats, 1));
#else
  doubles[0] = __builtin_convertvector(floats, Doubles);
#endif
}

inline void to_doubles(IntVec ints, Doubles* doubles) noexcept {
#if defined(__AVX512F__)
  const auto all = reinterpret_cast<__m512i>(ints);
  doubles[0] = _mm512_cvtepi32_pd(_mm512_castsi512_si256(all));
  doubles[1] = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(all, 1));
#elif defined(__AVX__)
  const auto all = reinterpret_cast<__m256i>(ints);
  doubles[0] = _mm256_cvtepi32_pd(_mm256_castsi256_si128(all));
  doubles[1] = _mm256_cvtepi32_pd(_mm256_extractf128_si256(all, 1));
#else
  doubles[0] = __builtin_convertvector(ints, Doubles);
#endif
}

template <std::size_t kStep, class V, std::size_t... kLane>
inline V exchanged(V vec, std::index_sequence<kLane...>) noexcept {
#if defined(__clang__)
  return __builtin_shufflevector(vec, vec, (kLane ^ kStep)...);
#else
  using Index = std::conditional_t<sizeof(vec[0]) == 8, std::int64_t, std::int32_t>;
  typedef Index Indices __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(vec, Indices{static_cast<Index>(kLane ^ kStep)...});
#endif
}

/// Lane i ^ kStep in lane i.
template <std::size_t kStep, class V>
inline V exchanged(V vec) noexcept {
  return exchanged<kStep>(vec, std::make_index_sequence<sizeof(V) / sizeof(vec[0])>{});
}

template <class T, std::size_t kCount>
struct VectorOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};

/// Joins the halves of a vector until one value is left.
template <class T, std::size_t kCount, class Join>
inline T fold_lanes(typename VectorOf<T, kCount>::type vec, const Join& join) noexcept {
  if constexpr (kCount == 2) {
    return join(vec[0], vec[1]);
  } else {
    using Half = typename VectorOf<T, kCount / 2>::type;
    const T* lanes = reinterpret_cast<const T*>(&vec);
    return fold_lanes<T, kCount / 2>(join(load_as<Half>(lanes), load_as<Half>(lanes + kCount / 2)), join);
  }
}

inline float sum_of_lanes(Vec vec) noexcept {
  return fold_lanes<float, kLanes>(vec, [](auto a, auto b) { return a + b; });
}

inline std::int32_t sum_of_lanes(IntVec vec) noexcept {
  return fold_lanes<std::int32_t, kLanes>(vec, [](auto a, auto b) { return a + b; });
}

#if defined(__AVX__)
// Of vectors 0, 4, ... what is left of each in 128 bits when its halves have been added until it has no more.
#if defined(__AVX512F__)
inline Vec quads_of(const Vec* vectors) noexcept {
  const auto eights = [&](std::size_t i) {
    const Vec a = vectors[i], b = vectors[i + 4];
    return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
  };
  const Vec a = eights(0), b = eights(8);
  return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
}

template <int kChoice>
inline Vec shuffle_quads(Vec a, Vec b) noexcept {
  return _mm512_shuffle_ps(a, b, kChoice);
}
#else
inline Vec quads_of(const Vec* vectors) noexcept {
  const Vec a = vectors[0], b = vectors[4];
  return _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
}

template <int kChoice>
inline Vec shuffle_quads(Vec a, Vec b) noexcept {
  return _mm256_shuffle_ps(a, b, kChoice);
}
#endif
#endif

/// sum_of_lanes of each of as many vectors as there are lanes, by the same additions.
inline Vec sums_of_lanes(const Vec* vectors) noexcept {
#if defined(__AVX__)
  const auto pairs = [&](std::size_t i) {
    const Vec a = quads_of(vectors + i), b = quads_of(vectors + i + 1);
    return shuffle_quads<0x44>(a, b) + shuffle_quads<0xee>(a, b);
  };
  const Vec a = pairs(0), b = pairs(2);
  return shuffle_quads<0x88>(a, b) + shuffle_quads<0xdd>(a, b);
#else
  Vec sums;
  for (std::size_t i = 0; i < kLanes; ++i) sums[i] = sum_of_lanes(vectors[i]);
  return sums;
#endif
}

// The second where either is NaN. Compilers make a comparison and a choice of what the extension has.
inline Vec max(Vec a, Vec b) noexcept {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Doubles max(Doubles a, Doubles b) noexcept {
#if defined(__AVX512F__)
  return _mm512_max_pd(a, b);
#elif defined(__AVX__)
  return _mm256_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

/// The lanes that are above their bounds, as the bits of a number.
inline std::uint32_t lanes_above(Vec vec, Vec bounds) noexcept {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(vec, bounds, _CMP_GT_OQ);
#elif defined(__AVX__)
  return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(vec, bounds, _CMP_GT_OQ)));
#else
  std::uint32_t bits = 0;
  for (std::size_t i = 0; i < kLanes; ++i) bits |= static_cast<std::uint32_t>(vec[i] > bounds[i]) << i;
  return bits;
#endif
}

inline std::int32_t max_of_lanes(IntVec vec) noexcept {
  return fold_lanes<std::int32_t, kLanes>(vec, [](auto a, auto b) { return a > b ? a : b; });
}

inline float max_of_lanes(Vec vec) noexcept {
  return fold_lanes<float, kLanes>(vec, [](auto a, auto b) { return a > b ? a : b; });
}

inline Vec magnitude(Vec x) noexcept {
  const IntVec bits = load_as<IntVec>(&x) & 0x7fffffff;
  return load_as<Vec>(&bits);
}

/// The integers nearest to values of magnitude below 2^22.
inline IntVec nearest(Vec x) noexcept {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec shifted = x + kMagic;
  const Vec magic = Vec{} + kMagic;
  return load_as<IntVec>(&shifted) - load_as<IntVec>(&magic);
}

/// exp(x) for x <= 0 to 2 units in the last place; 0 where the result would be denormal, NaN for NaN.
[[gnu::always_inline]] inline Vec exp_of_negative(Vec x) noexcept {
  constexpr float kSmallest = -87.3f, kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const auto underflows = x < kSmallest;
  const Vec bounded = underflows ? Vec{} : x;
  const IntVec n = nearest(bounded * kLog2E);
  const Vec power = __builtin_convertvector(n, Vec);
  const Vec r = (bounded - power * kLn2High) - power * kLn2Low;
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const IntVec exponent = (n + 127) << 23;
  return underflows ? Vec{} : p * load_as<Vec>(&exponent);
}

}  // namespace
}  // namespace tq_hb
