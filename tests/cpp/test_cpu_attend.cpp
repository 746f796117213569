#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "cache_case.h"
#include "core/codec.h"
#include "cpu/device.h"
#include "cpu/isa.h"

namespace tq_hb {
namespace {

// float32 sums of a few hundred terms, against float64 on the same codes.
constexpr double kFloat32Nmse = 1e-11;
constexpr double kFloat32Lse = 1e-6;
// 16-bit products: a relative error of 5e-4 in the output, 2e-3 in lse.
constexpr double kInt16Nmse = 2.5e-7;
constexpr double kInt16Lse = 2e-3;

TEST(CpuAttend, KeepsItsOrderWhereScoresExceedFloat32) {
  CacheCase test(2, 1, 256, 40);
  for (std::uint64_t i = 0; i < test.q.size(); ++i) test.q.data<float>()[i] *= 1e37f;
  test.args.scale = 1e38f;
  EXPECT_LT(nmse(test.attend(), test.expected()), kFloat32Nmse);
  // Whether or not fixed point tells the largest two apart, the output is a value and no NaN.
  test.precision = Precision::kDefault;
  for (const float value : test.attend()) EXPECT_TRUE(std::isfinite(value));
}

TEST(CpuAttend, ScalesAQueryByAPowerOfTwo) {
  constexpr std::size_t kHeadDim = 64;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const IsaKernel* kernel : available_kernels()) {
    for (const std::size_t place : {0u, 7u, 31u, 63u}) {
      for (const float largest : {0.0f, 1e-45f, 1e-38f, 1.2e-38f, -1.0f, 1.99f, -2.0f, 3e38f, -3.4028235e38f}) {
        float q[kHeadDim], scaled[kHeadDim];
        for (std::size_t j = 0; j < kHeadDim; ++j) q[j] = largest / static_cast<float>(2 + j);
        q[place] = largest;
        const double undo = kernel->scale_query(q, kHeadDim, scaled);
        ASSERT_EQ(std::exp2(std::round(std::log2(undo))), undo) << kernel->isa;
        const double magnitude = std::fabs(static_cast<double>(scaled[place]));
        // What is below the smallest normal number keeps its distance from 1, and the largest ones are 2 at least.
        EXPECT_LT(magnitude, 4.0) << kernel->isa << " " << largest;
        if (std::fabs(largest) >= 1.2e-38f) {
          EXPECT_GE(magnitude, 1.0) << kernel->isa << " " << largest;
        }
        for (std::size_t j = 0; j < kHeadDim; ++j) {
          EXPECT_EQ(static_cast<double>(scaled[j]) * undo, static_cast<double>(q[j])) << kernel->isa << " " << largest;
        }
      }
      for (const float bad : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
        float q[kHeadDim], scaled[kHeadDim];
        std::fill_n(q, kHeadDim, 1.0f);
        q[place] = bad;
        EXPECT_TRUE(std::isnan(kernel->scale_query(q, kHeadDim, scaled))) << kernel->isa << " " << bad;
        for (const float value : scaled) EXPECT_EQ(value, 0.0f);
      }
    }
  }
}

TEST(CpuAttend, GivesTheSameBitsForAnyNumberOfThreads) {
  const unsigned before = cpu_num_threads();
  for (const unsigned queries : {1u, 2u, 9u, 10u}) {
    CacheCase test(8, 4, 64, 700, 5, 6, "cpu", Packing::kPlane);
    test.ask(queries);
    test.precision = queries % 2 == 0 ? Precision::kDefault : Precision::kStrict;
    test.args.scale *= 4.0f;  // so that default precision scores keys again
    std::vector<std::vector<float>> results;
    for (const unsigned threads : {1u, 2u, 3u, 5u}) {
      set_cpu_num_threads(threads);
      results.push_back(test.attend());
    }
    for (const auto& result : results) EXPECT_EQ(result, results.front());
  }
  set_cpu_num_threads(before);
}

TEST(CpuAttend, OfEveryLayoutMatchesFloat64) {
  struct Mask {
    unsigned ring_start, window;
  };
  for (const unsigned head_dim : {64u, 128u, 256u, 512u}) {
    for (const Packing packing : {Packing::kByte, Packing::kPlane}) {
      CacheCase test(3, 1, head_dim, 70, 6, 5, "cpu", packing);
      for (const Mask mask : {Mask{0, 0}, Mask{69, 1}, Mask{20, 33}}) {
        for (const unsigned queries : {1u, 2u, 7u, 8u, 9u, 17u}) {
          for (const float softcap : {0.0f, 3.0f}) {
            test.args.ring_start = mask.ring_start;
            test.args.mask_type = mask.window != 0 ? 2 : 0;
            test.args.sliding_window = mask.window;
            test.args.softcap = softcap;
            test.ask(queries);
            test.add_lse();
            test.sinks.reset();
            test.score_bias.reset();
            for (const bool more : {false, true}) {
              if (more) {
                test.add_sinks();
                test.add_score_bias();
              }
              const CacheCase::Expected want = test.expected_with_lse();
              const auto describe = [&](const char* what) {
                return std::string(what) + " of " + std::to_string(queries) + " queries, head_dim " +
                       std::to_string(head_dim) + ", window " + std::to_string(mask.window);
              };
              EXPECT_LT(nmse(test.attend(), want.output), kFloat32Nmse) << describe("output");
              EXPECT_TRUE(close(*test.lse, want.lse, kFloat32Lse)) << describe("lse");
            }
          }
        }
      }
    }
  }
}

TEST(CpuAttend, MergesRangesThatOnlySomeQueriesSee) {
  struct Shape {
    unsigned keys, window;
  };
  // Ranges of 256 keys, of which the last holds few or the first query sees none.
  for (const Shape shape : {Shape{257, 0}, Shape{600, 253}, Shape{513, 0}, Shape{700, 260}}) {
    CacheCase test(4, 2, 128, shape.keys, 5, 8, "cpu", Packing::kPlane);
    test.args.mask_type = shape.window != 0 ? 2 : 0;
    test.args.sliding_window = shape.window;
    test.ask(10);
    test.add_lse();
    for (const bool with_sinks : {false, true}) {
      if (with_sinks) test.add_sinks();
      const CacheCase::Expected want = test.expected_with_lse();
      EXPECT_LT(nmse(test.attend(), want.output), kFloat32Nmse) << shape.keys;
      EXPECT_TRUE(close(*test.lse, want.lse, kFloat32Lse)) << shape.keys;
    }
  }
}

TEST(CpuAttend, KeysThatAQueryDoesNotSeeNeverTouchIt) {
  constexpr unsigned kHeads = 2, kQueries = 9, kKeys = 40, kWindow = 10;
  for (const auto& [head_dim, precision] :
       {std::pair(64u, Precision::kStrict), std::pair(512u, Precision::kStrict), std::pair(64u, Precision::kDefault),
        std::pair(512u, Precision::kDefault)}) {
    CacheCase test(kHeads, 1, head_dim, kKeys);
    test.ask(kQueries);
    test.precision = precision;
    test.args.mask_type = 2;
    test.args.sliding_window = kWindow;
    const std::vector<float> before = test.attend();
    const std::size_t norms = test.k_norms.size() / kKeys;
    const auto with_norm = [&](const Buffer& side, unsigned key, float value) {
      float* norm = side.data<float>() + key * norms;
      const float kept = *norm;
      *norm = value;
      const std::vector<float> after = test.attend();
      *norm = kept;
      return after;
    };
    for (unsigned key = 0; key < kKeys; ++key) {
      for (const Buffer* side : {&test.k_norms, &test.v_norms}) {
        const std::vector<float> after = with_norm(*side, key, std::numeric_limits<float>::quiet_NaN());
        const std::vector<float> after_large = with_norm(*side, key, 1e3f);
        for (unsigned query = 0; query < kQueries; ++query) {
          const unsigned position = kKeys - kQueries + query;
          const bool sees = key <= position && position - key < kWindow;
          for (std::size_t i = query * kHeads * head_dim; i < (query + 1) * kHeads * head_dim; ++i) {
            // A value's norm spoils its own block of coordinates, a key's all of them.
            const bool spoilt = sees && (side == &test.k_norms || i % head_dim < 256);
            ASSERT_TRUE(spoilt ? std::isnan(after[i]) : after[i] == before[i]) << key << ' ' << query << ' ' << i;
            ASSERT_TRUE(sees || after_large[i] == before[i]) << key << ' ' << query << ' ' << i;
          }
        }
      }
    }
  }
}

/// Has ops run with an instruction set until it goes out of scope.
class ForcedIsa {
 public:
  explicit ForcedIsa(const std::string& isa) : before_(cpu_isa()) { set_cpu_isa("test", "isa", isa); }
  ~ForcedIsa() { set_cpu_isa("test", "isa", before_); }

