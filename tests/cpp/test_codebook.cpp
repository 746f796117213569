#include <cmath>
#include <limits>

#include "core/bits.h"
#include "core/codebook.h"
#include "core/codec_constants.h"
#include "expect_error.h"

namespace tq_hb {
namespace {

constexpr CodebookName kNames[] = {CodebookName::kLloydMax, CodebookName::kMlxNative};
#define TQ_LIST(cbits) cbits,
constexpr unsigned kWidths[] = {TQ_HB_FOR_EACH_CBITS(TQ_LIST)};
#undef TQ_LIST

template <class Check>
void for_each_table(const Check& check) {
  for (const CodebookName name : kNames) {
    for (const unsigned cbits : kWidths) check(find_codebook("test", name, cbits));
  }
}

TEST(Codebook, LevelsAndBoundariesInterleave) {
  for_each_table([](const Codebook& table) {
    for (unsigned i = 0; i + 1 < table.num_levels(); ++i) {
      EXPECT_LT(table.levels[i], table.boundaries[i]);
      EXPECT_LT(table.boundaries[i], table.levels[i + 1]);
    }
  });
}

TEST(Codebook, IsOddSymmetric) {
  for_each_table([](const Codebook& table) {
    for (unsigned i = 0; i < table.num_levels(); ++i) {
      EXPECT_EQ(table.levels[i], -table.levels[table.num_levels() - 1 - i]);
    }
  });
}

unsigned index_of(const Codebook& table, float value) {
  std::uint8_t index;
  table.indices_of<1>(&value, &index);
  return index;
}

TEST(Codebook, IndexCountsTheBoundariesBelow) {
  for_each_table([](const Codebook& table) {
    for (unsigned i = 0; i + 1 < table.num_levels(); ++i) {
      const float boundary = table.boundaries[i];
      EXPECT_EQ(index_of(table, boundary), i) << "a tie takes the lower index";
      EXPECT_EQ(index_of(table, std::nextafter(boundary, 10.0f)), i + 1);
      EXPECT_EQ(index_of(table, std::nextafter(boundary, -10.0f)), i);
      EXPECT_EQ(index_of(table, table.levels[i]), i);
    }
    EXPECT_EQ(index_of(table, -100.0f), 0u);
    EXPECT_EQ(index_of(table, 100.0f), table.num_levels() - 1);
    EXPECT_EQ(index_of(table, std::numeric_limits<float>::quiet_NaN()), 0u);
  });
}

TEST(Codebook, RefusesOtherWidthsAndNames) {
  for (const unsigned cbits : {0u, 4u, 7u, 9u, 256u}) {
    EXPECT_TQ_ERROR(find_codebook("op", CodebookName::kLloydMax, cbits), ErrorCode::kInvalidArgument,
                    "op:", "5, 6 or 8");
  }
  EXPECT_TQ_ERROR(parse_codebook_name("op", "lloyd"), ErrorCode::kInvalidArgument, "codebook", "\"lloyd\"");
}

TEST(Signs, CountOfNegativesIsThatOfThePublishedTable) {
  int negative = 0;
  for (int j = 0; j < 512; ++j) {
    ASSERT_EQ(std::fabs(sign_table()[j]), 1.0f);
    negative += sign_table()[j] < 0.0f;
    if (j == 255) {
      EXPECT_EQ(negative, 132);
    }
  }
  EXPECT_EQ(negative, 263);
}

}  // namespace
}  // namespace tq_hb
