// Buffers and residency sets.
#include <algorithm>
#include <cstring>
#include <mutex>

#include <unistd.h>

#import "simulated.h"

using metal_sim::require;

namespace metal_sim {
namespace {

// Metal does not promise zeros; whoever counts on them shall see it.
constexpr int kFreshByte = 0xA5;

// Guarded blocks for setBytes:, used again and again: to map one takes longer than to run a small kernel.
class BlockPool {
 public:
  std::byte* take() {
    std::lock_guard lock(lock_);
    if (free_.empty()) return allocate(kMaxInlineBytes);
    std::byte* block = free_.back();
    free_.pop_back();
    return block;
  }

  void give_back(std::byte* block) {
    std::lock_guard lock(lock_);
    if (free_.size() < kMostFree) {
      free_.push_back(block);
    } else {
      release(block, kMaxInlineBytes);
    }
  }

 private:
  static constexpr std::size_t kMostFree = 1024;
  std::mutex lock_;
  std::vector<std::byte*> free_;
};

// Never destroyed: blocks come back as late as objects are released.
BlockPool& blocks() {
  static auto* pool = new BlockPool;
  return *pool;
}

}  // namespace

std::shared_ptr<const Memory> allocate_memory(std::size_t size) {
  std::shared_ptr<const Memory> memory(new Memory{allocate(size), size}, [](const Memory* dying) {
    release(dying->data, dying->size);
    delete dying;
  });
  std::memset(memory->data, kFreshByte, size);
  return memory;
}

std::shared_ptr<const Memory> adopt_memory(void* data, std::size_t size) {
  return std::make_shared<const Memory>(Memory{static_cast<std::byte*>(data), size});
}

// The copy lies at the end of its block, where the guard page begins.
std::shared_ptr<const Memory> copy_bytes(const void* bytes, std::size_t size) {
  constexpr std::size_t kAlignment = 16;
  const std::size_t padded = (size + kAlignment - 1) / kAlignment * kAlignment;
  std::byte* block = blocks().take();
  std::shared_ptr<const Memory> memory(new Memory{block + kMaxInlineBytes - padded, size},
                                       [block](const Memory* dying) {
                                         blocks().give_back(block);
                                         delete dying;
                                       });
  std::memset(memory->data, kFreshByte, padded);
  std::memcpy(memory->data, bytes, size);
  return memory;
}

}  // namespace metal_sim

@implementation SimBuffer
@synthesize memory = memory_;
@synthesize device = device_;
@synthesize label = label_;

- (instancetype)initWithDevice:(id<MTLDevice>)device memory:(std::shared_ptr<const metal_sim::Memory>)memory {
  device_ = device;
  memory_ = std::move(memory);
  return self;
}
- (void*)contents {
  return memory_->data;
}
- (NSUInteger)length {
  return memory_->size;
}
- (NSUInteger)allocatedSize {
  const auto page = static_cast<NSUInteger>(getpagesize());
  return (memory_->size + page - 1) / page * page;
}
- (MTLStorageMode)storageMode {
  return MTLStorageModeShared;
}
@end

@implementation MTLResidencySetDescriptor
@end

// Holds its members as Apple's does: removed ones until the next commit.
@implementation SimResidencySet {
  std::vector<id<MTLAllocation>> wanted_, committed_;
}
@synthesize device = device_;

- (instancetype)initWithDevice:(id<MTLDevice>)device {
  device_ = device;
  return self;
}
- (void)addAllocation:(id<MTLAllocation>)allocation {
  require(allocation != nil, "MTLResidencySet", _cmd, "allocation must not be nil");
  require(static_cast<id<MTLResource>>(allocation).device == device_, "MTLResidencySet", _cmd,
          "allocation must be of the set's device");
  if (std::find(wanted_.begin(), wanted_.end(), allocation) == wanted_.end()) wanted_.push_back(allocation);
}
- (void)removeAllocation:(id<MTLAllocation>)allocation {
  wanted_.erase(std::remove(wanted_.begin(), wanted_.end(), allocation), wanted_.end());
}
- (void)commit {
  committed_ = wanted_;
}
- (void)requestResidency {
}
@end
