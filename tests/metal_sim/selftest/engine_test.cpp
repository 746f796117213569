// Statistics, schedules, lanes, memory and the cache.
#include "harness.h"
#include "statistics.h"

namespace metal_sim::selftest {
namespace {

const char* const kSource = R"(#line 1 "engine.metal"
#include <metal_stdlib>
using namespace metal;
kernel void stage(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                  uint i [[thread_position_in_grid]], ushort local [[thread_index_in_threadgroup]]) {
  threadgroup float shared[64];
  shared[local] = in[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float sum = simd_sum(shared[63 - local]);
  simdgroup_barrier(mem_flags::mem_none);
  out[i] = sum;
}
kernel void order(device atomic_uint* next [[buffer(0)]], device uint* out [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {
  out[i] = atomic_fetch_add_explicit(next, 1u, memory_order_relaxed);
}
kernel void arithmetic(device const float* in [[buffer(0)]], device float* out [[buffer(1)]]) {
  out[0] = in[0] * in[0] + in[1];
  out[1] = in[2] * 0.5f;
}
kernel void wait_for_nothing(device uint* out [[buffer(0)]], uint i [[thread_position_in_grid]]) { out[i] = i; }
)";

std::string statistics_text() {
  std::string text(metal_sim_statistics(nullptr, 0), '\0');
  EXPECT_EQ(metal_sim_statistics(text.data(), text.size()), text.size());
  text.pop_back();
  return text;
}

std::string run_stage() {
  const Array<float> in(std::vector<float>(128, 1.0f)), out(std::vector<float>(128));
  metal_sim_reset_statistics();
  const Dispatch dispatch =
      dispatch_of(compile(kSource), {in.binding(0, "the \"input\""), out.binding()}, {2, 1, 1}, {64, 1, 1}, "stage");
  execute({{dispatch}, {dispatch}});
  return statistics_text();
}

TEST(Statistics, CountDispatchesAndRendezvous) {
  const std::string counts =
      "\"dispatches\": 2, \"threadgroups\": 4, \"threads\": 256, \"threadgroup_bytes\": 256, \"simd_operations\": 8, "
      "\"simdgroup_barriers\": 8, \"threadgroup_barriers\": 4, \"buffers\": {}";
  EXPECT_EQ(run_stage(), "{\"batches\": 2, " + counts + ", \"kernels\": {\"stage\": {" + counts + "}}}");
}

TEST(Statistics, CountTrafficByLabelWhereAccessesAreChecked) {
  const Environment check("METAL_SIM_CHECK", "1");
  const std::string text = run_stage();
  EXPECT_NE(text.find("\"<slot 1>\": {\"read\": 0, \"written\": 1024}"), std::string::npos) << text;
  EXPECT_NE(text.find("\"the \\\"input\\\"\": {\"read\": 1024, \"written\": 0}"), std::string::npos) << text;
}

TEST(Statistics, AreCutOffWhereTheBufferEnds) {
  run_stage();
  char text[11];
  EXPECT_GT(metal_sim_statistics(text, sizeof(text)), sizeof(text));
  EXPECT_STREQ(text, "{\"batches\"");
}

/// In which order 8 threadgroups of 64 threads ran.
std::vector<unsigned> order() {
  const Array<unsigned> next({0}), out(std::vector<unsigned>(512));
  execute({{dispatch_of(compile(kSource), {next.binding(), out.binding()}, {8, 1, 1}, {64, 1, 1}, "order")}});
  return out.values();
}

TEST(Schedule, IsFixedAndNotAscendingByDefault) {
  const std::vector<unsigned> first = order();
  EXPECT_EQ(order(), first);
  EXPECT_NE(first[0], 0u) << "threadgroup 0 ran first";
  EXPECT_EQ(first[1], first[0] + 1) << "threads run in order";
}

TEST(Schedule, DependsOnTheSeed) {
  std::vector<unsigned> first, second;
  {
    const Environment seed("METAL_SIM_SEED", "1");
    first = order();
    EXPECT_EQ(order(), first) << "a seed repeats";
  }
  const Environment seed("METAL_SIM_SEED", "2");
  second = order();
  EXPECT_NE(first, second);
  EXPECT_NE(second[1], second[0] + 1) << "threads run in a random order";
}

std::vector<float> arithmetic() {
  const float x = 1.0f + 0x1p-12f, square = x * x;
  const Array<float> in({x, -square, 2e-38f}), out(std::vector<float>(2));
  execute({{dispatch_of(compile(kSource), {in.binding(), out.binding()}, {1, 1, 1}, {1, 1, 1}, "arithmetic")}});
  return out.values();
}

TEST(Lane, RoundsEveryOperationByDefault) {
  EXPECT_EQ(arithmetic()[0], 0.0f);
  EXPECT_EQ(arithmetic()[1], 1e-38f);
}

TEST(Lane, FlushesDenormalsWhenAsked) {
  const Environment lane("METAL_SIM_LANE", "ftz");
  EXPECT_EQ(arithmetic(), (std::vector<float>{0.0f, 0.0f}));
  volatile float small = 2e-38f;
  EXPECT_EQ(small * 0.5f, 1e-38f) << "the caller's own arithmetic must not change";
}

TEST(Lane, ContractsWhenAsked) {
  {
    const Environment lane("METAL_SIM_LANE", "contract");
    EXPECT_EQ(arithmetic(), (std::vector<float>{0x1p-24f, 1e-38f}));
  }
  const Environment lane("METAL_SIM_LANE", "ftz,contract");
  EXPECT_EQ(arithmetic(), (std::vector<float>{0x1p-24f, 0.0f}));
}

TEST(Options, RefuseWhatTheyDoNotKnow) {
  const std::pair<const char*, const char*> wrong[] = {
      {"METAL_SIM_SEED", "-1"}, {"METAL_SIM_SEED", "x"}, {"METAL_SIM_CHECK", "yes"}, {"METAL_SIM_LANE", "fast"}};
  for (const auto& [name, value] : wrong) {
    const Environment variable(name, value);
    const std::string message = message_of<std::invalid_argument>([] { execute({}); });
    EXPECT_NE(message.find(name), std::string::npos) << name << "=" << value;
    EXPECT_NE(message.find(value), std::string::npos) << name << "=" << value;
  }
}

TEST(Memory, IsZeroedAlignedAndEndsAtAPage) {
  for (const std::size_t size : {1u, 16u, 100u, 4096u, 5000u}) {
    std::byte* data = allocate(size);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(data) % 16, 0u);
    EXPECT_EQ((reinterpret_cast<std::uintptr_t>(data) + (size + 15) / 16 * 16) % 4096, 0u);
    for (std::size_t i = 0; i < size; ++i) ASSERT_EQ(data[i], std::byte{0});
    release(data, size);
  }
}

TEST(Engine, RunsPartialSimdgroupsAndTheLargestThreadgroup) {
  for (const unsigned threads : {1u, 33u, 1024u}) {
    const Array<unsigned> out(std::vector<unsigned>(1024, 7));
    execute({{dispatch_of(compile(kSource), {out.binding()}, {1, 1, 1}, {threads, 1, 1}, "wait_for_nothing")}});
    EXPECT_EQ(out.values()[threads - 1], threads - 1);
    if (threads < 1024) {
      EXPECT_EQ(out.values()[threads], 7u);
    }
  }
}

TEST(Engine, RunsAnEmptyGrid) {
  const Array<unsigned> out({7});
  execute({{dispatch_of(compile(kSource), {out.binding()}, {0, 1, 1}, {32, 1, 1}, "wait_for_nothing")}});
  EXPECT_EQ(out.values()[0], 7u);
}

}  // namespace
}  // namespace metal_sim::selftest
