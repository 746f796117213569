#include "cpu/host_storage.h"

#include <atomic>
#include <cstdlib>
#include <string>
#include <utility>

#include <sys/mman.h>

#include "core/error.h"

namespace tq_hb {
namespace {

constexpr std::uint64_t kAlignment = 64;

struct Unmap {
  void operator()(std::byte* block) const noexcept { munmap(block, size); }
  std::uint64_t size;
};
struct Free {
  void operator()(std::byte* block) const noexcept { std::free(block); }
};

/// Of which `data` is the part in use.
template <class Release>
class HostStorage final : public Storage {
 public:
  using Block = std::unique_ptr<std::byte, Release>;

  HostStorage(const Device* device, std::byte* data, std::uint64_t size, Block block)
      : Storage(device, data, size), block_(std::move(block)) {}

 private:
  Block block_;
};

[[noreturn]] void refuse(std::uint64_t size) {
  throw Error(ErrorCode::kOutOfMemory, "Device.empty: could not allocate " + std::to_string(size) + " bytes");
}

std::uint64_t past_multiple(const void* address, std::uint64_t of) noexcept {
  return reinterpret_cast<std::uintptr_t>(address) % of;
}

std::shared_ptr<Storage> allocate_small(const Device* device, std::uint64_t size) {
  HostStorage<Free>::Block block(static_cast<std::byte*>(std::calloc(size + kAlignment, 1)));
  if (block == nullptr) refuse(size);
  std::byte* data = block.get() + (kAlignment - past_multiple(block.get(), kAlignment)) % kAlignment;
  return std::make_shared<HostStorage<Free>>(device, data, size, std::move(block));
}

#if defined(MADV_HUGEPAGE)
constexpr std::uint64_t kHugePage = std::uint64_t{2} << 20;

/// Where a block begins in its first huge page. Blocks that are read together, as K and V are, would compete for the
/// same cache sets if all began in the same place.
std::uint64_t next_offset() noexcept {
  constexpr std::uint64_t kStep = 4096 + kAlignment, kPlaces = 16;
  static std::atomic<std::uint64_t> count{0};
  return count.fetch_add(1, std::memory_order_relaxed) % kPlaces * kStep;
}

std::shared_ptr<Storage> allocate_large(const Device* device, std::uint64_t size) {
  const std::uint64_t offset = next_offset();
  const std::uint64_t mapped = (offset + size + kHugePage - 1) / kHugePage * kHugePage + kHugePage;
  if (mapped < size) refuse(size);
  void* map = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) refuse(size);
  HostStorage<Unmap>::Block block(static_cast<std::byte*>(map), Unmap{mapped});
  std::byte* first = block.get() + (kHugePage - past_multiple(block.get(), kHugePage)) % kHugePage;
  // A last huge page is used if it is more than half full. All this is only advice: without it everything works, more
  // slowly.
  const std::uint64_t advised = (offset + size + kHugePage / 2) / kHugePage * kHugePage;
  static_cast<void>(madvise(first, advised, MADV_HUGEPAGE));
  return std::make_shared<HostStorage<Unmap>>(device, first + offset, size, std::move(block));
}
#endif

}  // namespace

std::shared_ptr<Storage> allocate_host_storage(const Device* device, std::uint64_t size) {
#if defined(MADV_HUGEPAGE)
  if (size >= kHugePage) return allocate_large(device, size);
#endif
  return allocate_small(device, size);
}

}  // namespace tq_hb
