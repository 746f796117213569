#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "cache_case.h"
#include "cpu/attend_kernel.h"
#include "cpu/device.h"

namespace tq_hb {
namespace {

// float32 sums of a few hundred terms, against float64 on the same codes.
constexpr double kFloat32Nmse = 1e-11;
constexpr double kFloat32Lse = 1e-6;

TEST(CpuAttend, KeepsItsOrderWhereScoresExceedFloat32) {
  CacheCase test(2, 1, 256, 40);
  for (std::uint64_t i = 0; i < test.q.size(); ++i) test.q.data<float>()[i] *= 1e37f;
  test.args.scale = 1e38f;
  EXPECT_LT(nmse(test.attend(), test.expected()), kFloat32Nmse);
}

TEST(CpuAttend, GivesTheSameBitsForAnyNumberOfThreads) {
  const unsigned before = cpu_num_threads();
  for (const unsigned queries : {1u, 9u}) {
    CacheCase test(8, 4, 64, 700, 5, 6, "cpu", Packing::kPlane);
    test.ask(queries);
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
  // Ranges of 128 keys, of which the last holds few or the first query sees none.
  for (const Shape shape : {Shape{129, 0}, Shape{300, 125}, Shape{513, 0}, Shape{700, 260}}) {
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
  for (const unsigned head_dim : {64u, 512u}) {
    CacheCase test(kHeads, 1, head_dim, kKeys);
    test.ask(kQueries);
    test.args.mask_type = 2;
    test.args.sliding_window = kWindow;
    const std::vector<float> before = test.attend();
    const std::size_t norms = test.k_norms.size() / kKeys;
    for (unsigned key = 0; key < kKeys; ++key) {
      for (const Buffer* side : {&test.k_norms, &test.v_norms}) {
        float* norm = side->data<float>() + key * norms;
        const float kept = *norm;
        *norm = std::numeric_limits<float>::quiet_NaN();
        const std::vector<float> after = test.attend();
        *norm = kept;
        for (unsigned query = 0; query < kQueries; ++query) {
          const unsigned position = kKeys - kQueries + query;
          const bool sees = key <= position && position - key < kWindow;
          for (std::size_t i = query * kHeads * head_dim; i < (query + 1) * kHeads * head_dim; ++i) {
            // A value's norm spoils its own block of coordinates, a key's all of them.
            const bool spoilt = sees && (side == &test.k_norms || i % head_dim < 256);
            ASSERT_TRUE(spoilt ? std::isnan(after[i]) : after[i] == before[i]) << key << ' ' << query << ' ' << i;
          }
        }
      }
    }
  }
}

TEST(CpuAttend, OfEveryInstructionSetAgrees) {
  std::vector<const IsaKernel*> kernels{&attend_kernel_portable()};
#if defined(TQ_HB_HAVE_X86_KERNELS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) kernels.push_back(&attend_kernel_avx2());
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    kernels.push_back(&attend_kernel_avx512());
  }
#endif
  constexpr std::size_t kRows = 9;  // three queries of three heads
  for (const unsigned head_dim : {64u, 128u, 256u, 512u}) {
    for (const unsigned high_bits : {0u, 1u, 2u}) {
      const unsigned bits = high_bits == 0 ? 8 : 4 + high_bits;
      CacheCase test(3, 1, head_dim, 50, bits, bits, "cpu", Packing::kPlane);
      test.ask(3);
      test.args.ring_start = 20;  // wraps after 30 keys
      const std::vector<double> want = test.expected();
      std::vector<float> levels(256);
      std::copy_n(test.k_codebook->levels, test.k_codebook->num_levels(), levels.begin());
      const double row_scale = head_dim == 512 ? 1.0 : 1.0 / std::sqrt(static_cast<double>(head_dim));
      std::vector<QueryRange> seen;
      for (TqU32 row = 0; row < kRows; ++row) seen.push_back({0, 48 + row / 3});
      const std::size_t bytes = test.k_packed.shape().back();
      for (const IsaKernel* kernel : kernels) {
        std::vector<double> q_scale(kRows, static_cast<double>(test.args.scale) * row_scale), bias(kRows), max(kRows);
        std::vector<double> sum(kRows), scores(kRows * kAttendTile);
        std::vector<float> out(kRows * head_dim);
        AttendTask task{};
        task.q = test.q.data<float>();
        task.q_scale = q_scale.data();
        task.bias = bias.data();
        task.seen = seen.data();
        task.k = {test.k_packed.data<std::uint8_t>(), test.k_norms.data<float>(), levels.data(), bytes, high_bits};
        task.v = {test.v_packed.data<std::uint8_t>(), test.v_norms.data<float>(), levels.data(), bytes, high_bits};
        task.rows = kRows;
        task.head_dim = head_dim;
        task.first_slot = 20;
        task.count = 50;
        task.capacity = 50;
        task.v_scale = static_cast<float>(row_scale);
        task.scratch_scores = scores.data();
        task.max = max.data();
        task.sum = sum.data();
        task.out = out.data();
        kernel->run(task);
        for (std::size_t i = 0; i < out.size(); ++i) out[i] /= static_cast<float>(sum[i / head_dim]);
        EXPECT_LT(nmse(out, want), kFloat32Nmse) << kernel->isa << ' ' << head_dim << ' ' << bits;
      }
    }
  }
}

}  // namespace
}  // namespace tq_hb
