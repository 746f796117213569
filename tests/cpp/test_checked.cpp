#include "core/checked.h"
#include "expect_error.h"

namespace tq_hb {
namespace {

TEST(CheckedProduct, MultipliesWhatFits) {
  EXPECT_EQ(checked_product("op", "size", {}), 1u);
  EXPECT_EQ(checked_product("op", "size", {3, 5, 7}), 105u);
  EXPECT_EQ(checked_product("op", "size", {std::uint64_t{1} << 31, std::uint64_t{1} << 31}), std::uint64_t{1} << 62);
}

TEST(CheckedProduct, ZeroWinsOverAnOverflow) {
  EXPECT_EQ(checked_product("op", "size", {~std::uint64_t{0}, ~std::uint64_t{0}, 0}), 0u);
}

TEST(CheckedProduct, RefusesToWrap) {
  EXPECT_TQ_ERROR(checked_product("op", "size", {std::uint64_t{1} << 32, std::uint64_t{1} << 31}),
                  ErrorCode::kInvalidArgument, "op: size", "63 bits");
  EXPECT_TQ_ERROR(checked_product("op", "size", {~std::uint64_t{0}}), ErrorCode::kInvalidArgument, "size");
}

}  // namespace
}  // namespace tq_hb
