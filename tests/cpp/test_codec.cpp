#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/bits.h"
#include "core/codec.h"
#include "cpu/isa.h"
#include "cpu/search_tree.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace tq_hb {
namespace {

/// The encoder of every instruction set that this processor runs, the portable one first.
struct Encoder {
  std::string isa;
  EncodeRows* encode;
};

std::vector<Encoder> encoders() {
  const std::string before = attend_kernel().isa;
  std::vector<Encoder> all;
  for (const IsaKernel* kernel : available_kernels()) {
    set_attend_kernel("test", "isa", kernel->isa);
    all.push_back({kernel->isa, &encode_kernel()});
  }
  set_attend_kernel("test", "isa", before);
  return all;
}

/// Rows that were encoded together, and what came of them.
struct Encoded {
  std::vector<std::uint8_t> codes;
  std::vector<float> norms;
  std::uint32_t refused;

  bool operator==(const Encoded& other) const {
    return codes == other.codes && refused == other.refused &&
           std::memcmp(norms.data(), other.norms.data(), norms.size() * sizeof(float)) == 0;
  }
};

/// Encodes rows [rows][head_dim]; a row that is refused keeps codes of 77 and norms of 5.
Encoded encode_with(EncodeRows& encode, const std::vector<float>& rows, std::size_t head_dim, const Codebook& codebook,
                    float scale_factor = 1.0f) {
  const std::size_t count = rows.size() / head_dim, norms = norms_per_row(head_dim);
  Encoded out{std::vector<std::uint8_t>(rows.size(), 77), std::vector<float>(count * norms, 5.0f), 0};
  std::vector<std::uint8_t*> codes;
  std::vector<float*> row_norms;
  for (std::size_t i = 0; i < count; ++i) {
    codes.push_back(out.codes.data() + i * head_dim);
    row_norms.push_back(out.norms.data() + i * norms);
  }
  EncodeTask task{};
  task.src = rows.data();
  task.rows = count;
  task.head_dim = head_dim;
  task.scale_factor_d512 = scale_factor;
  task.codebook = &codebook;
  task.tree = &search_tree(codebook);
  task.cbits = codebook.cbits;
  task.codes = codes.data();
  task.norms = row_norms.data();
  out.refused = encode(task);
  return out;
}

/// Encodes `rows` rows of a fixed pseudo-random stream and returns the FNV-1a hash of all codes and norms.
///
/// mt19937 and the arithmetic below give the same inputs everywhere, unlike the standard distributions.
std::uint64_t hash_of_encoded_stream(EncodeRows& encode, std::size_t head_dim, unsigned cbits, CodebookName name,
                                     int exponent) {
  constexpr std::size_t kRows = 512;
  std::mt19937 random(static_cast<unsigned>(head_dim + cbits));
  const Codebook& codebook = find_codebook("test", name, cbits);
  std::uint64_t hash = 14695981039346656037ull;
  const auto mix = [&](const void* data, std::size_t size) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    for (std::size_t i = 0; i < size; ++i) hash = (hash ^ bytes[i]) * 1099511628211ull;
  };
  std::vector<float> row(head_dim);
  for (std::size_t r = 0; r < kRows; ++r) {
    for (float& x : row) {
      // Twelve-bit summands keep the input exact; their sum is roughly Gaussian.
      int sum = -6 * 4095;
      for (int i = 0; i < 12; ++i) sum += static_cast<int>(random() >> 20);
      x = std::ldexp(static_cast<float>(sum), exponent - 12);
    }
    if (r % 7 == 0) std::fill(row.begin() + 1, row.end(), 0.0f);
    const Encoded encoded = encode_with(encode, row, head_dim, codebook);
    EXPECT_EQ(encoded.refused, 0u);
    mix(encoded.codes.data(), encoded.codes.size());
    mix(encoded.norms.data(), encoded.norms.size() * sizeof(float));
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
  for (const Encoder& encoder : encoders()) {
    for (const Pinned& pinned : kPinned) {
      EXPECT_EQ(hash_of_encoded_stream(*encoder.encode, pinned.head_dim, pinned.cbits, pinned.name, pinned.exponent),
                pinned.hash)
          << encoder.isa << ", head_dim " << pinned.head_dim << ", " << pinned.cbits << " bits, exponent "
          << pinned.exponent;
    }
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

constexpr std::size_t kHeadDims[] = {64, 128, 256, 512};
constexpr CodebookName kCodebookNames[] = {CodebookName::kLloydMax, CodebookName::kMlxNative};

/// A run of rows whose magnitudes go from where all is flushed to where squares nearly overflow.
std::vector<float> random_rows(std::mt19937& random, std::size_t count, std::size_t head_dim) {
  std::vector<float> rows;
  for (std::size_t r = 0; r < count; ++r) {
    const int exponent = static_cast<int>(random() % 8 == 0 ? random() % 160 : 90 + random() % 20) - 100;
    for (std::size_t j = 0; j < head_dim; ++j) {
      const auto uniform = [&] { return static_cast<float>(random()) * 0x1p-32f - 0.5f; };
      rows.push_back(std::ldexp(uniform() + uniform() + uniform(), exponent));
    }
  }
  return rows;
}

// Ten million values and more for every instruction set.
TEST(EveryEncoder, GivesTheBytesOfThePortableOne) {
  const std::vector<Encoder> all = encoders();
  std::mt19937 random(3);
  for (const std::size_t head_dim : kHeadDims) {
    for (std::size_t values = 0; values < 2'700'000; values += kEncodeRows * head_dim) {
      const std::vector<float> rows = random_rows(random, kEncodeRows, head_dim);
      const unsigned cbits = std::array{5u, 6u, 8u}[random() % 3];
      const Codebook& codebook = find_codebook("test", kCodebookNames[random() % 2], cbits);
      const Encoded want = encode_with(*all[0].encode, rows, head_dim, codebook, 1.25f);
      for (const Encoder& encoder : all) {
        ASSERT_TRUE(encode_with(*encoder.encode, rows, head_dim, codebook, 1.25f) == want)
            << encoder.isa << ", head_dim " << head_dim << ", " << cbits << " bits";
      }
    }
  }
}

TEST(EveryEncoder, TakesAnyNumberOfRows) {
  const std::vector<Encoder> all = encoders();
  std::mt19937 random(4);
  for (const std::size_t head_dim : kHeadDims) {
    for (std::size_t count = 1; count <= kEncodeRows; ++count) {
      std::vector<float> rows = random_rows(random, count, head_dim);
      // One row of zeros of either sign, and one that is refused.
      const std::size_t zeros = random() % count * head_dim, bad = random() % count * head_dim;
      for (std::size_t j = 0; j < head_dim; ++j) rows[zeros + j] = j % 2 == 0 ? 0.0f : -0.0f;
      rows[bad + random() % head_dim] = std::array{NAN, INFINITY, -INFINITY, 1e38f}[random() % 4];
      for (const unsigned cbits : {5u, 6u, 8u}) {
        const Codebook& codebook = find_codebook("test", CodebookName::kLloydMax, cbits);
        const Encoded want = encode_with(*all[0].encode, rows, head_dim, codebook);
        EXPECT_EQ(want.refused, 1u << bad / head_dim);
        for (const Encoder& encoder : all) {
          EXPECT_TRUE(encode_with(*encoder.encode, rows, head_dim, codebook) == want)
              << encoder.isa << ", head_dim " << head_dim << ", " << cbits << " bits, " << count << " rows";
        }
      }
    }
  }
}

// A rotated unit vector has one magnitude everywhere, which the scale factor moves across every boundary in the
// smallest steps there are.
TEST(EveryEncoder, SharesTheRuleForTies) {
  constexpr std::size_t kHeadDim = 512;
  std::vector<float> row(kHeadDim);
  row[7] = 3.0f;
  std::vector<float> rotated = row;
  rotate_row(rotated.data(), kHeadDim);
  const std::vector<Encoder> all = encoders();
  for (const CodebookName name : kCodebookNames) {
    for (const unsigned cbits : {5u, 6u, 8u}) {
      const Codebook& codebook = find_codebook("test", name, cbits);
      const unsigned half = codebook.num_levels() / 2;
      unsigned ties = 0;
      for (unsigned i = half; i < codebook.num_levels() - 1; ++i) {
        float factor = codebook.boundaries[i];
        for (int step = 0; step < 4; ++step) factor = std::nextafter(factor, 0.0f);
        for (int step = 0; step < 9; ++step, factor = std::nextafter(factor, 100.0f)) {
          const Encoded want = encode_with(*all[0].encode, row, kHeadDim, codebook, factor);
          for (const Encoder& encoder : all) {
            ASSERT_TRUE(encode_with(*encoder.encode, row, kHeadDim, codebook, factor) == want) << encoder.isa;
          }
          const float value = std::fabs(rotated[0]) * (1.0f / want.norms[0]) * factor;
          if (value != codebook.boundaries[i]) continue;
          ++ties;
          for (std::size_t j = 0; j < kHeadDim; ++j) {
            // The lower index: nearer to zero above it, farther below.
            ASSERT_EQ(want.codes[j], rotated[j] > 0.0f ? i : codebook.num_levels() - 2 - i);
          }
        }
      }
      EXPECT_GE(ties, half - 1) << cbits;
    }
  }
}

TEST(EveryEncoder, TakesFactorsThatOverflowAndUnderflow) {
  const std::vector<Encoder> all = encoders();
  std::mt19937 random(5);
  const std::vector<float> rows = random_rows(random, kEncodeRows, 512);
  const Codebook& codebook = find_codebook("test", CodebookName::kLloydMax, 8);
  for (const float factor : {1e-45f, 1e-38f, 1e-30f, 1e30f, 3e38f}) {
    const Encoded want = encode_with(*all[0].encode, rows, 512, codebook, factor);
    for (const Encoder& encoder : all) {
      EXPECT_TRUE(encode_with(*encoder.encode, rows, 512, codebook, factor) == want) << encoder.isa << ' ' << factor;
    }
  }
}

// The search trees hold one half of the boundaries.
TEST(Boundaries, AreSymmetric) {
  for (const CodebookName name : kCodebookNames) {
    for (const unsigned cbits : {5u, 6u, 8u}) {
      const Codebook& codebook = find_codebook("test", name, cbits);
      const unsigned count = codebook.num_levels() - 1;
      for (unsigned i = 0; i < count; ++i) EXPECT_EQ(codebook.boundaries[i], -codebook.boundaries[count - 1 - i]);
    }
  }
}

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

TEST(EveryRotation, GivesTheBitsOfTheCodecs) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (const IsaKernel* kernel : available_kernels()) {
    for (const std::size_t head_dim : {64u, 128u, 256u, 512u}) {
      for (const float scale : {1.0f, 1e-40f, 1e37f, 0.0f}) {
        std::vector<float> row(head_dim);
        for (float& x : row) x = scale * normal(random);
        for (const bool inverse : {false, true}) {
          std::vector<float> expected = row, turned = row;
          (inverse ? unrotate_row : rotate_row)(expected.data(), head_dim);
          (inverse ? kernel->unrotate : kernel->rotate)(turned.data(), head_dim);
          EXPECT_EQ(std::memcmp(turned.data(), expected.data(), head_dim * sizeof(float)), 0)
              << kernel->isa << ' ' << head_dim << ' ' << scale << ' ' << inverse;
        }
      }
    }
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
