// The primitives of float32_lookup.h in NEON.
#pragma once

#include "cpu/int16_neon.h"

namespace tq_hb {
namespace {

constexpr unsigned kMostTableBits = 8;
constexpr std::size_t kMostFusedRows = 4;

struct FloatLevels {
  Vec vectors[4];
};

/// Joins the bytes of 16 floats, the lowest first.
inline FloatLevels join_floats(const uint8x16_t (&bytes)[4]) noexcept {
  FloatLevels levels;
  const auto put = [&](std::size_t i, uint8x16_t low, uint8x16_t high) {
    const uint16x8x2_t words = vzipq_u16(vreinterpretq_u16_u8(low), vreinterpretq_u16_u8(high));
    levels.vectors[i] = vreinterpretq_f32_u16(words.val[0]);
    levels.vectors[i + 1] = vreinterpretq_f32_u16(words.val[1]);
  };
  const uint8x16x2_t low = vzipq_u8(bytes[0], bytes[1]), high = vzipq_u8(bytes[2], bytes[3]);
  put(0, low.val[0], high.val[0]);
  put(2, low.val[1], high.val[1]);
  return levels;
}

/// A table of 32 or 64 bytes serves a code as it is. For 8 bits a codebook's lower half does, negative levels, and the
/// sign is put right by the code's.
template <unsigned kBits>
class FloatLookup {
 public:
  explicit FloatLookup(const LevelTable& levels) noexcept : levels_(levels) {}

  FloatLevels of(uint8x16_t codes) const noexcept {
    uint8x16_t bytes[4];
    if constexpr (kBits < 8) {
      const uint8x16_t index = vandq_u8(codes, vdupq_n_u8((1 << kBits) - 1));
#pragma GCC unroll 4
      for (std::size_t plane = 0; plane < 4; ++plane) bytes[plane] = look_up(levels_.bytes[plane], index);
    } else {
      const uint8x16_t sign = vcltzq_s8(vreinterpretq_s8_u8(codes));
      const uint8x16_t index = veorq_u8(codes, sign), beyond = vsubq_u8(index, vdupq_n_u8(64));
#pragma GCC unroll 4
      for (std::size_t plane = 0; plane < 4; ++plane) {
        // An index outside a table gives 0 in the first and leaves what was found in the second.
        const uint8x16_t found = vqtbl4q_u8(vld1q_u8_x4(levels_.bytes[plane]), index);
        bytes[plane] = vqtbx4q_u8(found, vld1q_u8_x4(levels_.bytes[plane] + 64), beyond);
      }
      bytes[3] = veorq_u8(bytes[3], vandq_u8(sign, vdupq_n_u8(0x80)));
    }
    return join_floats(bytes);
  }

 private:
  static uint8x16_t look_up(const std::uint8_t* table, uint8x16_t index) noexcept {
    if constexpr (kBits == 5) {
      return vqtbl2q_u8(vld1q_u8_x2(table), index);
    } else {
      return vqtbl4q_u8(vld1q_u8_x4(table), index);
    }
  }

  const LevelTable& levels_;
};

}  // namespace
}  // namespace tq_hb
