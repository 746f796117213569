#include <cstring>

#include "core/device.h"
#include "expect_error.h"
#include "registry.h"

namespace tq_hb {
namespace {

TEST(Registry, OpensTheCpuAndSaysWhyTheOthersAreMissing) {
  EXPECT_EQ(open_device("cpu")->backend(), "cpu");
  for (const BackendStatus& status : backend_statuses()) {
    if (status.device != nullptr) continue;
    EXPECT_FALSE(status.reason.empty());
    EXPECT_TQ_ERROR(open_device(status.backend), ErrorCode::kDevice, status.backend.c_str(), status.reason.c_str());
  }
  EXPECT_TQ_ERROR(open_device("tpu"), ErrorCode::kInvalidArgument, "\"tpu\"");
}

TEST(Buffer, IsZeroedAndAligned) {
  const Buffer buffer = open_device("cpu")->empty(DType::kFloat32, {3, 5});
  EXPECT_EQ(buffer.nbytes(), 60u);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.host()) % 64, 0u);
  for (int i = 0; i < 15; ++i) EXPECT_EQ(buffer.data<float>()[i], 0.0f);
}

TEST(Buffer, LargeOnesAreZeroedAndAlignedAndBeginInDifferentPlaces) {
  const auto device = open_device("cpu");
  constexpr std::uint64_t kHugePage = std::uint64_t{2} << 20, kSizes[] = {kHugePage - 1, kHugePage, 3 * kHugePage + 1};
  for (const std::uint64_t size : kSizes) {
    const Buffer first = device->empty(DType::kUint8, {size}), second = device->empty(DType::kUint8, {size});
    const auto begin = reinterpret_cast<std::uintptr_t>(first.host());
    const auto other = reinterpret_cast<std::uintptr_t>(second.host());
    EXPECT_EQ(begin % 64, 0u);
    EXPECT_NE(begin % kHugePage, other % kHugePage) << size;
    EXPECT_EQ(first.host()[0], std::byte{});
    EXPECT_EQ(first.host()[size - 1], std::byte{});
    std::memset(first.host(), 1, size);
    EXPECT_EQ(second.host()[0], std::byte{});
    EXPECT_EQ(second.host()[size - 1], std::byte{});
  }
}

TEST(Buffer, SlicesShareStorage) {
  const Buffer buffer = open_device("cpu")->empty(DType::kUint16, {4, 3});
  const Buffer middle = buffer.slice(1, 3);
  EXPECT_EQ(middle.shape(), (Shape{2, 3}));
  EXPECT_EQ(middle.offset(), 6u);
  middle.data<std::uint16_t>()[0] = 7;
  EXPECT_EQ(buffer.data<std::uint16_t>()[3], 7);
  EXPECT_EQ(buffer.row(3).shape(), (Shape{3}));
  EXPECT_EQ(buffer.slice(2, 2).nbytes(), 0u);
}

TEST(Buffer, RefusesWhatDoesNotFit) {
  const Buffer buffer = open_device("cpu")->empty(DType::kUint8, {16});
  EXPECT_TQ_ERROR(Buffer(buffer.storage(), DType::kFloat32, {5}), ErrorCode::kInvalidArgument, "16 bytes");
  EXPECT_TQ_ERROR(Buffer(buffer.storage(), DType::kFloat32, {4}, 4), ErrorCode::kInvalidArgument, "16 bytes");
  EXPECT_TQ_ERROR(Buffer(buffer.storage(), DType::kFloat32, {1}, 2), ErrorCode::kInvalidArgument, "aligned");
  EXPECT_TQ_ERROR(Buffer(buffer.storage(), DType::kUint8, {1}, ~std::uint64_t{0}), ErrorCode::kInvalidArgument, "fit");
  EXPECT_TQ_ERROR(buffer.slice(3, 2), ErrorCode::kInvalidArgument, "3:2");
  EXPECT_TQ_ERROR(buffer.slice(0, 17), ErrorCode::kInvalidArgument, "0:17");
}

TEST(Buffer, SizesAreCheckedBeforeAnythingIsAllocated) {
  const auto device = open_device("cpu");
  const std::uint64_t huge = std::uint64_t{1} << 32;
  EXPECT_TQ_ERROR(device->empty(DType::kFloat32, {huge, huge}), ErrorCode::kInvalidArgument, "size");
  EXPECT_TQ_ERROR(device->empty(DType::kUint8, {std::uint64_t{1} << 62}), ErrorCode::kOutOfMemory, "bytes");
}

TEST(Buffer, OverlapIsSeenThroughDifferentStorages) {
  const auto device = open_device("cpu");
  std::vector<std::byte> memory(64);
  const auto wrap = [&](std::size_t offset, std::size_t size) {
    return Buffer(device->wrap_host(memory.data() + offset, size, nullptr), DType::kUint8, {size});
  };
  EXPECT_TRUE(wrap(0, 32).overlaps(wrap(31, 8)));
  EXPECT_FALSE(wrap(0, 32).overlaps(wrap(32, 8)));
  EXPECT_FALSE(wrap(0, 0).overlaps(wrap(0, 8)));
  EXPECT_TRUE(wrap(8, 1).overlaps(wrap(0, 64)));
}

}  // namespace
}  // namespace tq_hb
