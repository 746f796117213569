// The compute command encoder: state, and its capture at each dispatch.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <stdexcept>

#import "simulated.h"

using metal_sim::kMaxBuffers;
using metal_sim::kMaxThreadgroupBuffers;
using metal_sim::require;

namespace {

constexpr const char* kProtocol = "MTLComputeCommandEncoder";

struct BoundBuffer {
  std::shared_ptr<const metal_sim::Memory> memory;
  std::size_t offset = 0;
  std::string label;

  std::size_t size() const { return memory->size - offset; }
};

metal_sim::Size3 to_size3(MTLSize size) {
  return {static_cast<std::uint32_t>(size.width), static_cast<std::uint32_t>(size.height),
          static_cast<std::uint32_t>(size.depth)};
}

bool is_within(MTLSize size, NSUInteger most) {
  const auto fits = [most](NSUInteger extent) { return extent >= 1 && extent <= most; };
  return fits(size.width) && fits(size.height) && fits(size.depth);
}

// METAL_SIM_DROP_BARRIERS=1 lets tests show that the barriers of a program matter.
bool drops_barriers() {
  const char* value = std::getenv("METAL_SIM_DROP_BARRIERS");
  const std::string text = value == nullptr ? "" : value;
  if (text.empty() || text == "0") return false;
  if (text == "1") return true;
  throw std::invalid_argument("METAL_SIM_DROP_BARRIERS must be 0 or 1, got " + text);
}

std::string to_string(MTLSize size) {
  return "(" + std::to_string(size.width) + ", " + std::to_string(size.height) + ", " + std::to_string(size.depth) +
         ")";
}

}  // namespace

@implementation SimComputeCommandEncoder {
  SimCommandBuffer* command_buffer_;
  bool is_concurrent_, has_ended_;
  unsigned misuse_count_at_start_;
  std::shared_ptr<const metal_sim::Pipeline> pipeline_;
  std::array<BoundBuffer, kMaxBuffers> buffers_;
  std::array<std::uint32_t, kMaxThreadgroupBuffers> threadgroup_bytes_;
  metal_sim::Batch batch_;
}
@synthesize label = label_;

- (instancetype)initWithCommandBuffer:(SimCommandBuffer*)commandBuffer dispatchType:(MTLDispatchType)dispatchType {
  command_buffer_ = commandBuffer;
  is_concurrent_ = dispatchType == MTLDispatchTypeConcurrent;
  misuse_count_at_start_ = metal_sim::misuse_count;
  return self;
}

// A release must not throw, so this stops the program, as Metal does.
- (void)dealloc {
  if (has_ended_ || metal_sim::misuse_count != misuse_count_at_start_) return;
  std::fprintf(stderr, "-[%s dealloc]: the encoder was released before endEncoding\n", kProtocol);
  std::abort();
}

- (void)requireOpenFor:(SEL)method {
  require(!has_ended_, kProtocol, method, "the encoder has ended");
}

- (void)insertDebugSignpost:(NSString*)string {
  [self requireOpenFor:_cmd];
  require(string != nil, kProtocol, _cmd, "string must not be nil");
}

- (void)setComputePipelineState:(id<MTLComputePipelineState>)state {
  [self requireOpenFor:_cmd];
  auto* pipeline = static_cast<SimComputePipelineState*>(state);
  require(pipeline != nil, kProtocol, _cmd, "state must not be nil");
  require(pipeline.device == command_buffer_.device, kProtocol, _cmd, "state must be of the encoder's device");
  pipeline_ = pipeline.pipeline;
}

- (void)setBuffer:(id<MTLBuffer>)buffer offset:(NSUInteger)offset atIndex:(NSUInteger)index {
  [self requireOpenFor:_cmd];
  require(index < kMaxBuffers, kProtocol, _cmd, "index must be less than ", kMaxBuffers, ", got ", index);
  if (buffer == nil) {
    buffers_[index] = {};
    return;
  }
  require(buffer.device == command_buffer_.device, kProtocol, _cmd, "buffer must be of the encoder's device");
  require(offset < buffer.length, kProtocol, _cmd, "offset must be less than the buffer's ", buffer.length,
          " bytes, got ", offset);
  NSString* label = buffer.label;
  buffers_[index] = {static_cast<SimBuffer*>(buffer).memory, offset, label == nil ? "" : label.UTF8String};
}

- (void)setBytes:(const void*)bytes length:(NSUInteger)length atIndex:(NSUInteger)index {
  constexpr NSUInteger kMaxBytes = metal_sim::kMaxInlineBytes;
  [self requireOpenFor:_cmd];
  require(index < kMaxBuffers, kProtocol, _cmd, "index must be less than ", kMaxBuffers, ", got ", index);
  require(length >= 1 && length <= kMaxBytes, kProtocol, _cmd, "length must be 1 to ", kMaxBytes, ", got ", length);
  require(bytes != nullptr, kProtocol, _cmd, "bytes must not be null");
  auto memory = metal_sim::copy_bytes(bytes, length);
  [command_buffer_ keep:memory];
  buffers_[index] = {std::move(memory), 0, ""};
}