 private:
  std::string before_;
};

TEST(CpuAttend, OfEveryInstructionSetAndPrecisionMatchesFloat64) {
  struct Rows {
    unsigned heads, queries;
  };
  for (const unsigned head_dim : {64u, 128u, 256u, 512u}) {
    for (const Packing packing : {Packing::kByte, Packing::kPlane}) {
      for (const unsigned bits : {5u, 6u, 8u}) {
        for (const auto [heads, queries] :
             {Rows{1, 1}, Rows{2, 1}, Rows{3, 1}, Rows{4, 1}, Rows{5, 1}, Rows{8, 1}, Rows{3, 3}, Rows{17, 1}}) {
          CacheCase test(heads, 1, head_dim, 300, bits, bits, "cpu", packing);
          test.ask(queries);
          test.add_lse();
          test.args.ring_start = 20;  // wraps inside a tile
          for (const unsigned window : {0u, 37u}) {
            test.args.mask_type = window != 0 ? 2 : 0;
            test.args.sliding_window = window;
            const CacheCase::Expected want = test.expected_with_lse();
            for (const std::string& isa : cpu_isas()) {
              const ForcedIsa forced(isa);
              for (const Precision precision : {Precision::kDefault, Precision::kStrict}) {
                test.precision = precision;
                const bool is_strict = precision == Precision::kStrict;
                const std::string what = isa + ", " + name_of(precision) + ", head_dim " + std::to_string(head_dim) +
                                         ", " + std::to_string(bits) + " bits, window " + std::to_string(window) +
                                         ", " + std::to_string(heads) + " heads, " + std::to_string(queries) +
                                         " queries";
                EXPECT_LT(nmse(test.attend(), want.output), is_strict ? kFloat32Nmse : kInt16Nmse) << what;
                EXPECT_TRUE(close(*test.lse, want.lse, is_strict ? kFloat32Lse : kInt16Lse)) << what;
              }
            }
          }
        }
      }
    }
  }
}

TEST(CpuAttend, GivesTheSameBitsForBothPackings) {
  for (const std::string& isa : cpu_isas()) {
    const ForcedIsa forced(isa);
    for (const Precision precision : {Precision::kDefault, Precision::kStrict}) {
      for (const unsigned head_dim : {64u, 128u, 256u, 512u}) {
        for (const unsigned bits : {5u, 6u}) {
          for (const unsigned heads : {1u, 2u, 4u, 7u, 8u, 9u}) {
            std::vector<std::vector<float>> results;
            for (const Packing packing : {Packing::kByte, Packing::kPlane}) {
              CacheCase test(heads, 1, head_dim, 109, bits, bits, "cpu", packing);
              test.precision = precision;
              test.args.scale *= 4.0f;  // so that default precision scores keys again
              results.push_back(test.attend());
            }
            EXPECT_EQ(results[0], results[1])
                << isa << ' ' << name_of(precision) << ' ' << head_dim << ' ' << bits << ' ' << heads;
          }
        }
      }
    }
  }
}

/// Rows that share the loads of a key, or its decoding, do not share its sums.
TEST(CpuAttend, GivesAHeadTheSameStrictBitsInAnyGroup) {
  constexpr unsigned kHeads = 9, kKeys = 109;
  for (const std::string& isa : cpu_isas()) {
    const ForcedIsa forced(isa);
    for (const unsigned head_dim : {64u, 512u}) {
      for (const unsigned bits : {5u, 6u, 8u}) {
        const Packing packing = bits == 6 ? Packing::kPlane : Packing::kByte;
        CacheCase whole(kHeads, 1, head_dim, kKeys, bits, bits, "cpu", packing);
        whole.precision = Precision::kStrict;
        const std::vector<float> all = whole.attend();
        for (const unsigned heads : {1u, 2u, 3u, 4u}) {
          CacheCase group(heads, 1, head_dim, kKeys, bits, bits, "cpu", packing);
          group.precision = Precision::kStrict;
          group.k_packed = whole.k_packed;
          group.v_packed = whole.v_packed;
          group.k_norms = whole.k_norms;
          group.v_norms = whole.v_norms;
          for (std::size_t first = 0; first + heads <= kHeads; first += heads) {
            std::copy_n(whole.q.data<float>() + first * head_dim, heads * head_dim, group.q.data<float>());
            const auto begin = all.begin() + static_cast<std::ptrdiff_t>(first * head_dim);
            EXPECT_EQ(group.attend(), std::vector<float>(begin, begin + heads * head_dim))
                << isa << ", D = " << head_dim << ", " << bits << " bits, " << heads << " heads from " << first;
          }
        }
      }
    }
  }
}

TEST(CpuAttend, GivesTheBitsOfAvx2WithAvxVnni) {
  const std::vector<std::string> isas = cpu_isas();
  if (std::find(isas.begin(), isas.end(), "avxvnni") == isas.end()) GTEST_SKIP() << "no AVX-VNNI here";
  for (const unsigned bits : {5u, 6u, 8u}) {
    CacheCase test(9, 1, 128, 77, bits, bits);
    test.precision = Precision::kDefault;
    test.args.scale *= 4.0f;  // so that keys are scored again
    std::vector<std::vector<float>> results;
    for (const char* isa : {"avx2", "avxvnni"}) {
      const ForcedIsa forced(isa);
      results.push_back(test.attend());
    }
    EXPECT_EQ(results[0], results[1]) << bits;
  }
}

/// Bits of a byte above a code's width are dropped.
TEST(CpuAttend, ReadsNoBitAboveTheWidth) {
  for (const std::string& isa : cpu_isas()) {
    const ForcedIsa forced(isa);
    for (const Precision precision : {Precision::kDefault, Precision::kStrict}) {
      for (const unsigned bits : {5u, 6u}) {
        CacheCase test(2, 1, 128, 40, bits, bits);
        test.precision = precision;
        const std::vector<float> want = test.attend();
        for (const Buffer* packed : {&test.k_packed, &test.v_packed}) {
          for (std::uint64_t i = 0; i < packed->size(); ++i) {
            std::uint8_t& code = packed->data<std::uint8_t>()[i];
            code = static_cast<std::uint8_t>(code | (i * 37) << bits);
          }
        }
        EXPECT_EQ(test.attend(), want) << isa << ' ' << name_of(precision) << ' ' << bits;
      }
    }
  }
}

/// Queries, weights and levels at the ends of their ranges, where sums of products would overflow first.
TEST(CpuAttend, OverflowsForNoCodesQueriesOrNorms) {
  struct Extreme {
    const char* what;
    bool is_spike;
    float norm;
  };
  constexpr float kMax = std::numeric_limits<float>::max();
  for (const std::string& isa : cpu_isas()) {
    const ForcedIsa forced(isa);
    for (const unsigned head_dim : {64u, 256u, 512u}) {
      for (const unsigned bits : {5u, 8u}) {
        for (const Extreme extreme : {Extreme{"equal", false, 1.0f}, Extreme{"spike", true, 1.0f},
                                      Extreme{"small norms", false, 1e-15f}, Extreme{"large norms", false, kMax / 8}}) {
          CacheCase test(2, 1, head_dim, 100, bits, bits);
          test.precision = Precision::kDefault;
          const auto top = static_cast<std::uint8_t>(test.k_codebook->num_levels() - 1);
          // Keys at one end of the codebook or the other, by turns, and values that tell which.
          for (std::uint64_t i = 0; i < test.k_packed.size(); ++i) {
            const std::uint64_t j = i % head_dim;
            const bool is_even = i / head_dim % 2 == 0;
            test.k_packed.data<std::uint8_t>()[i] = is_even ? top : std::uint8_t{0};
            test.v_packed.data<std::uint8_t>()[i] = (is_even ? j % 3 != 0 : j % 5 == 0) ? top : std::uint8_t{0};
          }
          for (std::uint64_t i = 0; i < test.v_norms.size(); ++i) {
            test.v_norms.data<float>()[i] = extreme.norm;
            test.k_norms.data<float>()[i] = extreme.norm;
          }
          for (std::uint64_t i = 0; i < test.q.size(); ++i) {
            test.q.data<float>()[i] = extreme.is_spike && i % head_dim != 17 ? 1e-3f : 1.0f;
          }
          // Scores of about 1, whatever the norms are.
          test.args.scale = 4.0f / (extreme.norm * static_cast<float>(head_dim));
          EXPECT_LT(nmse(test.attend(), test.expected()), kInt16Nmse) << isa << ' ' << extreme.what << ' ' << bits;
        }
      }
    }
  }
}

/// Codes that occur equally often, as no data has them: far from the middle, levels are hardest to come near.
void spread_codes(CacheCase& test) {
  std::mt19937 engine(7);
  const unsigned mask = test.k_codebook->num_levels() - 1;
  for (Buffer* packed : {&test.k_packed, &test.v_packed}) {
    for (std::uint64_t i = 0; i < packed->size(); ++i) {
      packed->data<std::uint8_t>()[i] = static_cast<std::uint8_t>(engine() & mask);
    }
  }
  double squares = 0.0;
  for (unsigned code = 0; code <= mask; ++code) {
    squares += std::pow(static_cast<double>(test.k_codebook->levels[code]), 2) / (mask + 1);
  }
  // The scores' deviation stays as it was.
  test.args.scale /= static_cast<float>(std::sqrt(squares));
}

/// What the class promises at its limit: 5e-4 where scaled scores have a standard deviation of 4.
TEST(CpuAttend, KeepsThePromiseOfDefaultPrecision) {
  for (const std::string& isa : cpu_isas()) {
    const ForcedIsa forced(isa);
    for (const unsigned head_dim : {64u, 128u, 256u, 512u}) {
      for (const unsigned bits : {5u, 6u, 8u}) {
        for (const float deviation : {0.5f, 4.0f}) {
          for (const bool is_spread : {false, true}) {
            CacheCase test(2, 1, head_dim, 513, bits, bits);
            test.precision = Precision::kDefault;
            test.ask(4);
            test.args.scale *= deviation;
            if (is_spread) spread_codes(test);
            const double error = std::sqrt(nmse(test.attend(), test.expected()));
            const std::string which = isa + " D=" + std::to_string(head_dim) + " bits=" + std::to_string(bits) +
                                      " std=" + std::to_string(deviation) + (is_spread ? " any codes" : "");
            EXPECT_LT(error, 5e-4) << which;
            if (std::getenv("TQ_HB_SHOW") != nullptr) std::printf("%s: %.2e\n", which.c_str(), error);
          }
        }
      }
    }
  }
}

/// The largest relative error of a row.
double worst_row(const std::vector<float>& got, const std::vector<double>& want, std::size_t head_dim) {
  double worst = 0.0;
  for (std::size_t row = 0; row < want.size(); row += head_dim) {
    double distance = 0.0, length = 0.0;
    for (std::size_t j = row; j < row + head_dim; ++j) {
      distance += std::pow(static_cast<double>(got[j]) - want[j], 2);
      length += std::pow(want[j], 2);
    }
    worst = std::max(worst, std::sqrt(distance / length));
  }
  return worst;
}

/// Every row keeps the promise, on every instruction set.
void expect_promise_for_rows(const CacheCase& test, const std::string& name) {
  const CacheCase::Expected expected = test.expected_with_lse();
  for (const std::string& isa : cpu_isas()) {
    const ForcedIsa forced(isa);
    const std::string which = isa + " D=" + std::to_string(test.args.head_dim) + " " + name;
    const double worst = worst_row(test.attend(), expected.output, test.args.head_dim);
    EXPECT_LT(worst, 5e-4) << which;
    EXPECT_TRUE(close(*test.lse, expected.lse, kInt16Lse)) << which;
    if (std::getenv("TQ_HB_SHOW") != nullptr) std::printf("%s: at most %.2e\n", which.c_str(), worst);
  }
}

/// With scores so far apart a few keys have most of the weight, so that a row's error is that of their scores.
TEST(CpuAttend, KeepsThePromiseOfDefaultPrecisionForEveryHead) {
  for (const unsigned head_dim : {64u, 128u, 512u}) {
    for (const unsigned bits : {5u, 6u, 8u}) {
      const unsigned heads = 8192 / head_dim;
      CacheCase test(heads, heads, head_dim, 257, bits, bits);
      test.precision = Precision::kDefault;
      test.args.scale *= 4.0f;
      test.add_lse();
      expect_promise_for_rows(test, "bits=" + std::to_string(bits));
    }
  }
}

/// One key has nearly all the weight, maybe for nothing, as the first token often has: the error of its score is that
/// of all other weights.
TEST(CpuAttend, KeepsThePromiseWhereOneKeyStandsOut) {
  constexpr unsigned kKeys = 257;
  for (const unsigned head_dim : {64u, 128u, 256u, 512u}) {
    for (const unsigned bits : {5u, 6u, 8u}) {
      for (const float peak : {8.0f, 16.0f, 40.0f}) {
        for (const unsigned place : {0u, 100u}) {
          for (const bool has_value : {false, true}) {
            const unsigned heads = 2048 / head_dim;
            const std::size_t blocks = norms_per_row(head_dim);
            CacheCase test(heads, heads, head_dim, kKeys, bits, bits);
            test.precision = Precision::kDefault;
            test.add_lse();
            Buffer keys = test.random({kKeys, heads, head_dim}, 8);
            for (unsigned head = 0; head < heads; ++head) {
              const float* q = test.q.data<float>() + head * head_dim;
              std::vector<float> aligned(q, q + head_dim);
              float squares = 0.0f;
              for (const float x : aligned) squares += x * x;
              unrotate_row(aligned.data(), head_dim);
              float* key = keys.data<float>() + (place * heads + head) * head_dim;
              for (unsigned j = 0; j < head_dim; ++j) key[j] = peak / (squares * test.args.scale) * aligned[j];
              if (!has_value) std::fill_n(test.v_norms.data<float>() + (head * kKeys + place) * blocks, blocks, 0.0f);
            }
            test.fill(keys, test.k_packed, test.k_norms, *test.k_codebook);
            expect_promise_for_rows(test, "bits=" + std::to_string(bits) + " peak=" + std::to_string(peak) + " at " +
                                              std::to_string(place) + (has_value ? "" : " without value"));
          }
        }
      }
    }
  }
}

TEST(CpuAttend, ScoresDecisiveKeysAgainWhereverTheyAre) {
  for (const unsigned head_dim : {64u, 512u}) {
    for (const Packing packing : {Packing::kByte, Packing::kPlane}) {
      CacheCase test(6, 2, head_dim, 700, 6, 5, "cpu", packing);
      test.precision = Precision::kDefault;
      test.ask(11);
      test.add_score_bias();
      test.add_lse();
      test.args.scale *= 4.0f;
      test.args.softcap = 30.0f;
      test.args.ring_start = 377;
      test.args.mask_type = 2;
      test.args.sliding_window = 333;
      expect_promise_for_rows(test, "in a ring");
    }
  }
}

/// Errors that all keys share divide out, but beside a sink: exact scores of some keys must not make them.
TEST(CpuAttend, KeepsThePromiseWhereKeysHaveMuchInCommon) {
  for (const unsigned head_dim : {64u, 512u}) {
    for (const float common : {3.0f, 10.0f}) {
      const unsigned heads = 4096 / head_dim;
      CacheCase test(heads, heads, head_dim, 257, 5, 6);
      test.precision = Precision::kDefault;
      test.args.scale *= 2.0f;
      Buffer keys = test.random({257, heads, head_dim}, 8);
      const Buffer offsets = test.random({heads, head_dim}, 9);
      for (std::uint64_t i = 0; i < keys.size(); ++i) {
        keys.data<float>()[i] += common * offsets.data<float>()[i % offsets.size()];
      }
      test.fill(keys, test.k_packed, test.k_norms, *test.k_codebook);
      test.add_lse();
      expect_promise_for_rows(test, "in common=" + std::to_string(common));
      // About as much weight as all keys have.
      test.attend();
      test.sinks = test.random({heads}, 10);
      for (unsigned head = 0; head < heads; ++head) test.sinks->data<float>()[head] += test.lse->data<float>()[head];
      expect_promise_for_rows(test, "in common=" + std::to_string(common) + " with sinks");
    }
  }
}

/// Such a key has no weight, among others or, beside a sink, alone.
TEST(CpuAttend, KeysScoredAtMinusInfinityHaveNoWeight) {
  constexpr unsigned kHeads = 8, kHeadDim = 64;
  struct Place {
    unsigned keys, key;
  };
  for (const Precision precision : {Precision::kDefault, Precision::kStrict}) {
    for (const Place place : {Place{1, 0}, Place{40, 0}, Place{40, 1}, Place{40, 8}}) {
      CacheCase test(kHeads, kHeads, kHeadDim, place.keys, 5, 5);
      test.precision = precision;
      test.args.scale *= 8.0f;
      test.add_sinks();
      const auto with_norm = [&](float norm) {
        for (unsigned head = 0; head < kHeads; ++head) test.k_norms.data<float>()[head * place.keys + place.key] = norm;
        return test.attend();
      };
      const std::vector<float> positive = with_norm(HUGE_VALF), negative = with_norm(-HUGE_VALF);
      for (unsigned head = 0; head < kHeads; ++head) {
        // One of the two norms gives +infinity, which must show.
        const std::size_t at = head * kHeadDim;
        EXPECT_NE(std::isnan(positive[at]), std::isnan(negative[at]))
            << name_of(precision) << ' ' << place.key << ' ' << head;
      }
    }
  }
}

/// Fixed point is then off by more than what makes a weight, and there is one key to attend to.
TEST(CpuAttend, GivesTheValueOfASingleKeyAtAnyScore) {
  for (const float scale : {1.0f, 1e3f, 1e6f, 1e20f, -1e20f}) {
    CacheCase test(4, 1, 256, 1, 8, 8);
    test.precision = Precision::kDefault;
    test.args.scale = scale;
    const std::vector<double> expected = test.expected();
    for (const std::string& isa : cpu_isas()) {
      const ForcedIsa forced(isa);
      EXPECT_LT(std::sqrt(nmse(test.attend(), expected)), 5e-4) << isa << " scale=" << scale;
    }
  }
}

}  // namespace
}  // namespace tq_hb
