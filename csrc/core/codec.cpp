#include "core/codec.h"

#include <cmath>
#include <cstring>

#include "core/codec_constants.h"

namespace tq_hb {
namespace {

/// Four values, by the extension that g++ and clang share.
typedef float Four __attribute__((vector_size(16)));

/// The values at four places. g++ has clang's name for it from version 12 on only.
template <int kA, int kB, int kC, int kD>
inline Four pick(Four x) noexcept {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, kA, kB, kC, kD);
#else
  typedef std::int32_t Places __attribute__((vector_size(16)));
  return __builtin_shuffle(x, Places{kA, kB, kC, kD});
#endif
}

inline void butterfly(Four& a, Four& b) noexcept {
  const Four sum = a + b;
  b = a - b;
  a = sum;
}

/// The butterflies of strides 1 and 2 among four values.
inline Four transform_four(Four x) noexcept {
  constexpr Four kAlternate = {1.0f, -1.0f, 1.0f, -1.0f}, kHalves = {1.0f, 1.0f, -1.0f, -1.0f};
  x = pick<0, 0, 2, 2>(x) + kAlternate * pick<1, 1, 3, 3>(x);
  return pick<0, 1, 0, 1>(x) + kHalves * pick<2, 3, 2, 3>(x);
}

/// Natural-order Walsh-Hadamard butterflies, unscaled: strides 1, 2, 4, ..., two at a time on the values at hand.
void hadamard(float* row, std::size_t head_dim) noexcept {
  Four values[kMaxHeadDim / 4];
  const std::size_t count = head_dim / 4;
  std::memcpy(values, row, head_dim * sizeof(float));
  for (std::size_t i = 0; i < count; ++i) values[i] = transform_four(values[i]);
  std::size_t stride = 1;
  for (; 2 * stride < count; stride *= 4) {
    for (std::size_t start = 0; start < count; start += 4 * stride) {
      Four* v = values + start;
      for (std::size_t j = 0; j < stride; ++j) {
        Four a = v[j], b = v[j + stride], c = v[j + 2 * stride], d = v[j + 3 * stride];
        butterfly(a, b);
        butterfly(c, d);
        butterfly(a, c);
        butterfly(b, d);
        v[j] = a;
        v[j + stride] = b;
        v[j + 2 * stride] = c;
        v[j + 3 * stride] = d;
      }
    }
  }
  if (stride < count) {
    for (std::size_t j = 0; j < stride; ++j) butterfly(values[j], values[j + stride]);
  }
  std::memcpy(row, values, head_dim * sizeof(float));
}

/// Sum of squares of one norm block: 32 lanes over the whole row, serial inside a lane, then an XOR tree.
///
/// A lane outside the block adds an exact zero, so the tree over the block's own lanes gives the same bits.
float block_energy(const float* block, std::size_t block_dim, std::size_t head_dim) noexcept {
  const std::size_t per_lane = head_dim / kEnergyLanes;
  const std::size_t lanes = block_dim / per_lane;
  float sums[kEnergyLanes];
  for (std::size_t lane = 0; lane < lanes; ++lane) {
    float sum = 0.0f;
    for (std::size_t j = 0; j < per_lane; ++j) {
      const float y = block[lane * per_lane + j];
      sum += y * y;
    }
    sums[lane] = sum;
  }
  for (std::size_t step = 1; step < lanes; step *= 2) {
    for (std::size_t lane = 0; lane < lanes; lane += 2 * step) sums[lane] += sums[lane + step];
  }
  return sums[0];
}

/// Rotates `src` into `y`, flushes tiny values and computes the norms; false if a norm is not finite.
bool rotate_and_measure(const float* src, std::size_t head_dim, float* y, float* norms) noexcept {
  std::memcpy(y, src, head_dim * sizeof(float));
  rotate_row(y, head_dim);
  for (std::size_t j = 0; j < head_dim; ++j) y[j] = std::fabs(y[j]) < kFlushBelow ? 0.0f : y[j];
  const std::size_t blocks = norms_per_row(head_dim);
  const std::size_t block_dim = head_dim / blocks;
  bool finite = true;
  for (std::size_t b = 0; b < blocks; ++b) {
    const float energy = block_energy(y + b * block_dim, block_dim, head_dim);
    // Dividing the energy instead would give the same bits but could pass through a denormal.
    norms[b] = std::sqrt(energy) * (blocks == 1 ? 1.0f : kBlockRms);
    finite = finite && std::isfinite(norms[b]);
  }
  return finite;
}

}  // namespace

