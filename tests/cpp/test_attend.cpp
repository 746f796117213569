#include <limits>
#include <ostream>
#include <vector>

#include <gtest/gtest.h>

#include "backends.h"
#include "cache_case.h"
#include "expect_error.h"

namespace tq_hb {
namespace {

// float32 sums of a few hundred terms, against float64 on the same codes.
constexpr double kFloat32Nmse = 1e-11;
constexpr double kLse = 1e-4;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Format {
  unsigned head_dim;
  Packing packing;
  unsigned k_bits, v_bits;
};

std::vector<Format> formats() {
  std::vector<Format> all;
  for (const unsigned head_dim : {64u, 128u, 256u, 512u}) {
    all.push_back({head_dim, Packing::kByte, 8, 6});
    all.push_back({head_dim, Packing::kPlane, 5, 6});
    all.push_back({head_dim, Packing::kPlane, 6, 8});
    all.push_back({head_dim, Packing::kPlane, 8, 5});
  }
  return all;
}

std::ostream& operator<<(std::ostream& out, const Format& f) {
  return out << f.head_dim << (f.packing == Packing::kPlane ? " plane " : " byte ") << f.k_bits << ' ' << f.v_bits;
}

class Attend : public OnEveryBackend {};
TQ_RUN_ON_EVERY_BACKEND(Attend);

TEST_P(Attend, MatchesFloat64OnTheSameCodes) {
  for (const unsigned head_dim : {256u, 512u}) {
    for (const unsigned length : {1u, 15u, 16u, 17u, 31u, 33u, 127u, 128u, 129u, 513u}) {
      CacheCase test(6, 3, head_dim, length, 8, 5, GetParam());
      EXPECT_LT(nmse(test.attend(), test.expected()), kFloat32Nmse) << head_dim << ' ' << length;
    }
  }
}

TEST_P(Attend, HonoursWindowRingAndSoftcap) {
  for (const unsigned start : {0u, 1u, 20u, 69u}) {
    for (const unsigned window : {1u, 33u, 69u, 70u, 200u}) {
      CacheCase test(4, 1, 256, 70, 6, 6, GetParam());
      test.args.ring_start = start;
      test.args.mask_type = 2;
      test.args.sliding_window = window;
      test.args.softcap = 2.0f;
      test.args.scale = 0.5f;
      EXPECT_LT(nmse(test.attend(), test.expected()), kFloat32Nmse) << start << ' ' << window;
    }
  }
}

TEST_P(Attend, OfEveryFormatAndNumberOfQueries) {
  for (const Format& format : formats()) {
    CacheCase test(6, 2, format.head_dim, 45, format.k_bits, format.v_bits, GetParam(), format.packing);
    EXPECT_LT(nmse(test.attend(), test.expected()), kFloat32Nmse) << format;
    test.args.ring_start = 40;
    test.args.mask_type = 2;
    test.args.sliding_window = 20;
    for (const unsigned queries : {1u, 2u, 9u}) {
      test.ask(queries);
      EXPECT_LT(nmse(test.attend(), test.expected()), kFloat32Nmse) << format << ' ' << queries;
    }
  }
}

TEST_P(Attend, AddsSinksAndScoreBiasAndGivesTheLse) {
  for (const Format& format : formats()) {
    for (const float softcap : {0.0f, 2.0f}) {
      CacheCase test(4, 2, format.head_dim, 40, format.k_bits, format.v_bits, GetParam(), format.packing);
      test.args.softcap = softcap;
      test.args.mask_type = 2;
      test.args.sliding_window = 39;
      test.ask(3);
      test.add_lse();
      for (const bool with_sinks : {false, true}) {
        if (with_sinks) test.add_sinks();
        const CacheCase::Expected want = test.expected_with_lse();
        EXPECT_LT(nmse(test.attend(), want.output), kFloat32Nmse) << format << ' ' << softcap;
        EXPECT_TRUE(close(*test.lse, want.lse, kLse)) << format << ' ' << softcap;
      }
      test.add_score_bias();
      const CacheCase::Expected want = test.expected_with_lse();
      EXPECT_LT(nmse(test.attend(), want.output), kFloat32Nmse) << format << ' ' << softcap;
      EXPECT_TRUE(close(*test.lse, want.lse, kLse)) << format << ' ' << softcap;
    }
  }
}

TEST_P(Attend, AHugeScoreBiasCostsNoAccuracy) {
  CacheCase test(4, 2, 256, 40, 8, 8, GetParam());
  test.add_lse();
  test.add_sinks();
  test.add_score_bias();
  for (std::size_t h = 0; h < 4; ++h) {
    test.score_bias->data<float>()[h] *= 1000.0f;
    test.sinks->data<float>()[h] = test.score_bias->data<float>()[h];
  }
  const CacheCase::Expected want = test.expected_with_lse();
  EXPECT_LT(nmse(test.attend(), want.output), kFloat32Nmse);
  EXPECT_TRUE(close(*test.lse, want.lse, 1e-6));
}

TEST_P(Attend, ASinkCanTakeAllTheWeightOrNone) {
  CacheCase test(2, 1, 128, 20, 8, 8, GetParam());
  test.add_lse();
  const std::vector<float> without = test.attend();
  const std::vector<float> lse(test.lse->data<float>(), test.lse->data<float>() + 2);
  test.add_sinks();
  test.sinks->data<float>()[0] = -kInf;
  test.sinks->data<float>()[1] = 5000.0f;
  const std::vector<float> with = test.attend();
  EXPECT_EQ(std::vector<float>(with.begin(), with.begin() + 128),
            std::vector<float>(without.begin(), without.begin() + 128));
  EXPECT_EQ(test.lse->data<float>()[0], lse[0]);
  for (std::size_t j = 128; j < 256; ++j) ASSERT_EQ(with[j], 0.0f);
  EXPECT_EQ(test.lse->data<float>()[1], 5000.0f);
}

TEST_P(Attend, AtAnyPosition) {
  CacheCase test(4, 2, 128, 30, 8, 6, GetParam());
  test.ask(5);
  test.add_lse();
  test.args.mask_type = 2;
  test.args.sliding_window = 8;
  // From the first keys alone, past the newest, to where only the first of the queries still sees a key.
  for (const unsigned position : {4u, 20u, 29u, 30u, 33u, 40u}) {
    test.query_position = position;
    const CacheCase::Expected want = test.expected_with_lse();
    EXPECT_LT(nmse(test.attend(), want.output), kFloat32Nmse) << position;
    EXPECT_TRUE(close(*test.lse, want.lse, kLse)) << position;
  }
}

TEST_P(Attend, GivesZerosWhereNoKeyIsSeen) {
  CacheCase test(4, 2, 256, 30, 8, 8, GetParam());
  test.ask(3);
  test.add_lse();
  test.args.mask_type = 2;
  test.args.sliding_window = 8;
  for (const unsigned position : {38u, 39u, 4000000000u}) {
    test.query_position = position;
    const std::vector<float> got = test.attend();
    for (std::size_t i = 0; i < got.size(); ++i) {
      if (position == 38 && i < 1024) {
        ASSERT_NE(got[i], 0.0f);
      } else {
        ASSERT_EQ(got[i], 0.0f) << position << ' ' << i;
      }
    }
    for (std::size_t row = position == 38 ? 4 : 0; row < 12; ++row) {
      EXPECT_EQ(test.lse->data<float>()[row], -kInf) << position;
    }
  }
  test.add_sinks();
  for (const float x : test.attend()) ASSERT_EQ(x, 0.0f);
  for (std::size_t row = 0; row < 12; ++row) {
    EXPECT_FLOAT_EQ(test.lse->data<float>()[row], test.sinks->data<float>()[row % 4]);
  }
}

TEST_P(Attend, PlanesGiveTheBitsOfBytes) {
  for (const Format& format : formats()) {
    if (format.packing == Packing::kByte) continue;
    std::vector<std::vector<float>> results;
    for (const Packing packing : {Packing::kByte, Packing::kPlane}) {
      CacheCase test(4, 2, format.head_dim, 37, format.k_bits, format.v_bits, GetParam(), packing);
      test.ask(2);
      results.push_back(test.attend());
    }
    EXPECT_EQ(results[0], results[1]) << format;
  }
}

TEST_P(Attend, SeveralQueriesAreAsManyCalls) {
  CacheCase test(4, 2, 128, 50, 8, 6, GetParam());
  test.ask(11);
  const Buffer all = test.q;
  const std::vector<float> together = test.attend();
  test.output = test.device->empty(DType::kFloat32, {4, 128});
  for (unsigned i = 0; i < 11; ++i) {
    test.q = all.row(i);
    test.query_position = 39 + i;
    const auto at = together.begin() + i * 512;
    const std::vector<float> alone = test.attend();
    EXPECT_LT(nmse({at, at + 512}, {alone.begin(), alone.end()}), kFloat32Nmse) << i;
  }
}

TEST_P(Attend, LeavesTheResultsOfABadQuery) {
  for (const bool in_bias : {false, true}) {
    CacheCase test(4, 2, 256, 20, 8, 8, GetParam());
    test.ask(10);
    test.add_lse();
    test.add_score_bias();
    const std::vector<float> good = test.attend();
    const std::vector<float> good_lse(test.lse->data<float>(), test.lse->data<float>() + 40);
    constexpr std::size_t kRow = 9 * 4 + 2;
    if (in_bias) {
      test.score_bias->data<float>()[kRow] = kNan;
    } else {
      test.q.data<float>()[kRow * 256 + 255] = -kInf;
    }
    for (std::size_t j = 0; j < 256; ++j) test.output.data<float>()[kRow * 256 + j] = 42.0f;
    test.lse->data<float>()[kRow] = 43.0f;
    EXPECT_TQ_ERROR(test.attend(), ErrorCode::kInvalidArgument, "flash_attn_vec_tq_hb: q", "token 9, head 2");
    for (std::size_t i = 0; i < good.size(); ++i) {
      ASSERT_EQ(test.output.data<float>()[i], i / 256 == kRow ? 42.0f : good[i]) << in_bias << ' ' << i;
    }
    for (std::size_t row = 0; row < 40; ++row) {
      ASSERT_EQ(test.lse->data<float>()[row], row == kRow ? 43.0f : good_lse[row]) << in_bias << ' ' << row;
    }
  }
}

TEST_P(Attend, RotatesQueriesAndUndoesItOnRequest) {
  for (const unsigned head_dim : {64u, 128u, 256u, 512u}) {
    CacheCase test(4, 2, head_dim, 40, 8, 6, GetParam());
    test.ask(3);
    AttendOp op = test.attend_op();
    op.args.fuse_fwht_pre = 1;
    op.fused_undo = true;
    const auto encoder = test.device->make_encoder();
    encoder->flash_attn_vec(op);
    encoder->commit();
    encoder->wait();
    std::vector<float> got(test.output.data<float>(), test.output.data<float>() + test.output.size());
    for (std::size_t row = 0; row < 12; ++row) {
      rotate_row(got.data() + row * head_dim, head_dim);
      rotate_row(test.q.data<float>() + row * head_dim, head_dim);
    }
    EXPECT_LT(nmse(got, test.expected()), kFloat32Nmse) << head_dim;
  }
}

TEST_P(Attend, NeverReadsWhatIsMasked) {
  CacheCase test(2, 1, 256, 40, 8, 8, GetParam());
  test.args.mask_type = 2;
  test.args.sliding_window = 10;
  const std::vector<float> before = test.attend();
  for (int slot = 0; slot < 30; ++slot) {
    test.k_norms.data<float>()[slot] = kNan;
    test.v_norms.data<float>()[slot] = kInf;
  }
  EXPECT_EQ(test.attend(), before);
}

TEST_P(Attend, KeepsItsOrderAtExtremeScales) {
  CacheCase test(2, 1, 256, 40, 8, 8, GetParam());
  for (std::uint64_t i = 0; i < test.q.size(); ++i) test.q.data<float>()[i] *= 1e37f;
  test.args.scale = 0.01f;
  EXPECT_LT(nmse(test.attend(), test.expected()), kFloat32Nmse);
}

}  // namespace
}  // namespace tq_hb
