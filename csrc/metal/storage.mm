#include "metal/storage.h"

#include <algorithm>
#include <utility>

#include <unistd.h>

#include "core/error.h"

namespace tq_hb {

MetalStorage::MetalStorage(const Device* device, std::shared_ptr<MetalContext> context, id<MTLBuffer> buffer,
                           std::uint64_t size, std::shared_ptr<void> owner)
    : Storage(device, static_cast<std::byte*>(buffer.contents), size),
      context_(std::move(context)),
      owner_(std::move(owner)),
      buffer_(buffer) {
  context_->add_resident(buffer_);
}

MetalStorage::~MetalStorage() {
  if (context_->is_forked()) {
    abandon(buffer_);
  } else {
    @autoreleasepool {
      context_->remove_resident(buffer_);
    }
  }
}

std::shared_ptr<Storage> allocate_metal_storage(const Device* device, const std::shared_ptr<MetalContext>& context,
                                                std::uint64_t size) {
  @autoreleasepool {
    // Metal has no empty buffers.
    id<MTLBuffer> buffer = [context->device() newBufferWithLength:std::max<std::uint64_t>(size, 1)
                                                          options:MTLResourceStorageModeShared];
    if (buffer != nil) return std::make_shared<MetalStorage>(device, context, buffer, size, nullptr);
  }
  throw Error(ErrorCode::kOutOfMemory, "Device.empty: could not allocate " + std::to_string(size) + " bytes");
}

std::shared_ptr<Storage> borrow_host_storage(const Device* device, const std::shared_ptr<MetalContext>& context,
                                             std::byte* data, std::uint64_t size, std::shared_ptr<void> owner) {
  const auto page = static_cast<std::uint64_t>(getpagesize());
  if (size == 0 || reinterpret_cast<std::uintptr_t>(data) % page != 0) return nullptr;
  @autoreleasepool {
    // The end of the last page is mapped as well, and no kernel looks at it.
    id<MTLBuffer> buffer = [context->device() newBufferWithBytesNoCopy:data
                                                                length:(size + page - 1) / page * page
                                                               options:MTLResourceStorageModeShared
                                                           deallocator:nil];
    return buffer == nil ? nullptr : std::make_shared<MetalStorage>(device, context, buffer, size, std::move(owner));
  }
}

std::shared_ptr<Storage> borrow_native_storage(const Device* device, const std::shared_ptr<MetalContext>& context,
                                               void* handle, std::shared_ptr<void> owner) {
  @autoreleasepool {
    id<MTLBuffer> buffer = (__bridge id<MTLBuffer>)handle;
    if (buffer.device != context->device()) {
      throw invalid("Device.wrap_native", "handle", "must be an MTLBuffer of this device", "one of another device");
    }
    if (buffer.storageMode != MTLStorageModeShared) {
      throw invalid("Device.wrap_native", "handle", "must have shared storage",
                    "storage mode " + std::to_string(buffer.storageMode));
    }
    return std::make_shared<MetalStorage>(device, context, buffer, buffer.length, std::move(owner));
  }
}

}  // namespace tq_hb
