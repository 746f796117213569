// Metal's mathematics: float functions by the C library, half through float, vectors by component.
#pragma once

#include "types.h"

namespace metal {

#define METAL_SIM_UNARY(name, expression)          \
  METAL_SIM_INLINE float name(float x) {           \
    return expression;                             \
  }                                                \
  METAL_SIM_INLINE half name(half x) {             \
    return half(name(float(x)));                   \
  }                                                \
  template <class T, int N>                        \
  METAL_SIM_INLINE vec<T, N> name(vec<T, N> x) {   \
    for (int i = 0; i < N; ++i) x[i] = name(x[i]); \
    return x;                                      \
  }
METAL_SIM_UNARY(acos, __builtin_acosf(x))
METAL_SIM_UNARY(asin, __builtin_asinf(x))
METAL_SIM_UNARY(atan, __builtin_atanf(x))
METAL_SIM_UNARY(ceil, __builtin_ceilf(x))
METAL_SIM_UNARY(cos, __builtin_cosf(x))
METAL_SIM_UNARY(cosh, __builtin_coshf(x))
METAL_SIM_UNARY(exp, __builtin_expf(x))
METAL_SIM_UNARY(exp10, __builtin_powf(10.0f, x))
METAL_SIM_UNARY(exp2, __builtin_exp2f(x))
METAL_SIM_UNARY(fabs, __builtin_fabsf(x))
METAL_SIM_UNARY(floor, __builtin_floorf(x))
METAL_SIM_UNARY(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
METAL_SIM_UNARY(log, __builtin_logf(x))
METAL_SIM_UNARY(log10, __builtin_log10f(x))
METAL_SIM_UNARY(log2, __builtin_log2f(x))
METAL_SIM_UNARY(rint, __builtin_rintf(x))
METAL_SIM_UNARY(round, __builtin_roundf(x))
METAL_SIM_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))
METAL_SIM_UNARY(saturate, x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f)
METAL_SIM_UNARY(sign, x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : 0.0f))
METAL_SIM_UNARY(sin, __builtin_sinf(x))
METAL_SIM_UNARY(sinh, __builtin_sinhf(x))
METAL_SIM_UNARY(sqrt, __builtin_sqrtf(x))
METAL_SIM_UNARY(tan, __builtin_tanf(x))
METAL_SIM_UNARY(tanh, __builtin_tanhf(x))
METAL_SIM_UNARY(trunc, __builtin_truncf(x))
#undef METAL_SIM_UNARY

#define METAL_SIM_BINARY(name, expression)                    \
  METAL_SIM_INLINE float name(float x, float y) {             \
    return expression;                                        \
  }                                                           \
  METAL_SIM_INLINE half name(half x, half y) {                \
    return half(name(float(x), float(y)));                    \
  }                                                           \
  template <class T, int N>                                   \
  METAL_SIM_INLINE vec<T, N> name(vec<T, N> x, vec<T, N> y) { \
    for (int i = 0; i < N; ++i) x[i] = name(x[i], y[i]);      \
    return x;                                                 \
  }
METAL_SIM_BINARY(atan2, __builtin_atan2f(x, y))
METAL_SIM_BINARY(copysign, __builtin_copysignf(x, y))
METAL_SIM_BINARY(divide, x / y)
METAL_SIM_BINARY(fdim, __builtin_fdimf(x, y))
METAL_SIM_BINARY(fmax, __builtin_fmaxf(x, y))
METAL_SIM_BINARY(fmin, __builtin_fminf(x, y))
METAL_SIM_BINARY(fmod, __builtin_fmodf(x, y))
METAL_SIM_BINARY(pow, __builtin_powf(x, y))
METAL_SIM_BINARY(powr, __builtin_powf(x, y))
METAL_SIM_BINARY(step, y < x ? 0.0f : 1.0f)
#undef METAL_SIM_BINARY

METAL_SIM_INLINE float fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
METAL_SIM_INLINE half fma(half a, half b, half c) {
  return half(__builtin_fmaf(float(a), float(b), float(c)));
}
template <class T, int N>
METAL_SIM_INLINE vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  for (int i = 0; i < N; ++i) a[i] = fma(a[i], b[i], c[i]);
  return a;
}
template <class T>
METAL_SIM_INLINE T mad(T a, T b, T c) {
  return a * b + c;
}
template <class T>
METAL_SIM_INLINE T mix(T x, T y, T a) {
  return x + (y - x) * a;
}

METAL_SIM_INLINE float ldexp(float x, int exponent) {
  return __builtin_ldexpf(x, exponent);
}
METAL_SIM_INLINE float frexp(float x, int& exponent) {
  return __builtin_frexpf(x, &exponent);
}
METAL_SIM_INLINE int ilogb(float x) {
  return __builtin_ilogbf(x);
}
METAL_SIM_INLINE float modf(float x, float& whole) {
  return __builtin_modff(x, &whole);
}
METAL_SIM_INLINE float sincos(float x, float& cosine) {
  cosine = __builtin_cosf(x);
  return __builtin_sinf(x);
}

