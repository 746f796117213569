#include "metal/command_stream.h"

#include "core/error.h"
#include "metal/storage.h"
#include "metal/text.h"

namespace tq_hb {
namespace {

MTLSize to_mtl_size(const Size3& size) {
  return MTLSizeMake(size.width, size.height, size.depth);
}

}  // namespace

CommandStream::~CommandStream() {
  if (context_->is_forked()) {
    abandon(encoder_);
    abandon(commands_);
    return;
  }
  @autoreleasepool {
    [encoder_ endEncoding];
    if (is_committed_) [commands_ waitUntilCompleted];
    encoder_ = nil;
    commands_ = nil;
  }
}

id<MTLComputeCommandEncoder> CommandStream::encoder() {
  if (encoder_ == nil) {
    @autoreleasepool {
      MTLCommandBufferDescriptor* descriptor = [[MTLCommandBufferDescriptor alloc] init];
      descriptor.retainedReferences = NO;  // `storages_` holds the buffers, the cache the pipelines
      commands_ = [context_->queue() commandBufferWithDescriptor:descriptor];
      commands_.label = @"tq_hb";
      encoder_ = [commands_ computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent];
      encoder_.label = @"tq_hb";
    }
    if (encoder_ == nil) throw Error(ErrorCode::kDevice, "metal: the queue gives no command encoder");
  }
  return encoder_;
}

void CommandStream::set_pipeline(id<MTLComputePipelineState> pipeline) {
  [encoder() setComputePipelineState:pipeline];
}

void CommandStream::bind(unsigned slot, const Buffer& buffer) {
  storages_.push_back(buffer.storage());
  [encoder() setBuffer:native_buffer(buffer) offset:buffer.offset() atIndex:slot];
}

void CommandStream::bind_bytes(unsigned slot, const void* bytes, std::size_t size) {
  [encoder() setBytes:bytes length:size atIndex:slot];
}

void CommandStream::dispatch(const Size3& threadgroups, const Size3& threads, std::uint64_t threadgroup_bytes) {
  if (threadgroup_bytes > 0) [encoder() setThreadgroupMemoryLength:threadgroup_bytes atIndex:0];
  [encoder() dispatchThreadgroups:to_mtl_size(threadgroups) threadsPerThreadgroup:to_mtl_size(threads)];
}

void CommandStream::barrier() {
  // Nothing has been launched where there is no encoder yet.
  [encoder_ memoryBarrierWithScope:MTLBarrierScopeBuffers];
}

void CommandStream::commit() {
  @autoreleasepool {
    [encoder_ endEncoding];
    encoder_ = nil;
    is_committed_ = true;
    [commands_ commit];
  }
}

double CommandStream::wait() {
  double seconds = 0.0;
  std::string failure;
  @autoreleasepool {
    [commands_ waitUntilCompleted];
    if (commands_.status == MTLCommandBufferStatusError) failure = describe(commands_.error);
    if (commands_ != nil) seconds = commands_.GPUEndTime - commands_.GPUStartTime;
    commands_ = nil;
  }
  storages_.clear();
  if (!failure.empty()) throw Error(ErrorCode::kDevice, failure);
  return seconds;
}

}  // namespace tq_hb
