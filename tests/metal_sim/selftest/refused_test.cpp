// Sources that Metal would not take, or that an encoder may not hold: refused with the line and the reason that
// stand in a comment "refused: ...", and taken without the bug.
#include "harness.h"
#include "process.h"

namespace metal_sim::selftest {
namespace {

const std::string kMarker = "// refused: ";

/// Every check there is; what they print.
ProcessResult check(const std::filesystem::path& path, bool with_bug) {
  const std::filesystem::path file =
      std::filesystem::path(WORK_FOLDER) / (stem(path) + (with_bug ? ".bug.metal" : ".metal"));
  std::ofstream(file) << source_of(path, with_bug);
  return run_process({PYTHON, "-B", TRANSLATOR, "--compiler", COMPILER, "check", file.string()});
}

class Refused : public testing::TestWithParam<std::filesystem::path> {};

TEST_P(Refused, WithTheLineAndTheReason) {
  const ProcessResult result = check(GetParam(), true);
  EXPECT_EQ(result.status, 1);
  const std::string line = line_with(GetParam(), kMarker), text = read_text(GetParam());
  const std::size_t reason = text.find(kMarker) + kMarker.size();
  EXPECT_NE(result.output.find(GetParam().filename().string() + ":" + line + ":"), std::string::npos) << result.output;
  EXPECT_NE(result.output.find(text.substr(reason, text.find('\n', reason) - reason)), std::string::npos)
      << result.output;
}

TEST_P(Refused, NotWithoutTheBug) {
  const ProcessResult result = check(GetParam(), false);
  EXPECT_EQ(result.status, 0) << result.output;
}

INSTANTIATE_TEST_SUITE_P(All, Refused, testing::ValuesIn(files_in("refused")),
                         [](const auto& instance) { return stem(instance.param); });

TEST(Compile, RefusesWithTheCompilersMessage) {
  const std::string message = message_of<CompileError>(
      [] { compile("#include <metal_stdlib>\nkernel void f(device float* x [[buffer(0)]]) { x[0] = flaot4(1).x; }"); });
  EXPECT_NE(message.find("program_source:2:"), std::string::npos) << message;
  EXPECT_NE(message.find("flaot4"), std::string::npos) << message;
}

TEST(Compile, RefusesWhatTheChecksRefuse) {
  for (const char* name : {"recursion", "device_pointer_to_threadgroup_memory", "encoder_division"}) {
    const std::filesystem::path path = std::string(SELFTEST_FOLDER "/refused/") + name + ".metal";
    EXPECT_THROW(compile(source_of(path, true)), CompileError) << name;
  }
}

}  // namespace
}  // namespace metal_sim::selftest
