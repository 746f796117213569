// Storage that is an MTLBuffer. For Objective-C++ files.
#pragma once

#include <memory>

#import <Metal/Metal.h>

#include "core/buffer.h"
#include "metal/context.h"

namespace tq_hb {

class MetalStorage final : public Storage {
 public:
  /// The first `size` bytes of `buffer`, whose memory `owner` keeps alive if it is not the buffer's own.
  MetalStorage(const Device* _Nonnull device, std::shared_ptr<MetalContext> context, id<MTLBuffer> _Nonnull buffer,
               std::uint64_t size, std::shared_ptr<void> owner);
  ~MetalStorage() override;

  void* _Nullable native_handle() const noexcept override { return (__bridge void*)buffer_; }

 private:
  std::shared_ptr<MetalContext> context_;
  std::shared_ptr<void> owner_;
  id<MTLBuffer> _Nonnull buffer_;
};

/// Memory of the device's, which holds anything.
std::shared_ptr<Storage> allocate_metal_storage(const Device* _Nonnull device,
                                                const std::shared_ptr<MetalContext>& context, std::uint64_t size);

/// The host's memory in place: whole pages. Null where it does not start with one.
std::shared_ptr<Storage> borrow_host_storage(const Device* _Nonnull device,
                                             const std::shared_ptr<MetalContext>& context, std::byte* _Nonnull data,
                                             std::uint64_t size, std::shared_ptr<void> owner);

/// Somebody else's id<MTLBuffer>; throws if it is of another device or the host cannot reach it.
std::shared_ptr<Storage> borrow_native_storage(const Device* _Nonnull device,
                                               const std::shared_ptr<MetalContext>& context, void* _Nonnull handle,
                                               std::shared_ptr<void> owner);

inline id<MTLBuffer> _Nonnull native_buffer(const Buffer& buffer) {
  return (__bridge id<MTLBuffer>)buffer.storage()->native_handle();
}

}  // namespace tq_hb
