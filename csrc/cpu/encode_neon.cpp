#include <arm_neon.h>

#include "cpu/encode_kernel.h"
#include "cpu/simd.h"

namespace tq_hb {
namespace {

typedef std::uint32_t Words __attribute__((vector_size(16)));

inline Vec load_quarters(const float* const* rows, std::size_t offset) noexcept {
  return vld1q_f32(rows[0] + offset);
}

inline void store_quarters(std::uint8_t* const* rows, std::size_t offset, Vec v) noexcept {
  store(rows[0] + offset, v);
}

inline Vec unpack_low(Vec a, Vec b) noexcept {
  return vzip1q_f32(a, b);
}
inline Vec unpack_high(Vec a, Vec b) noexcept {
  return vzip2q_f32(a, b);
}
inline Vec unpack_low_pairs(Vec a, Vec b) noexcept {
  return vreinterpretq_f32_f64(vzip1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}
inline Vec unpack_high_pairs(Vec a, Vec b) noexcept {
  return vreinterpretq_f32_f64(vzip2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}

/// The nodes' boundaries, out of kCount from kFirst on. Four registers have 16, of which a lookup takes bytes; a node
/// that is in others leaves what was found before.
template <std::size_t kFirst, std::size_t kCount>
inline IntVec look_up(const SearchTree& tree, IntVec node) noexcept {
  uint8x16_t found = vdupq_n_u8(0);
#pragma GCC unroll 4
  for (std::size_t i = kFirst; i < kFirst + kCount; i += 16) {
    const uint8x16x4_t table = vld1q_u8_x4(reinterpret_cast<const std::uint8_t*>(tree.nodes + i));
    // Four bytes in a row for each node; those of nodes before or beyond the table are 64 and more.
    const Words bytes = ((Words)node - static_cast<std::uint32_t>(i)) * 0x04040404u + 0x03020100u;
    found = vqtbx4q_u8(found, table, (uint8x16_t)bytes);
  }
  return (IntVec)found;
}

template <unsigned kLevels, unsigned kLevel = 0>
inline IntVec descend(IntVec keys, const SearchTree& tree, IntVec node = IntVec{} + 1) noexcept {
  if constexpr (kLevel == kLevels) {
    return node;
  } else {
    // The first four levels lie in the first registers.
    constexpr std::size_t kFirst = kLevel < 4 ? 0 : 1 << kLevel, kCount = kLevel < 4 ? 16 : 1 << kLevel;
    const IntVec right = keys > look_up<kFirst, kCount>(tree, node);
    return descend<kLevels, kLevel + 1>(keys, tree, node + node - right);
  }
}

}  // namespace
}  // namespace tq_hb

// Its primitives come first.
#include "cpu/encode_rows.h"

namespace tq_hb {

std::uint32_t encode_rows_neon(const EncodeTask& task) noexcept {
  return encode_rows(task);
}

}  // namespace tq_hb
