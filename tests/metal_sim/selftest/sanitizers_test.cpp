// The driver under each sanitizer: recorded dispatches run, and a seeded bug is reported with its line.
#include "harness.h"
#include "process.h"
#include "recording.h"

namespace metal_sim::selftest {
namespace {

ProcessResult run_driver(const std::string& sanitizer, const std::string& kernel, bool with_bug) {
  const std::filesystem::path path = std::string(SELFTEST_FOLDER "/faults/") + kernel + ".metal";
  const std::filesystem::path file =
      std::filesystem::path(WORK_FOLDER) / (sanitizer + "_" + kernel + (with_bug ? "_bug.sim" : ".sim"));
  const Array<float> in(std::vector<float>(64)), out(std::vector<float>(64));
  Dispatch dispatch =
      dispatch_of(compile(source_of(path, with_bug)), {in.binding(), out.binding()}, {2, 1, 1}, {64, 1, 1});
  dispatch.threadgroup_bytes[0] = 256;
  write_recording({{dispatch}}, file);
  return run_process({DRIVER_PREFIX + sanitizer, file.string()});
}

void expect_report(const std::string& sanitizer, const std::string& kernel, const std::string& report) {
  const ProcessResult right = run_driver(sanitizer, kernel, false);
  EXPECT_EQ(right.status, 0) << right.output;
  const ProcessResult wrong = run_driver(sanitizer, kernel, true);
  EXPECT_NE(wrong.status, 0) << wrong.output;
  EXPECT_NE(wrong.output.find(report), std::string::npos) << wrong.output;
  const std::filesystem::path path = std::string(SELFTEST_FOLDER "/faults/") + kernel + ".metal";
  EXPECT_NE(wrong.output.find(path.filename().string() + ":" + line_with(path, "// here")), std::string::npos)
      << wrong.output;
}

TEST(ThreadSanitizer, FindsMissingThreadgroupBarriers) {
  expect_report("thread", "missing_threadgroup_barrier", "data race");
}
TEST(ThreadSanitizer, FindsMissingSimdgroupBarriers) {
  expect_report("thread", "missing_simdgroup_barrier", "data race");
}
TEST(AddressSanitizer, FindsWritesPastTheEnd) {
  expect_report("address", "write_past_the_end", "heap-buffer-overflow");
}
TEST(AddressSanitizer, FindsIndicesOutsideAnArray) {
  expect_report("address", "index_outside_an_array", "stack-buffer-overflow");
}

}  // namespace
}  // namespace metal_sim::selftest
