// Command queues and command buffers. A command buffer runs when it is committed, in the calling thread.
#include <chrono>
#include <mutex>

#import "Foundation/private.h"
#import "simulated.h"

using metal_sim::require;

NSErrorDomain const MTLCommandBufferErrorDomain = @"MTLCommandBufferErrorDomain";

namespace {

constexpr const char* kProtocol = "MTLCommandBuffer";

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

@implementation MTLCommandBufferDescriptor
- (instancetype)init {
  self.retainedReferences = YES;
  return self;
}
@end

@implementation SimCommandQueue {
  std::mutex lock_;
  std::vector<SimResidencySet*> residency_sets_;
}
@synthesize device = device_;
@synthesize label = label_;

- (instancetype)initWithDevice:(id<MTLDevice>)device {
  device_ = device;
  return self;
}
- (id<MTLCommandBuffer>)commandBuffer {
  return [[SimCommandBuffer alloc] initWithQueue:self retainedReferences:YES];
}
- (id<MTLCommandBuffer>)commandBufferWithDescriptor:(MTLCommandBufferDescriptor*)descriptor {
  require(descriptor != nil, "MTLCommandQueue", _cmd, "descriptor must not be nil");
  return [[SimCommandBuffer alloc] initWithQueue:self retainedReferences:descriptor.retainedReferences];
}
- (void)addResidencySet:(id<MTLResidencySet>)residencySet {
  constexpr std::size_t kMaxSets = 32;
  auto* set = static_cast<SimResidencySet*>(residencySet);
  require(set != nil, "MTLCommandQueue", _cmd, "residencySet must not be nil");
  require(set.device == device_, "MTLCommandQueue", _cmd, "residencySet must be of the queue's device");
  std::lock_guard lock(lock_);
  require(residency_sets_.size() < kMaxSets, "MTLCommandQueue", _cmd, "a queue takes at most ", kMaxSets, " sets");
  residency_sets_.push_back(set);
}
@end

@implementation SimCommandBuffer {
  SimCommandQueue* queue_;
  std::mutex running_;
  bool retains_references_, has_open_encoder_;
  std::vector<metal_sim::Batch> batches_;
  std::vector<metal_sim::Reference> references_;
}
@synthesize label = label_;
@synthesize status = status_;
@synthesize error = error_;
@synthesize GPUStartTime = GPUStartTime_;
@synthesize GPUEndTime = GPUEndTime_;

- (instancetype)initWithQueue:(SimCommandQueue*)queue retainedReferences:(BOOL)retainedReferences {
  queue_ = queue;
  retains_references_ = retainedReferences;
  return self;
}
- (id<MTLDevice>)device {
  return queue_.device;
}

- (id<MTLComputeCommandEncoder>)computeCommandEncoderWithDispatchType:(MTLDispatchType)dispatchType {
  require(status_ == MTLCommandBufferStatusNotEnqueued, kProtocol, _cmd, "the command buffer is already committed");
  require(!has_open_encoder_, kProtocol, _cmd, "the encoder before must be ended first");
  has_open_encoder_ = true;
  return [[SimComputeCommandEncoder alloc] initWithCommandBuffer:self dispatchType:dispatchType];
}
- (void)encoderEnded {
  has_open_encoder_ = false;
}
- (void)addBatch:(metal_sim::Batch)batch {
  batches_.push_back(std::move(batch));
}
- (void)use:(std::shared_ptr<const void>)thing as:(const char*)what {
  references_.push_back({retains_references_ ? thing : nullptr, thing, what});
}

- (void)keep:(std::shared_ptr<const void>)thing {
  references_.push_back({thing, thing, "copy of bytes"});
}

- (void)checkReferencesFor:(SEL)method {
  for (const metal_sim::Reference& reference : references_) {
    require(!reference.watched.expired(), kProtocol, method, "a ", reference.what,
            " was released before the command buffer completed, which retains nothing");
  }
}

- (void)commit {
  std::lock_guard lock(running_);
  require(status_ == MTLCommandBufferStatusNotEnqueued, kProtocol, _cmd, "the command buffer is already committed");
  require(!has_open_encoder_, kProtocol, _cmd, "the encoder must be ended first");
  [self checkReferencesFor:_cmd];
  status_ = MTLCommandBufferStatusCommitted;
  GPUStartTime_ = now();
  try {
    GPUEndTime_ = GPUStartTime_ + metal_sim::execute(batches_);
    status_ = MTLCommandBufferStatusCompleted;
  } catch (const std::exception& failure) {
    GPUEndTime_ = now();
    error_ = make_error(MTLCommandBufferErrorDomain, MTLCommandBufferErrorInternal, failure.what());
    status_ = MTLCommandBufferStatusError;
  }
  batches_.clear();
  if (retains_references_) references_.clear();
}

- (void)waitUntilCompleted {
  std::lock_guard lock(running_);
  require(status_ >= MTLCommandBufferStatusCommitted, kProtocol, _cmd, "the command buffer must be committed first");
  // On a GPU the work may have lasted until now.
  [self checkReferencesFor:_cmd];
  references_.clear();
}
@end
