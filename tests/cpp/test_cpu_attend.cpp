#include <gtest/gtest.h>

#include "cache_case.h"
#include "cpu/attend_kernel.h"
#include "cpu/device.h"

namespace tq_hb {
namespace {

// float32 sums of a few hundred terms, against float64 on the same codes.
constexpr double kFloat32Nmse = 1e-11;

TEST(CpuAttend, KeepsItsOrderWhereScoresExceedFloat32) {
  CacheCase test(2, 1, 256, 40);
  for (std::uint64_t i = 0; i < test.q.size(); ++i) test.q.data<float>()[i] *= 1e37f;
  test.args.scale = 1e38f;
  EXPECT_LT(nmse(test.attend(), test.expected()), kFloat32Nmse);
}

TEST(CpuAttend, GivesTheSameBitsForAnyNumberOfThreads) {
  CacheCase test(8, 4, 256, 700);
  const unsigned before = cpu_num_threads();
  std::vector<std::vector<float>> results;
  for (const unsigned threads : {1u, 2u, 3u, 5u}) {
    set_cpu_num_threads(threads);
    results.push_back(test.attend());
  }
  set_cpu_num_threads(before);
  for (const auto& result : results) EXPECT_EQ(result, results.front());
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
  for (const unsigned head_dim : {256u, 512u}) {
    CacheCase test(3, 1, head_dim, 50);
    std::vector<float> levels(test.k_codebook->levels, test.k_codebook->levels + 256);
    std::vector<double> want = test.expected();
    const double row_scale = head_dim == 256 ? 1.0 / 16.0 : 1.0;
    for (const IsaKernel* kernel : kernels) {
      std::vector<double> q_scale(3, static_cast<double>(test.args.scale) * row_scale), bias(3), max(3), sum(3);
      const std::vector<QueryRange> seen(3, QueryRange{0, 50});
      std::vector<double> scores(3 * kAttendTile);
      std::vector<float> out(3 * head_dim);
      AttendTask task{};
      task.q = test.q.data<float>();
      task.q_scale = q_scale.data();
      task.bias = bias.data();
      task.seen = seen.data();
      task.k = {test.k_packed.data<std::uint8_t>(), test.k_norms.data<float>(), levels.data(), head_dim, 0};
      task.v = {test.v_packed.data<std::uint8_t>(), test.v_norms.data<float>(), levels.data(), head_dim, 0};
      task.rows = 3;
      task.head_dim = head_dim;
      task.first_slot = 20;  // wraps after 30 keys; the order of keys does not change the sum
      task.count = 50;
      task.capacity = 50;
      task.v_scale = static_cast<float>(row_scale);
      task.scratch_scores = scores.data();
      task.max = max.data();
      task.sum = sum.data();
      task.out = out.data();
      kernel->run(task);
      for (std::size_t i = 0; i < out.size(); ++i) out[i] /= static_cast<float>(sum[i / head_dim]);
      EXPECT_LT(nmse(out, want), kFloat32Nmse) << kernel->isa;
    }
  }
}

}  // namespace
}  // namespace tq_hb
