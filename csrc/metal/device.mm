#include "metal/device.h"

#include <cstring>
#include <utility>

#import <Metal/Metal.h>

#include "metal/context.h"
#include "metal/encoder.h"
#include "metal/storage.h"
#include "metal/text.h"

namespace tq_hb {
namespace {

class MetalDevice final : public Device {
 public:
  explicit MetalDevice(id<MTLDevice> device)
      : context_(std::make_shared<MetalContext>(device)),
        name_(to_string(device.name)),
        limits_{device.maxBufferLength, 0, device.maxThreadgroupMemoryLength, device.maxThreadsPerThreadgroup.width} {}

  std::string name() const override { return name_; }
  std::string backend() const override { return "metal"; }
#if defined(TQ_HB_METAL_SIMULATED)
  bool is_simulated() const override { return true; }
#endif
  DeviceLimits limits() const override { return limits_; }
  bool offers(AttendKernel, std::uint64_t, Packing, unsigned, unsigned) const override { return true; }
  void check_usable(const std::string& op) const override {
    if (!context_->is_forked()) return;
    throw Error(ErrorCode::kDevice, op + ": Metal cannot be used in a forked child of the process that opened the "
                                         "device; start the child by spawn, or open the device only there");
  }

 private:
  std::shared_ptr<Storage> allocate(std::uint64_t size) const override {
    auto storage = allocate_metal_storage(this, context_, size);
    std::memset(storage->host(), 0, size);
    return storage;
  }
  std::shared_ptr<Storage> borrow_host(std::byte* data, std::uint64_t size,
                                       std::shared_ptr<void> owner) const override {
    return borrow_host_storage(this, context_, data, size, std::move(owner));
  }
  std::shared_ptr<Storage> borrow_native(void* handle, std::shared_ptr<void> owner) const override {
    return borrow_native_storage(this, context_, handle, std::move(owner));
  }
  std::unique_ptr<CommandEncoder> new_encoder(bool auto_barrier) const override {
    return make_metal_encoder(this, context_, auto_barrier);
  }
  void prepare(const std::vector<unsigned>& cbits) const override {
    for (const PipelineKey& key : all_pipelines(cbits)) context_->pipelines().get(key);
  }

  std::shared_ptr<MetalContext> context_;
  std::string name_;
  DeviceLimits limits_;
};

}  // namespace

std::shared_ptr<Device> make_metal_device() {
  @autoreleasepool {
    id<MTLDevice> device = MTLCreateSystemDefaultDevice();
    if (device != nil) return std::make_shared<MetalDevice>(device);
  }
  throw Error(ErrorCode::kDevice, "this system has no Metal GPU");
}

const std::shared_ptr<Device>& metal_device() {
  // Never destroyed: at the end of a forked child that would call Metal.
  static const auto* const device = new std::shared_ptr<Device>(make_metal_device());
  return *device;
}

}  // namespace tq_hb
