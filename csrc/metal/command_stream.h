// One command buffer with one concurrent compute encoder: launches that no barrier separates may overlap.
//
// For Objective-C++ files. Belongs to one thread at a time.
#pragma once

#include <memory>
#include <vector>

#import <Metal/Metal.h>

#include "core/encoder.h"
#include "metal/context.h"

namespace tq_hb {

class CommandStream {
 public:
  explicit CommandStream(std::shared_ptr<MetalContext> context) : context_(std::move(context)) {}
  /// Waits for what has been committed: its buffers may not go away before.
  ~CommandStream();
  CommandStream(const CommandStream&) = delete;
  CommandStream& operator=(const CommandStream&) = delete;

  void set_pipeline(id<MTLComputePipelineState> _Nonnull pipeline);
  /// Binds a buffer, and keeps it alive until the commands are done.
  void bind(unsigned slot, const Buffer& buffer);
  template <class T>
  void bind_bytes(unsigned slot, const T& value) {
    bind_bytes(slot, &value, sizeof(T));
  }
  void dispatch(const Size3& threadgroups, const Size3& threads, std::uint64_t threadgroup_bytes);
  void barrier();

  void commit();
  /// Returns the seconds that the GPU took; throws what the GPU reported.
  double wait();

 private:
  id<MTLComputeCommandEncoder> _Nonnull encoder();
  void bind_bytes(unsigned slot, const void* _Nonnull bytes, std::size_t size);

  std::shared_ptr<MetalContext> context_;
  id<MTLCommandBuffer> _Nullable commands_ = nil;         // made by the first launch
  id<MTLComputeCommandEncoder> _Nullable encoder_ = nil;  // open until the commit
  bool is_committed_ = false;
  std::vector<std::shared_ptr<Storage>> storages_;
};

}  // namespace tq_hb
