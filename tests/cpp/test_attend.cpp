#include <limits>

#include <gtest/gtest.h>

#include "backends.h"
#include "cache_case.h"

namespace tq_hb {
namespace {

// float32 sums of a few hundred terms, against float64 on the same codes.
constexpr double kFloat32Nmse = 1e-11;

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

TEST_P(Attend, OfEveryHeadSizePackingAndNumberOfQueries) {
  for (const unsigned head_dim : {64u, 128u, 256u, 512u}) {
    for (const auto& [packing, k_bits, v_bits] :
         {std::tuple{Packing::kByte, 8u, 6u}, std::tuple{Packing::kPlane, 5u, 6u},
          std::tuple{Packing::kPlane, 6u, 8u}}) {
      CacheCase test(6, 2, head_dim, 70, k_bits, v_bits, GetParam(), packing);
      EXPECT_LT(nmse(test.attend(), test.expected()), kFloat32Nmse) << head_dim << ' ' << k_bits;
      for (const unsigned queries : {1u, 2u, 7u, 8u, 9u, 17u}) {
        test.ask(queries);
        EXPECT_LT(nmse(test.attend(), test.expected()), kFloat32Nmse) << head_dim << ' ' << k_bits << ' ' << queries;
      }
    }
  }
}

TEST_P(Attend, NeverReadsWhatIsMasked) {
  CacheCase test(2, 1, 256, 40, 8, 8, GetParam());
  test.args.mask_type = 2;
  test.args.sliding_window = 10;
  const std::vector<float> before = test.attend();
  for (int slot = 0; slot < 30; ++slot) {
    test.k_norms.data<float>()[slot] = std::numeric_limits<float>::quiet_NaN();
    test.v_norms.data<float>()[slot] = std::numeric_limits<float>::infinity();
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