void rotate_row(float* row, std::size_t head_dim) noexcept {
  const float* signs = sign_table();
  for (std::size_t j = 0; j < head_dim; ++j) row[j] *= signs[j];
  hadamard(row, head_dim);
  const float scale = inverse_sqrt_head_dim(head_dim);
  for (std::size_t j = 0; j < head_dim; ++j) row[j] *= scale;
}

void unrotate_row(float* row, std::size_t head_dim) noexcept {
  hadamard(row, head_dim);
  const float* signs = sign_table();
  const float scale = inverse_sqrt_head_dim(head_dim);
  for (std::size_t j = 0; j < head_dim; ++j) row[j] = row[j] * scale * signs[j];
}

void transform_row(float* row, std::size_t head_dim) noexcept {
  hadamard(row, head_dim);
  const float scale = inverse_sqrt_head_dim(head_dim);
  for (std::size_t j = 0; j < head_dim; ++j) row[j] *= scale;
}

bool encode_row(const float* src, std::size_t head_dim, float scale_factor_d512, const Codebook& codebook,
                std::uint8_t* codes, float* norms) noexcept {
  float y[kMaxHeadDim];
  float measured[kMaxHeadDim / kNormBlock];
  if (!rotate_and_measure(src, head_dim, y, measured)) return false;

  const std::size_t blocks = norms_per_row(head_dim);
  const std::size_t block_dim = head_dim / blocks;
  for (std::size_t b = 0; b < blocks; ++b) {
    const float norm = measured[b];
    const float inverse = norm > kSmallestNorm ? 1.0f / norm : 0.0f;
    std::uint8_t* block_codes = codes + b * block_dim;
    norms[b] = norm;
    float* v = y + b * block_dim;
    if (blocks == 1) {
      const float to_unit_variance = inverse * std::sqrt(static_cast<float>(head_dim));
      for (std::size_t j = 0; j < block_dim; ++j) v[j] *= to_unit_variance;
    } else {
      for (std::size_t j = 0; j < block_dim; ++j) v[j] = v[j] * inverse * scale_factor_d512;
    }
    constexpr std::size_t kAtOnce = 32;
    for (std::size_t j = 0; j < block_dim; j += kAtOnce) codebook.indices_of<kAtOnce>(v + j, block_codes + j);
  }
  return true;
}

bool is_encodable_row(const float* src, std::size_t head_dim) noexcept {
  // A row this small cannot overflow anywhere below; NaN and infinity fail the comparison.
  constexpr float kSafeEnergy = 1e30f;
  constexpr std::size_t kSums = 4;
  Four sums[kSums] = {};
  for (std::size_t j = 0; j < head_dim; j += 4 * kSums) {
    for (std::size_t i = 0; i < kSums; ++i) {
      Four x;
      std::memcpy(&x, src + j + 4 * i, sizeof(x));
      sums[i] += x * x;
    }
  }
  const Four sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  if (sum[0] + sum[1] + sum[2] + sum[3] < kSafeEnergy) return true;
  float y[kMaxHeadDim];
  float norms[kMaxHeadDim / kNormBlock];
  return rotate_and_measure(src, head_dim, y, norms);
}

bool is_finite_row(const float* row, std::size_t head_dim) noexcept {
  // What is not finite has all bits of its exponent set: one more, and they carry into the sign's place.
  constexpr std::uint32_t kExponent = 0x7f800000, kOne = 0x00800000;
  std::uint32_t carries = 0;
  for (std::size_t j = 0; j < head_dim; ++j) {
    std::uint32_t bits;
    std::memcpy(&bits, row + j, sizeof(bits));
    carries |= (bits & kExponent) + kOne;
  }
  return carries >> 31 == 0;
}

float decode_factor(float norm, std::size_t head_dim, float scale_factor_d512) noexcept {
  return norms_per_row(head_dim) == 1 ? norm * inverse_sqrt_head_dim(head_dim) : norm / scale_factor_d512;
}

void decode_row(const std::uint8_t* codes, const float* norms, std::size_t head_dim, float scale_factor_d512,
                const Codebook& codebook, float* out) noexcept {
  const std::size_t block_dim = head_dim / norms_per_row(head_dim);
  const unsigned mask = codebook.num_levels() - 1;
  for (std::size_t b = 0; b < norms_per_row(head_dim); ++b) {
    const float factor = decode_factor(norms[b], head_dim, scale_factor_d512);
    for (std::size_t j = b * block_dim; j < (b + 1) * block_dim; ++j) {
      out[j] = codebook.levels[codes[j] & mask] * factor;
    }
  }
}

}  // namespace tq_hb
