#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "core/bits.h"
#include "core/codec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace tq_hb {
namespace {

/// Encodes `rows` rows of a fixed pseudo-random stream and returns the FNV-1a hash of all codes and norms.
///
/// mt19937 and the arithmetic below give the same inputs everywhere, unlike the standard distributions.
std::uint64_t hash_of_encoded_stream(std::size_t head_dim, unsigned cbits, CodebookName name, int exponent) {
  constexpr std::size_t kRows = 512;
  std::mt19937 random(static_cast<unsigned>(head_dim + cbits));
  const Codebook& codebook = find_codebook("test", name, cbits);
  std::uint64_t hash = 14695981039346656037ull;
  const auto mix = [&](const void* data, std::size_t size) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    for (std::size_t i = 0; i < size; ++i) hash = (hash ^ bytes[i]) * 1099511628211ull;
  };
  std::vector<float> row(head_dim);
  std::vector<std::uint8_t> codes(head_dim);
  std::vector<float> norms(norms_per_row(head_dim));
  for (std::size_t r = 0; r < kRows; ++r) {
    for (float& x : row) {
      // Twelve-bit summands keep the input exact; their sum is roughly Gaussian.
      int sum = -6 * 4095;
      for (int i = 0; i < 12; ++i) sum += static_cast<int>(random() >> 20);
      x = std::ldexp(static_cast<float>(sum), exponent - 12);
    }
    if (r % 7 == 0) std::fill(row.begin() + 1, row.end(), 0.0f);
    EXPECT_TRUE(encode_row(row.data(), head_dim, 1.0f, codebook, codes.data(), norms.data()));
    mix(codes.data(), codes.size());
    mix(norms.data(), norms.size() * sizeof(float));
  }
  return hash;
}

struct Pinned {
  std::size_t head_dim;
  unsigned cbits;
  CodebookName name;
  int exponent;
  std::uint64_t hash;
};

// These pin the format: a change here breaks every cache that has been stored.
constexpr Pinned kPinned[] = {
    {64, 5, CodebookName::kLloydMax, 0, 765470562479429303ull},
    {64, 8, CodebookName::kMlxNative, -100, 17013530155241521957ull},
    {128, 6, CodebookName::kLloydMax, 0, 9227731377794571845ull},
    {128, 8, CodebookName::kLloydMax, -59, 5374639840693732893ull},
    {256, 5, CodebookName::kLloydMax, 0, 193337822954143186ull},
    {256, 8, CodebookName::kLloydMax, -100, 11385559339389993765ull},
    {256, 8, CodebookName::kMlxNative, 40, 13352585438343306942ull},
    {512, 6, CodebookName::kLloydMax, 0, 5244522771868952685ull},
    {512, 8, CodebookName::kLloydMax, -59, 15612996331299492253ull},
    {512, 8, CodebookName::kMlxNative, -140, 11874665356686484261ull},
};

void expect_pinned_bytes() {
  for (const Pinned& pinned : kPinned) {
    EXPECT_EQ(hash_of_encoded_stream(pinned.head_dim, pinned.cbits, pinned.name, pinned.exponent), pinned.hash)
        << "head_dim " << pinned.head_dim << ", " << pinned.cbits << " bits, exponent " << pinned.exponent;
  }
}

TEST(Encode, BytesAreThoseOfTheFormat) {
  expect_pinned_bytes();
}

#if defined(__SSE2__)
TEST(Encode, BytesDoNotDependOnFlushingDenormals) {
  const unsigned before = _mm_getcsr();
  constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  _mm_setcsr(before | kFlushToZero | kDenormalsAreZero);
  expect_pinned_bytes();
  _mm_setcsr(before);
}
#endif

double norm_of(const std::vector<float>& row) {
  double sum = 0.0;
  for (const float x : row) sum += static_cast<double>(x) * static_cast<double>(x);
  return std::sqrt(sum);
}

/// Decodes and un-rotates.
std::vector<float> rebuild(const std::vector<std::uint8_t>& codes, const float* norms, const Codebook& codebook) {
  std::vector<float> row(codes.size());
  decode_row(codes.data(), norms, codes.size(), 1.0f, codebook, row.data());
  unrotate_row(row.data(), codes.size());
  return row;
}

class RoundTrip : public testing::TestWithParam<std::tuple<std::size_t, unsigned>> {};

TEST_P(RoundTrip, StaysWithinTheQuantisersError) {
  const auto [head_dim, cbits] = GetParam();
  const Codebook& codebook = find_codebook("test", CodebookName::kLloydMax, cbits);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  double error = 0.0, energy = 0.0;
  for (int r = 0; r < 64; ++r) {
    std::vector<float> row(head_dim);
    // Energy of the first half differs, so that a wrong norm per block would show.
    for (std::size_t j = 0; j < head_dim; ++j) row[j] = normal(random) * (j < head_dim / 2 ? 10.0f : 1.0f);
    std::vector<std::uint8_t> codes(head_dim);
    float norms[2];
    ASSERT_TRUE(encode_row(row.data(), head_dim, 1.0f, codebook, codes.data(), norms));
    const std::vector<float> back = rebuild(codes, norms, codebook);
    for (std::size_t j = 0; j < head_dim; ++j) error += std::pow(static_cast<double>(row[j] - back[j]), 2);
    energy += std::pow(norm_of(row), 2);
  }
  // The N(0, 1) quantiser's error, plus a tenth for the finite sample.
  const double expected = cbits == 5 ? 2.505e-3 : cbits == 6 ? 6.442e-4 : 4.119e-5;
  EXPECT_LT(error / energy, 1.1 * expected);
  EXPECT_GT(error / energy, 0.8 * expected);
}