- (void)setThreadgroupMemoryLength:(NSUInteger)length atIndex:(NSUInteger)index {
  constexpr NSUInteger kAlignment = 16;
  [self requireOpenFor:_cmd];
  require(index < kMaxThreadgroupBuffers, kProtocol, _cmd, "index must be less than ", kMaxThreadgroupBuffers, ", got ",
          index);
  require(length % kAlignment == 0, kProtocol, _cmd, "length must be a multiple of ", kAlignment, ", got ", length);
  require(length <= metal_sim::kMaxThreadgroupBytes, kProtocol, _cmd, "length must be at most ",
          metal_sim::kMaxThreadgroupBytes, ", got ", length);
  threadgroup_bytes_[index] = static_cast<std::uint32_t>(length);
}

- (void)checkSizes:(MTLSize)threadgroups threads:(MTLSize)threads for:(SEL)method {
  require(is_within(threadgroups, std::numeric_limits<std::uint32_t>::max()), kProtocol, method,
          "threadgroupsPerGrid must be 1 to 2^32-1 in each direction, got ", to_string(threadgroups));
  require(is_within(threads, pipeline_->max_threads), kProtocol, method, "threadsPerThreadgroup must be 1 to ",
          pipeline_->max_threads, " in each direction, got ", to_string(threads));
  const NSUInteger total = threads.width * threads.height * threads.depth;
  require(total <= pipeline_->max_threads, kProtocol, method, "threadsPerThreadgroup must be at most ",
          pipeline_->max_threads, " in all, got ", to_string(threads));
  require(!pipeline_->needs_whole_simdgroups || total % metal_sim::kSimdWidth == 0, kProtocol, method,
          "the pipeline wants a multiple of ", metal_sim::kSimdWidth, " threads, got ", total);
}

- (void)checkBindingsFor:(SEL)method {
  const metal_sim::Kernel& kernel = *pipeline_->kernel;
  for (unsigned slot : kernel.buffers) {
    require(buffers_[slot].memory != nullptr, kProtocol, method, kernel.name, ": buffer ", slot, " is not bound");
  }
  for (unsigned slot : kernel.threadgroup_buffers) {
    require(threadgroup_bytes_[slot] != 0, kProtocol, method, kernel.name, ": threadgroup memory ", slot,
            " has no length");
  }
  const auto bytes = std::accumulate(threadgroup_bytes_.begin(), threadgroup_bytes_.end(), std::size_t{0});
  require(bytes <= metal_sim::kMaxThreadgroupBytes, kProtocol, method, kernel.name,
          ": threadgroup memory must be at most ", metal_sim::kMaxThreadgroupBytes, " bytes in all, got ", bytes);
}

- (void)dispatchThreadgroups:(MTLSize)threadgroupsPerGrid threadsPerThreadgroup:(MTLSize)threadsPerThreadgroup {
  [self requireOpenFor:_cmd];
  require(pipeline_ != nullptr, kProtocol, _cmd, "no pipeline is set");
  [self checkSizes:threadgroupsPerGrid threads:threadsPerThreadgroup for:_cmd];
  [self checkBindingsFor:_cmd];

  metal_sim::Dispatch dispatch;
  dispatch.library = pipeline_->library;
  dispatch.kernel = pipeline_->kernel;
  dispatch.constants = pipeline_->constants;
  dispatch.threadgroup_bytes = threadgroup_bytes_;
  dispatch.threadgroups = to_size3(threadgroupsPerGrid);
  dispatch.threads = to_size3(threadsPerThreadgroup);
  [command_buffer_ use:pipeline_ as:"pipeline"];
  for (unsigned slot : dispatch.kernel->buffers) {
    const BoundBuffer& bound = buffers_[slot];
    dispatch.buffers[slot] = {bound.memory->data + bound.offset, bound.size(), bound.label};
    [command_buffer_ use:bound.memory as:"buffer"];
  }
  batch_.push_back(std::move(dispatch));
  if (!is_concurrent_) [self endBatch];
}

- (void)endBatch {
  if (!batch_.empty()) [command_buffer_ addBatch:std::move(batch_)];
  batch_.clear();
}

- (void)memoryBarrierWithScope:(MTLBarrierScope)scope {
  [self requireOpenFor:_cmd];
  require(scope == MTLBarrierScopeBuffers, kProtocol, _cmd,
          "scope must be MTLBarrierScopeBuffers, the only one simulated");
  if (!drops_barriers()) [self endBatch];
}

- (void)endEncoding {
  [self requireOpenFor:_cmd];
  [self endBatch];
  buffers_ = {};
  has_ended_ = true;
  [command_buffer_ encoderEnded];
}
@end
