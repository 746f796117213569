// Metal's scalar and vector types, constructors and conversions.
#pragma once

typedef signed char int8_t;
typedef unsigned char uint8_t, uchar;
typedef short int16_t;
typedef unsigned short uint16_t, ushort;
typedef int int32_t;
typedef unsigned int uint32_t, uint;
typedef long int64_t, ptrdiff_t;
typedef unsigned long uint64_t, ulong, size_t;
typedef _Float16 half;
typedef __bf16 bfloat;

constexpr half operator""h(long double value) {
  return static_cast<half>(value);
}
constexpr half operator""h(unsigned long long value) {
  return static_cast<half>(value);
}

#define METAL_SIM_INLINE inline __attribute__((always_inline))

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

#define METAL_SIM_VECTORS(T)                          \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
METAL_SIM_VECTORS(bool)
METAL_SIM_VECTORS(char)
METAL_SIM_VECTORS(uchar)
METAL_SIM_VECTORS(short)
METAL_SIM_VECTORS(ushort)
METAL_SIM_VECTORS(int)
METAL_SIM_VECTORS(uint)
METAL_SIM_VECTORS(long)
METAL_SIM_VECTORS(ulong)
METAL_SIM_VECTORS(half)
METAL_SIM_VECTORS(bfloat)
METAL_SIM_VECTORS(float)
#undef METAL_SIM_VECTORS

template <class A, class B>
struct is_same {
  static constexpr bool value = false;
};
template <class A>
struct is_same<A, A> {
  static constexpr bool value = true;
};
template <class A, class B>
constexpr bool is_same_v = is_same<A, B>::value;

template <bool, class A, class B>
struct conditional {
  typedef A type;
};
template <class A, class B>
struct conditional<false, A, B> {
  typedef B type;
};
template <bool condition, class A, class B>
using conditional_t = typename conditional<condition, A, B>::type;

template <bool, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool condition, class T = void>
using enable_if_t = typename enable_if<condition, T>::type;

template <class T>
struct numeric_limits;
template <>
struct numeric_limits<float> {
  static constexpr float infinity() { return __builtin_inff(); }
  static constexpr float quiet_NaN() { return __builtin_nanf(""); }
  static constexpr float max() { return 0x1.fffffep+127f; }
  static constexpr float lowest() { return -max(); }
  static constexpr float min() { return 0x1p-126f; }
  static constexpr float epsilon() { return 0x1p-23f; }
};
template <>
struct numeric_limits<half> {
  static constexpr half infinity() { return half(__builtin_inff()); }
  static constexpr half quiet_NaN() { return half(__builtin_nanf("")); }
  static constexpr half max() { return half(65504.0f); }
  static constexpr half lowest() { return -max(); }
  static constexpr half min() { return half(0x1p-14f); }
  static constexpr half epsilon() { return half(0x1p-10f); }
};
template <>
struct numeric_limits<int> {
  static constexpr int max() { return 0x7fffffff; }
  static constexpr int min() { return -0x7fffffff - 1; }
  static constexpr int lowest() { return min(); }
};
template <>
struct numeric_limits<uint> {
  static constexpr uint max() { return 0xffffffffu; }
  static constexpr uint min() { return 0; }
  static constexpr uint lowest() { return 0; }
};

}  // namespace metal

namespace metal_sim {

template <class T>
struct Shape {
  typedef T Element;
  static constexpr int size = 1;
};
template <class T>
struct Shape<metal::vec<T, 2>> {
  typedef T Element;
  static constexpr int size = 2;
};
template <class T>
struct Shape<metal::vec<T, 3>> {
  typedef T Element;
  static constexpr int size = 3;
};
template <class T>
struct Shape<metal::vec<T, 4>> {
  typedef T Element;
  static constexpr int size = 4;
};

template <class V, class A>
METAL_SIM_INLINE void append(V& vector, int& next, A value) {
  typedef typename Shape<V>::Element Element;
  if constexpr (Shape<A>::size == 1) {
    vector[next++] = static_cast<Element>(value);
  } else {
    for (int i = 0; i < Shape<A>::size; ++i) vector[next++] = static_cast<Element>(value[i]);
  }
}

// Stands for Metal's functional casts to vectors, which C++ has not: the translator writes make<float4>(...).
template <class V>
METAL_SIM_INLINE constexpr V make() {
  return V(0);
}
template <class V, class A>
METAL_SIM_INLINE constexpr V make(A value) {
  if constexpr (Shape<V>::size == 1) {
    return static_cast<V>(value);
  } else if constexpr (Shape<A>::size == 1) {
    return static_cast<V>(static_cast<typename Shape<V>::Element>(value));
  } else {
    static_assert(Shape<V>::size == Shape<A>::size, "a vector conversion keeps the number of components");
    return __builtin_convertvector(value, V);
  }
}
template <class V, class A, class B, class... Rest>
METAL_SIM_INLINE V make(A first, B second, Rest... rest) {
  static_assert(Shape<A>::size + Shape<B>::size + (0 + ... + Shape<Rest>::size) == Shape<V>::size,
                "wrong number of vector components");
  V vector;
  int next = 0;
  append(vector, next, first);
  append(vector, next, second);
  (append(vector, next, rest), ...);
  return vector;
}

// Stands in a division that only integers may make: dividend / integers / divisor, value /= integers / divisor.
struct Integers {};
constexpr Integers integers{};

template <class T>
constexpr bool is_integer_v = T(1) / T(2) == T(0);
template <class T>
constexpr bool is_integer_v<metal::vec<T, 2>> = is_integer_v<T>;
template <class T>
constexpr bool is_integer_v<metal::vec<T, 3>> = is_integer_v<T>;
template <class T>
constexpr bool is_integer_v<metal::vec<T, 4>> = is_integer_v<T>;

template <class T>
struct Dividend {
  T value;
};
template <class T>
METAL_SIM_INLINE constexpr Dividend<T> operator/(T value, Integers) {
  return {value};
}
template <class T, class U>
METAL_SIM_INLINE constexpr auto operator/(Dividend<T> dividend, U divisor) {
  static_assert(is_integer_v<T> && is_integer_v<U>, "an encoder divides floats by precise::divide");
  return dividend.value / divisor;
}

template <class T>
struct Divisor {
  T value;
};
template <class T>
METAL_SIM_INLINE constexpr Divisor<T> operator/(Integers, T value) {
  return {value};
}
template <class T, class U>
METAL_SIM_INLINE constexpr T& operator/=(T& value, Divisor<U> divisor) {
  static_assert(is_integer_v<T> && is_integer_v<U>, "an encoder divides floats by precise::divide");
  return value /= divisor.value;
}

}  // namespace metal_sim

namespace metal {

template <class T, class S>
METAL_SIM_INLINE T as_type(S value) {
  static_assert(sizeof(T) == sizeof(S), "as_type keeps the size");
  return __builtin_bit_cast(T, value);
}

}  // namespace metal
