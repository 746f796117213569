// What the parts of the Metal backend share: a device, its queue, its pipelines and the process they belong to.
//
// For Objective-C++ files; may be used from any thread.
#pragma once

#include <mutex>

#import <Metal/Metal.h>

#include "metal/pipeline_cache.h"

namespace tq_hb {

class MetalContext {
 public:
  explicit MetalContext(id<MTLDevice> _Nonnull device);
  MetalContext(const MetalContext&) = delete;
  MetalContext& operator=(const MetalContext&) = delete;

  id<MTLDevice> _Nonnull device() const noexcept { return device_; }
  id<MTLCommandQueue> _Nonnull queue() const noexcept { return queue_; }
  PipelineCache& pipelines() noexcept { return pipelines_; }

  /// Keeps a buffer resident for every command buffer, where the system can do that ahead of time.
  void add_resident(id<MTLBuffer> _Nonnull buffer);
  void remove_resident(id<MTLBuffer> _Nonnull buffer);

  /// Whether this is a child of the process that opened the device. Metal must not be called there.
  bool is_forked() const noexcept;

 private:
  id<MTLDevice> _Nonnull device_;
  id<MTLCommandQueue> _Nonnull queue_;
  PipelineCache pipelines_;
  std::mutex residency_mutex_;
  id _Nullable residency_set_ = nil;  // an id<MTLResidencySet>, which macOS has since 15
  int pid_;
};

/// Leaves an object to the end of the process: in a forked child not even its release may reach Metal.
inline void abandon(id _Nullable object) {
  static_cast<void>((__bridge_retained void*)object);
}

}  // namespace tq_hb
