#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "core/packing.h"
#include "expect_error.h"

namespace tq_hb {
namespace {

class Planes : public testing::TestWithParam<std::tuple<std::size_t, unsigned>> {
 protected:
  std::size_t head_dim() const { return std::get<0>(GetParam()); }
  unsigned cbits() const { return std::get<1>(GetParam()); }

  std::vector<std::uint8_t> packed(const std::vector<std::uint8_t>& codes) const {
    // Not zero before, and a byte longer than the row: every byte of the row is written, and no other.
    std::vector<std::uint8_t> planes(row_bytes(Packing::kPlane, cbits(), head_dim()) + 1, 0xA5);
    pack_row(codes.data(), head_dim(), cbits(), planes.data());
    EXPECT_EQ(planes.back(), 0xA5);
    planes.pop_back();
    return planes;
  }
};

INSTANTIATE_TEST_SUITE_P(All, Planes, testing::Combine(testing::Values(64, 128, 256, 512), testing::Values(5, 6)));

TEST_P(Planes, PutEachBitWhereTheFormatSays) {
  for (std::size_t j = 0; j < head_dim(); ++j) {
    for (unsigned bit = 0; bit < cbits(); ++bit) {
      std::vector<std::uint8_t> codes(head_dim());
      codes[j] = static_cast<std::uint8_t>(1u << bit);
      const bool is_high = bit >= 4;
      const unsigned width = is_high ? cbits() - 4 : 4;
      const std::size_t block = head_dim() < 128 ? head_dim() : 128;
      const std::size_t bytes = block * width / 8;
      const std::size_t at = (is_high ? head_dim() / 2 : 0) + j / block * bytes + j % block % bytes;
      std::vector<std::uint8_t> want(head_dim() * cbits() / 8);
      want[at] = static_cast<std::uint8_t>(1u << (j % block / bytes * width + bit % 4));
      ASSERT_EQ(packed(codes), want) << "bit " << bit << " of coordinate " << j;
    }
  }
}

TEST_P(Planes, GiveBackWhatWentIn) {
  std::mt19937 random(1);
  std::vector<std::uint8_t> codes(head_dim()), back(head_dim(), 0xFF);
  for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(random() % (1u << cbits()));
  const std::vector<std::uint8_t> planes = packed(codes);
  unpack_row(planes.data(), head_dim(), cbits(), back.data());
  EXPECT_EQ(back, codes);

  for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(code | (random() << cbits()));
  EXPECT_EQ(packed(codes), planes) << "bits above the width";
}

TEST(Packing, TakesTheBitsOfItsCodesInPlanesAlone) {
  EXPECT_EQ(row_bytes(Packing::kByte, 5, 256), 256u);
  EXPECT_EQ(row_bytes(Packing::kPlane, 5, 256), 160u);
  EXPECT_EQ(row_bytes(Packing::kPlane, 6, 256), 192u);
  EXPECT_EQ(row_bytes(Packing::kPlane, 8, 256), 256u);
  EXPECT_EQ(row_bytes(Packing::kPlane, 5, 64), 40u);
  EXPECT_FALSE(has_planes(Packing::kPlane, 8));
  EXPECT_FALSE(has_planes(Packing::kByte, 5));
}

TEST(Packing, IsChosenByName) {
  EXPECT_EQ(parse_packing("the_op", "byte"), Packing::kByte);
  EXPECT_EQ(parse_packing("the_op", "plane"), Packing::kPlane);
  EXPECT_TQ_ERROR(parse_packing("the_op", "bytes"), ErrorCode::kInvalidArgument,
                  "the_op: packing must be one of byte, plane, got 'bytes'");
}

}  // namespace
}  // namespace tq_hb
