// What the constructs of the language compute.
#include <cmath>

#include "harness.h"

namespace metal_sim::selftest {
namespace {

std::shared_ptr<const Library> language() {
  return compile(source_of(SELFTEST_FOLDER "/language.metal", false));
}

/// The output of one threadgroup.
template <class T = float>
std::vector<T> run(const std::string& kernel, std::size_t size, Size3 threads = {1, 1, 1}) {
  const Array<T> out{std::vector<T>(size)};
  Dispatch dispatch = dispatch_of(language(), {out.binding()}, {1, 1, 1}, threads, kernel);
  dispatch.threadgroup_bytes[0] = 16;
  execute({{dispatch}});
  return out.values();
}

template <class T>
std::vector<std::byte> bytes_of(T value) {
  std::vector<std::byte> bytes(sizeof(T));
  std::memcpy(bytes.data(), &value, sizeof(T));
  return bytes;
}

TEST(Language, Constructors) {
  EXPECT_EQ(run("constructors", 8), (std::vector<float>{14, 21, 61, 4, 4, 42, 20, 1}));
}

TEST(Language, LiteralsAreSingleAndHalvesRoundEveryTime) {
  const std::vector<float> out = run("literals", 5);
  EXPECT_EQ(out[0], 1.0f / 3.0f * 3.0f - 1.0f);
  EXPECT_EQ(out[1], 0.0f);
  EXPECT_EQ(out[2], INFINITY);
  EXPECT_EQ(out[3], INFINITY);
  EXPECT_EQ(out[4], 25.0f);
}

TEST(Language, Mathematics) {
  const std::vector<float> want = {2.71828183f, 8, 0.25f, 1, 2, 10, 6, 3.75f, 1, 1 / 3.0f, 42, 187, 80, 5, 1.25f, 7};
  const std::vector<float> got = run("mathematics", 16);
  for (std::size_t i = 0; i < want.size(); ++i) EXPECT_FLOAT_EQ(got[i], want[i]) << i;
}

TEST(Language, MaximaAndMinimaDropNaN) {
  const std::vector<float> got = run("not_a_number", 8, {32, 1, 1});
  EXPECT_EQ(std::vector<float>(got.begin(), got.end() - 1), (std::vector<float>{2, 2, -1, 1, 3, -1, 10}));
  EXPECT_TRUE(std::isnan(got[7]));
}

TEST(Language, SimdgroupOperations) {
  // Seen from lane 3, which holds 4.
  const std::vector<float> want = {528, 32, 1, 6, 97, 240, 0, 29, 3, 2, 6, 11, 10, 6, 11, 1};
  const std::vector<float> got = run("simd", 32, {64, 1, 1});
  for (std::size_t i = 0; i < 32; ++i) EXPECT_EQ(got[i], want[i % 16]) << i;
}

TEST(Language, PositionsAndSizes) {
  const Array<unsigned> out(std::vector<unsigned>(8 * 6));
  execute({{dispatch_of(language(), {out.binding()}, {2, 3, 1}, {4, 2, 1}, "positions")}});
  const std::vector<unsigned> values = out.values();
  EXPECT_EQ(values[0], 0u + 40 + 2000 + 10000 + 3200000);
  for (unsigned y = 0; y < 6; ++y) {
    for (unsigned x = 0; x < 8; ++x) {
      if (x + y == 0) continue;
      EXPECT_EQ(values[y * 8 + x], x / 4 + 10 * (y / 2) + 100 * (x % 4) + 10000 * (y % 2));
    }
  }
}

TEST(Language, FunctionConstantsAndWhatDependsOnThem) {
  struct {
    unsigned count = 2;
    float scale = 3.0f;
  } arguments;
  const Array<float> out(std::vector<float>(4));
  const Array<decltype(arguments)> argument({arguments});
  const auto library = language();
  const Kernel& kernel = *library->find("function_constants");
  EXPECT_EQ(kernel.required_constants, (std::vector<unsigned>{1, 2})) << "constant 0 is optional";
  Dispatch dispatch =
      dispatch_of(library, {out.binding(), argument.binding()}, {1, 1, 1}, {1, 1, 1}, "function_constants");
  dispatch.constants[1] = bytes_of(true);
  dispatch.constants[2] = bytes_of<std::uint16_t>(0x4000);  // 2 in half
  execute({{dispatch}});
  EXPECT_EQ(out.values(), (std::vector<float>{8, 16, 1, 1.5f}));
  dispatch.constants[0] = bytes_of(5);
  execute({{dispatch}});
  EXPECT_EQ(out.values(), (std::vector<float>{5, 10, 1, 1.5f}));
}

TEST(Language, LibrariesListTheirConstantsAndSlots) {
  const auto library = language();
  ASSERT_EQ(library->constants().size(), 3u);
  EXPECT_EQ(library->constants()[2].name, "kScale");
  EXPECT_EQ(library->constants()[2].index, 2u);
  EXPECT_EQ(library->constants()[2].type, ConstantType::kHalf);
  const Kernel& atomics = *library->find("atomics");
  EXPECT_EQ(atomics.buffers, std::vector<unsigned>{0});
  EXPECT_EQ(atomics.threadgroup_buffers, std::vector<unsigned>{0});
  EXPECT_EQ(library->find("scaled"), nullptr) << "a template is no kernel";
}

TEST(Language, InstantiatedTemplates) {
  const Array<float> in({1.0f, 2.0f}), out(std::vector<float>(2));
  execute({{dispatch_of(language(), {in.binding(), out.binding()}, {1, 1, 1}, {2, 1, 1}, "scaled_float_3")}});
  EXPECT_EQ(out.values(), (std::vector<float>{3, 6}));
  const Array<int> whole({1, 2}), product(std::vector<int>(2));
  execute({{dispatch_of(language(), {whole.binding(), product.binding()}, {1, 1, 1}, {2, 1, 1}, "scaled_int_5")}});
  EXPECT_EQ(product.values(), (std::vector<int>{5, 10}));
}

TEST(Language, Atomics) {
  const Array<unsigned> out({0, 1000, 0, 0, 0, 0});
  for (const char* check : {"0", "1"}) {
    const Environment mode("METAL_SIM_CHECK", check);
    Dispatch dispatch = dispatch_of(language(), {out.binding()}, {1, 1, 1}, {64, 1, 1}, "atomics");
    dispatch.threadgroup_bytes[0] = 16;
    execute({{dispatch}});
  }
  EXPECT_EQ(out.values(), (std::vector<unsigned>{128, 37, 63, 0xffffffffu, 384, 128}));
}

TEST(Language, ThreadgroupVariables) {
  const std::vector<float> out = run("threadgroup_variables", 64, {64, 1, 1});
  for (std::size_t i = 0; i < 64; ++i) EXPECT_EQ(out[i], static_cast<float>(2 * (63 - i) + 101));
}

}  // namespace
}  // namespace metal_sim::selftest
