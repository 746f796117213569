// Pipelines by key, made on first use. For Objective-C++ files; may be used from any thread.
#pragma once

#include <mutex>

#import <Metal/Metal.h>

#include "core/spec_cache.h"
#include "metal/pipeline_key.h"

namespace tq_hb {

class PipelineCache {
 public:
  explicit PipelineCache(id<MTLDevice> _Nonnull device) : device_(device) {}

  /// Throws what the compiler said, naming the kernel.
  id<MTLComputePipelineState> _Nonnull get(const PipelineKey& key) {
    return pipelines_.get(key, [&] { return build(key); });
  }
  /// How many pipelines have been made.
  std::size_t builds() const noexcept { return pipelines_.builds(); }

 private:
  id<MTLLibrary> _Nonnull library();
  id<MTLComputePipelineState> _Nonnull build(const PipelineKey& key);

  id<MTLDevice> _Nonnull device_;
  std::mutex library_mutex_;
  id<MTLLibrary> _Nullable library_ = nil;
  SpecCache<PipelineKey, id<MTLComputePipelineState>, PipelineKeyHash> pipelines_;
};

}  // namespace tq_hb