// The names that exist in a fast and a precise form. Both are the precise one here.
#define METAL_SIM_FORMS                                                                                           \
  using metal::acos, metal::asin, metal::atan, metal::atan2, metal::ceil, metal::cos, metal::cosh, metal::divide, \
      metal::exp, metal::exp10, metal::exp2, metal::fabs, metal::floor, metal::fma, metal::fmax, metal::fmin,     \
      metal::fmod, metal::fract, metal::log, metal::log10, metal::log2, metal::pow, metal::powr, metal::rint,     \
      metal::round, metal::rsqrt, metal::sin, metal::sincos, metal::sinh, metal::sqrt, metal::tan, metal::tanh,   \
      metal::trunc;
namespace fast {
METAL_SIM_FORMS
}
namespace precise {
METAL_SIM_FORMS
}
#undef METAL_SIM_FORMS

// Both arguments have one type, as in Metal: max(1.0f, 2) is ambiguous there and refused here. Of two floats of which
// one is NaN the other is taken, as by fmax and fmin.
template <class T>
METAL_SIM_INLINE constexpr T max(T a, T b) {
  if constexpr (metal_sim::Shape<T>::size == 1) {
    return a < b || __builtin_isnan(float(a)) ? b : a;
  } else {
    return __builtin_elementwise_max(a, b);
  }
}
template <class T>
METAL_SIM_INLINE constexpr T min(T a, T b) {
  if constexpr (metal_sim::Shape<T>::size == 1) {
    return b < a || __builtin_isnan(float(a)) ? b : a;
  } else {
    return __builtin_elementwise_min(a, b);
  }
}
template <class T>
METAL_SIM_INLINE constexpr T max3(T a, T b, T c) {
  return max(a, max(b, c));
}
template <class T>
METAL_SIM_INLINE constexpr T min3(T a, T b, T c) {
  return min(a, min(b, c));
}
template <class T>
METAL_SIM_INLINE constexpr T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <class T>
METAL_SIM_INLINE T abs(T x) {
  return __builtin_elementwise_abs(x);
}

template <class T>
METAL_SIM_INLINE T select(T if_false, T if_true, bool condition) {
  return condition ? if_true : if_false;
}
template <class T, int N, class M>
METAL_SIM_INLINE vec<T, N> select(vec<T, N> if_false, vec<T, N> if_true, vec<M, N> condition) {
  for (int i = 0; i < N; ++i) if_false[i] = condition[i] ? if_true[i] : if_false[i];
  return if_false;
}
template <class T, int N>
METAL_SIM_INLINE bool any(vec<T, N> x) {
  for (int i = 0; i < N; ++i) {
    if (x[i]) return true;
  }
  return false;
}
template <class T, int N>
METAL_SIM_INLINE bool all(vec<T, N> x) {
  for (int i = 0; i < N; ++i) {
    if (!x[i]) return false;
  }
  return true;
}

template <class T>
METAL_SIM_INLINE bool isnan(T x) {
  return __builtin_isnan(float(x));
}
template <class T>
METAL_SIM_INLINE bool isinf(T x) {
  return __builtin_isinf(float(x));
}
template <class T>
METAL_SIM_INLINE bool isfinite(T x) {
  return __builtin_isfinite(float(x));
}
template <class T>
METAL_SIM_INLINE bool signbit(T x) {
  return __builtin_signbit(float(x));
}

template <class T, int N>
METAL_SIM_INLINE T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; ++i) sum += a[i] * b[i];
  return sum;
}
template <class T, int N>
METAL_SIM_INLINE T length_squared(vec<T, N> x) {
  return dot(x, x);
}
template <class T, int N>
METAL_SIM_INLINE T length(vec<T, N> x) {
  return sqrt(dot(x, x));
}
template <class T, int N>
METAL_SIM_INLINE vec<T, N> normalize(vec<T, N> x) {
  return x * rsqrt(dot(x, x));
}

METAL_SIM_INLINE uint popcount(uint x) {
  return uint(__builtin_popcount(x));
}
METAL_SIM_INLINE uint clz(uint x) {
  return x == 0 ? 32u : uint(__builtin_clz(x));
}
METAL_SIM_INLINE uint ctz(uint x) {
  return x == 0 ? 32u : uint(__builtin_ctz(x));
}
METAL_SIM_INLINE uint reverse_bits(uint x) {
  return __builtin_bitreverse32(x);
}
METAL_SIM_INLINE uint rotate(uint x, uint count) {
  return __builtin_rotateleft32(x, count);
}
METAL_SIM_INLINE uint mulhi(uint x, uint y) {
  return uint((ulong(x) * y) >> 32);
}
METAL_SIM_INLINE int mulhi(int x, int y) {
  return int((long(x) * y) >> 32);
}
METAL_SIM_INLINE uint extract_bits(uint x, uint offset, uint bits) {
  return bits == 0 ? 0u : (x >> offset) & (0xffffffffu >> (32 - bits));
}
METAL_SIM_INLINE int extract_bits(int x, uint offset, uint bits) {
  return bits == 0 ? 0 : int(uint(x) << (32 - bits - offset)) >> (32 - bits);
}
METAL_SIM_INLINE uint insert_bits(uint base, uint insert, uint offset, uint bits) {
  const uint mask = bits == 0 ? 0u : (0xffffffffu >> (32 - bits)) << offset;
  return (base & ~mask) | ((insert << offset) & mask);
}

}  // namespace metal
