#include "metal/context.h"

#include <unistd.h>

#include "core/error.h"

namespace tq_hb {
namespace {

id<MTLCommandQueue> make_queue(id<MTLDevice> device) {
  id<MTLCommandQueue> queue = [device newCommandQueue];
  if (queue == nil) throw Error(ErrorCode::kDevice, "metal: the device gives no command queue");
  queue.label = @"tq_hb";
  return queue;
}

}  // namespace

MetalContext::MetalContext(id<MTLDevice> device)
    : device_(device), queue_(make_queue(device)), pipelines_(device), pid_(getpid()) {
  if (@available(macOS 15.0, *)) {
    MTLResidencySetDescriptor* descriptor = [[MTLResidencySetDescriptor alloc] init];
    descriptor.label = @"tq_hb";
    id<MTLResidencySet> set = [device_ newResidencySetWithDescriptor:descriptor error:nil];
    if (set != nil) [queue_ addResidencySet:set];
    residency_set_ = set;
  }
}

void MetalContext::add_resident(id<MTLBuffer> buffer) {
  if (@available(macOS 15.0, *)) {
    const std::lock_guard<std::mutex> lock(residency_mutex_);
    id<MTLResidencySet> set = residency_set_;
    [set addAllocation:buffer];
    [set commit];
  }
}

void MetalContext::remove_resident(id<MTLBuffer> buffer) {
  if (@available(macOS 15.0, *)) {
    const std::lock_guard<std::mutex> lock(residency_mutex_);
    id<MTLResidencySet> set = residency_set_;
    [set removeAllocation:buffer];
    [set commit];
  }
}

bool MetalContext::is_forked() const noexcept {
  return getpid() != pid_;
}

}  // namespace tq_hb
