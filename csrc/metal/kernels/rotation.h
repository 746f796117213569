// The signed Walsh-Hadamard rotation of one row held by a SIMD group: lane t has the E = D / 32
// consecutive coordinates from E * t on.
//
// The additions come in the order of the host's butterfly, so both give the same bits.
#pragma once

#include "core/codec_constants.h"
#include "metal/kernels/tables.h"

/// Natural-order butterflies with strides 1, 2, 4, ...: inside the lane, then across lanes. Unscaled.
template <int E>
inline void hadamard(thread float (&y)[E], ushort lane) {
#pragma clang fp contract(off)
  for (int stride = 1; stride < E; stride *= 2) {
    for (int i = 0; i < E; ++i) {
      if ((i & stride) == 0) {
        const float a = y[i];
        const float b = y[i + stride];
        y[i] = a + b;
        y[i + stride] = a - b;
      }
    }
  }
  for (ushort mask = 1; mask < 32; mask *= 2) {
    const bool upper = (lane & mask) != 0;
    for (int i = 0; i < E; ++i) {
      const float other = simd_shuffle_xor(y[i], mask);
      y[i] = upper ? other - y[i] : y[i] + other;
    }
  }
}

template <int E>
inline void flip_signs(thread float (&y)[E], ushort lane) {
  for (int i = 0; i < E; ++i) {
    const uint coordinate = uint(lane) * E + i;
    if ((kSignBits[coordinate / 8] >> (coordinate % 8)) & 1) y[i] = -y[i];
  }
}

/// R: signs, butterflies, scale.
template <int E>
inline void rotate_row(thread float (&y)[E], ushort lane) {
  flip_signs<E>(y, lane);
  hadamard<E>(y, lane);
  for (int i = 0; i < E; ++i) y[i] *= tq_hb::inverse_sqrt_head_dim(32 * E);
}

/// The inverse of R: butterflies, scale, signs.
template <int E>
inline void unrotate_row(thread float (&y)[E], ushort lane) {
  hadamard<E>(y, lane);
  for (int i = 0; i < E; ++i) y[i] *= tq_hb::inverse_sqrt_head_dim(32 * E);
  flip_signs<E>(y, lane);
}

/// Rows move in vectors of four, the shortest in vectors of two.
template <int E>
inline void load_row(device const float* row, ushort lane, thread float (&y)[E]) {
  constexpr int kWidth = E < 4 ? E : 4;
  device const vec<float, kWidth>* from = (device const vec<float, kWidth>*)row + uint(lane) * (E / kWidth);
  for (int i = 0; i < E / kWidth; ++i) {
    const vec<float, kWidth> values = from[i];
    for (int c = 0; c < kWidth; ++c) y[kWidth * i + c] = values[c];
  }
}

template <int E>
inline void store_row(device float* row, ushort lane, thread const float (&y)[E]) {
  constexpr int kWidth = E < 4 ? E : 4;
  device vec<float, kWidth>* to = (device vec<float, kWidth>*)row + uint(lane) * (E / kWidth);
  for (int i = 0; i < E / kWidth; ++i) {
    vec<float, kWidth> values;
    for (int c = 0; c < kWidth; ++c) values[c] = y[kWidth * i + c];
    to[i] = values;
  }
}
