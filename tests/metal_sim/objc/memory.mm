// Buffers and residency sets.
#include <algorithm>
#include <cstring>

#include <unistd.h>

#import "simulated.h"

using metal_sim::require;

namespace metal_sim {

std::shared_ptr<Memory> Memory::allocate(std::size_t size) {
  std::byte* data = metal_sim::allocate(size);
  // Metal does not promise zeros; whoever counts on them shall see it.
  std::memset(data, 0xA5, size);
  return std::shared_ptr<Memory>(new Memory(data, size, true));
}

std::shared_ptr<Memory> Memory::adopt(void* data, std::size_t size) {
  return std::shared_ptr<Memory>(new Memory(static_cast<std::byte*>(data), size, false));
}

Memory::~Memory() {
  if (is_owned_) metal_sim::release(data_, size_);
}

}  // namespace metal_sim

@implementation SimBuffer
@synthesize memory = memory_;
@synthesize device = device_;
@synthesize label = label_;

- (instancetype)initWithDevice:(id<MTLDevice>)device memory:(std::shared_ptr<metal_sim::Memory>)memory {
  device_ = device;
  memory_ = std::move(memory);
  return self;
}
- (void*)contents {
  return memory_->data();
}
- (NSUInteger)length {
  return memory_->size();
}
- (NSUInteger)allocatedSize {
  const auto page = static_cast<NSUInteger>(getpagesize());
  return (memory_->size() + page - 1) / page * page;
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