INSTANTIATE_TEST_SUITE_P(All, RoundTrip,
                         testing::Combine(testing::Values(64, 128, 256, 512), testing::Values(5, 6, 8)));

TEST(Rotation, KeepsNormsAndInverts) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (const std::size_t head_dim : {64u, 128u, 256u, 512u}) {
    std::vector<float> row(head_dim);
    for (float& x : row) x = normal(random);
    std::vector<float> turned = row;
    rotate_row(turned.data(), head_dim);
    EXPECT_NEAR(norm_of(turned), norm_of(row), 1e-5 * norm_of(row));
    unrotate_row(turned.data(), head_dim);
    for (std::size_t j = 0; j < head_dim; ++j) EXPECT_NEAR(turned[j], row[j], 1e-5);
  }
}

TEST(Encode, ZerosTakeTheMiddleAndDecodeToZero) {
  for (const std::size_t head_dim : {64u, 128u, 256u, 512u}) {
    const std::vector<float> zeros(head_dim, 0.0f);
    std::vector<std::uint8_t> codes(head_dim, 255);
    float norms[2] = {1.0f, 1.0f};
    ASSERT_TRUE(encode_row(zeros.data(), head_dim, 1.0f, find_codebook("test", CodebookName::kLloydMax, 6),
                           codes.data(), norms));
    for (const std::uint8_t code : codes) EXPECT_EQ(code, 31);
    EXPECT_EQ(norms[0], 0.0f);
  }
}

TEST(Encode, RefusesWhatIsNotFiniteAndWritesNothing) {
  const Codebook& codebook = find_codebook("test", CodebookName::kLloydMax, 8);
  constexpr float kBad[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity(), std::numeric_limits<float>::max(), 4e19f};
  for (const std::size_t head_dim : {64u, 128u, 256u, 512u}) {
    for (const float bad : kBad) {
      std::vector<float> row(head_dim, 1.0f);
      row[head_dim - 1] = bad;
      std::vector<std::uint8_t> codes(head_dim, 77);
      float norms[2] = {5.0f, 6.0f};
      EXPECT_FALSE(is_encodable_row(row.data(), head_dim)) << bad;
      EXPECT_FALSE(encode_row(row.data(), head_dim, 1.0f, codebook, codes.data(), norms)) << bad;
      for (const std::uint8_t code : codes) ASSERT_EQ(code, 77);
      EXPECT_EQ(norms[0], 5.0f);
      EXPECT_EQ(norms[1], 6.0f);
    }
  }
}

TEST(Encode, AcceptsTheLargestNormThatFits) {
  std::vector<float> row(256, 0.0f);
  row[3] = 1.8e19f;
  EXPECT_TRUE(is_encodable_row(row.data(), 256));
  row[3] = 1.9e19f;
  EXPECT_FALSE(is_encodable_row(row.data(), 256));
}

TEST(Decode, IgnoresBitsAboveTheWidth) {
  const Codebook& codebook = find_codebook("test", CodebookName::kLloydMax, 5);
  std::vector<std::uint8_t> low(256), high(256);
  for (std::size_t j = 0; j < 256; ++j) {
    low[j] = static_cast<std::uint8_t>(j % 32);
    high[j] = static_cast<std::uint8_t>(low[j] | 0xE0);
  }
  const float norm = 3.0f;
  std::vector<float> a(256), b(256);
  decode_row(low.data(), &norm, 256, 1.0f, codebook, a.data());
  decode_row(high.data(), &norm, 256, 1.0f, codebook, b.data());
  EXPECT_EQ(a, b);
}

TEST(Decode, ScaleFactorUndoesTheEncoders) {
  const Codebook& codebook = find_codebook("test", CodebookName::kLloydMax, 8);
  std::vector<float> row(512), plain(512), scaled(512);
  for (std::size_t j = 0; j < 512; ++j) row[j] = static_cast<float>(j % 13) - 6.0f;
  for (const float factor : {1.0f, 0.5f}) {
    std::vector<std::uint8_t> codes(512);
    float norms[2];
    ASSERT_TRUE(encode_row(row.data(), 512, factor, codebook, codes.data(), norms));
    decode_row(codes.data(), norms, 512, factor, codebook, factor == 1.0f ? plain.data() : scaled.data());
  }
  for (std::size_t j = 0; j < 512; ++j) EXPECT_NEAR(plain[j], scaled[j], 0.3);
}

}  // namespace
}  // namespace tq_hb
