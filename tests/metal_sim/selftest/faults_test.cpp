// Kernels with a bug: the run must be stopped with the kernel's name and the line marked "here", and the same
// kernel without the bug must pass.
#include "harness.h"

namespace metal_sim::selftest {
namespace {

class Faults : public testing::TestWithParam<std::filesystem::path> {
 protected:
  /// Two threadgroups where the bug is about two, else one of two simdgroups.
  void run(const std::shared_ptr<const Library>& library) {
    std::vector<float> values(96);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
    const Array<float> in(values), out(std::vector<float>(64));
    const std::string name = stem(GetParam());
    const bool is_about_groups = name == "two_threadgroups_write_one_cell" || name == "count_without_atomics";
    // The input is the end of a larger buffer, as a slice of a tensor would be.
    Dispatch dispatch = dispatch_of(library, {in.binding(32), out.binding()}, {1, 1, 1}, {64, 1, 1});
    if (is_about_groups) {
      dispatch.threadgroups.width = 2;
      dispatch.threads.width = 32;
    }
    dispatch.threadgroup_bytes[0] = 256;
    execute({{dispatch}});
  }

  const Environment check_{"METAL_SIM_CHECK", "1"};
};

TEST_P(Faults, AreReportedWithTheirLine) {
  const auto library = compile(source_of(GetParam(), true));
  const std::string message = message_of<Fault>([&] { run(library); });
  EXPECT_NE(message.find("kernel " + library->names().at(0) + ": "), std::string::npos) << message;
  const std::string place = GetParam().filename().string() + ":" + line_with(GetParam(), "// here");
  EXPECT_NE(message.find(place), std::string::npos) << message;
}

TEST_P(Faults, AreNotReportedWithoutTheBug) {
  EXPECT_NO_THROW(run(compile(source_of(GetParam(), false))));
}

INSTANTIATE_TEST_SUITE_P(All, Faults, testing::ValuesIn(files_in("faults")),
                         [](const auto& instance) { return stem(instance.param); });

std::shared_ptr<const Library> copy_kernel() {
  return compile(R"(#line 1 "copy.metal"
#include <metal_stdlib>
using namespace metal;
kernel void copy(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                 uint i [[thread_position_in_grid]]) {
  out[i] = in[i];
})");
}

TEST(Batches, DispatchesOfOneBatchMustNotDependOnEachOther) {
  const Environment check("METAL_SIM_CHECK", "1");
  const auto library = copy_kernel();
  const Array<float> a(std::vector<float>(32, 1.0f)), b(std::vector<float>(32)), c(std::vector<float>(32));
  const Dispatch first = dispatch_of(library, {a.binding(), b.binding()}, {1, 1, 1}, {32, 1, 1});
  const Dispatch second = dispatch_of(library, {b.binding(), c.binding()}, {1, 1, 1}, {32, 1, 1});

  const std::string message = message_of<Fault>([&] { execute({{first, second}}); });
  EXPECT_NE(message.find("of the same batch"), std::string::npos) << message;
  EXPECT_NE(message.find("copy.metal:5"), std::string::npos) << message;

  execute({{first}, {second}});
  EXPECT_EQ(c.values(), a.values());
}

TEST(Batches, RunInAnotherOrderThanTheRecordedOne) {
  const auto library = copy_kernel();
  const Array<float> a(std::vector<float>(32, 1.0f)), b(std::vector<float>(32)), c(std::vector<float>(32));
  const Dispatch first = dispatch_of(library, {a.binding(), b.binding()}, {1, 1, 1}, {32, 1, 1});
  const Dispatch second = dispatch_of(library, {b.binding(), c.binding()}, {1, 1, 1}, {32, 1, 1});
  execute({{first, second}});
  EXPECT_EQ(c.values(), std::vector<float>(32)) << "a missing barrier went unnoticed";
}

TEST(GuardPages, StopAccessesPastTheEndWithoutChecks) {
  for (const char* name : {"read_past_the_end", "write_past_the_end"}) {
    const std::filesystem::path path = std::string(SELFTEST_FOLDER "/faults/") + name + ".metal";
    const auto library = compile(source_of(path, true));
    const Array<float> in(std::vector<float>(64)), out(std::vector<float>(64));
    const std::string message = message_of<Fault>(
        [&] { execute({{dispatch_of(library, {in.binding(), out.binding()}, {1, 1, 1}, {64, 1, 1})}}); });
    EXPECT_NE(message.find("0 bytes past the end of buffer"), std::string::npos) << message;
    EXPECT_NE(message.find(path.filename().string() + ":" + line_with(path, "// here")), std::string::npos) << message;
    EXPECT_NE(message.find("thread (63, 0, 0)"), std::string::npos) << message;
  }
}

TEST(ThreadgroupMemory, HoldsNaNUntilItIsWritten) {
  const std::filesystem::path path = SELFTEST_FOLDER "/faults/uninitialised_threadgroup_memory.metal";
  const auto library = compile(source_of(path, true));
  const Array<float> in(std::vector<float>(64)), out(std::vector<float>(64));
  // Twice: the second threadgroup must not find what the first one left.
  for (int repetition = 0; repetition < 2; ++repetition) {
    execute({{dispatch_of(library, {in.binding(), out.binding()}, {1, 1, 1}, {64, 1, 1})}});
    EXPECT_NE(out.values()[58], out.values()[58]);
  }
}

TEST(Dispatches, NeedEveryBufferAndConstant) {
  const auto library = compile(R"(
#include <metal_stdlib>
using namespace metal;
constant int kCount [[function_constant(7)]];
kernel void fill(device int* out [[buffer(3)]], threadgroup int* shared [[threadgroup(1)]]) {
  *shared = kCount;
  *out = *shared;
})");
  const Array<int> out({0});
  Dispatch dispatch = dispatch_of(library, {}, {1, 1, 1}, {1, 1, 1});
  const auto message = [&] { return message_of<Fault>([&] { execute({{dispatch}}); }); };
  EXPECT_EQ(message(), "kernel fill: buffer 3 is not bound");
  dispatch.buffers[3] = out.binding();
  EXPECT_EQ(message(), "kernel fill: threadgroup memory 1 has no length");
  dispatch.threadgroup_bytes[1] = 16;
  EXPECT_EQ(message(), "kernel fill: function constant 7 is not set");
  dispatch.constants[7] = {std::byte{5}, std::byte{0}, std::byte{0}, std::byte{0}};
  dispatch.threads = {1025, 1, 1};
  EXPECT_EQ(message(), "kernel fill: 1025 threads in a threadgroup");
  dispatch.threads = {1, 1, 1};
  EXPECT_EQ(message(), "");
  EXPECT_EQ(out.values()[0], 5);
}

TEST(Faults, LeaveTheEngineUsable) {
  const std::filesystem::path path = SELFTEST_FOLDER "/faults/divergent_simd_operation.metal";
  const Array<float> in(std::vector<float>(64, 2.0f)), out(std::vector<float>(64));
  for (const bool with_bug : {true, false, true, false}) {
    const auto run = [&] {
      execute(
          {{dispatch_of(compile(source_of(path, with_bug)), {in.binding(), out.binding()}, {1, 1, 1}, {64, 1, 1})}});
    };
    EXPECT_EQ(message_of<Fault>(run) != "", with_bug);
  }
  EXPECT_EQ(out.values()[63], 14.0f);
}

}  // namespace
}  // namespace metal_sim::selftest
