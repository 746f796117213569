// The classes behind the Metal protocols. Each checks what it is asked, records it, and leaves the running to engine.h.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#import <Metal/Metal.h>

#include "engine.h"
#include "misuse.h"

/// Makes a second simulated device, whose objects the first one must refuse.
extern "C" id<MTLDevice> metal_sim_new_device(void) NS_RETURNS_RETAINED;

namespace metal_sim {

/// The bytes behind a buffer, or behind a setBytes: call.
struct Memory {
  std::byte* data;
  std::size_t size;
};

std::shared_ptr<const Memory> allocate_memory(std::size_t size);
/// Memory that stays the caller's.
std::shared_ptr<const Memory> adopt_memory(void* data, std::size_t size);
/// A copy of at most kMaxInlineBytes bytes.
std::shared_ptr<const Memory> copy_bytes(const void* bytes, std::size_t size);

constexpr std::size_t kMaxInlineBytes = 4096;

/// A kernel with its constants and limits: everything of a pipeline that a dispatch needs.
struct Pipeline {
  std::shared_ptr<const Library> library;
  const Kernel* kernel;
  std::map<unsigned, std::vector<std::byte>> constants;
  std::size_t max_threads;
  bool needs_whole_simdgroups;
};

/// Something that recorded commands use. Where the command buffer does not retain it, it is only watched.
struct Reference {
  std::shared_ptr<const void> kept;
  std::weak_ptr<const void> watched;
  const char* what;
};

struct ConstantValue {
  ConstantType type;
  std::vector<std::byte> bytes;
};

template <class... Parts>
void require(bool holds, const char* protocol, SEL method, const Parts&... rule) {
  if (!holds) misuse(protocol, reinterpret_cast<const char*>(method), rule...);
}

}  // namespace metal_sim

@interface SimBuffer : NSObject <MTLBuffer>
@property(nonatomic, readonly) std::shared_ptr<const metal_sim::Memory> memory;
- (instancetype)initWithDevice:(id<MTLDevice>)device memory:(std::shared_ptr<const metal_sim::Memory>)memory;
@end

@interface SimResidencySet : NSObject <MTLResidencySet>
@property(nonatomic, readonly) id<MTLDevice> device;
- (instancetype)initWithDevice:(id<MTLDevice>)device;
@end

@interface MTLFunctionConstantValues ()
@property(nonatomic, readonly) const std::map<unsigned, metal_sim::ConstantValue>& values;
@end

@interface SimLibrary : NSObject <MTLLibrary>
- (instancetype)initWithDevice:(id<MTLDevice>)device compiled:(std::shared_ptr<const metal_sim::Library>)compiled;
@end

@interface SimComputePipelineState : NSObject <MTLComputePipelineState>
@property(nonatomic, readonly) id<MTLDevice> device;
@property(nonatomic, readonly) std::shared_ptr<const metal_sim::Pipeline> pipeline;
- (instancetype)initWithDevice:(id<MTLDevice>)device descriptor:(MTLComputePipelineDescriptor*)descriptor;
@end

@interface SimCommandQueue : NSObject <MTLCommandQueue>
@property(nonatomic, readonly) id<MTLDevice> device;
- (instancetype)initWithDevice:(id<MTLDevice>)device;
@end

@interface SimCommandBuffer : NSObject <MTLCommandBuffer>
@property(nonatomic, readonly) id<MTLDevice> device;
- (instancetype)initWithQueue:(SimCommandQueue*)queue retainedReferences:(BOOL)retainedReferences;
- (void)addBatch:(metal_sim::Batch)batch;
/// Until completion: the caller's things as the descriptor says, the encoder's own in any case.
- (void)use:(std::shared_ptr<const void>)thing as:(const char*)what;
- (void)keep:(std::shared_ptr<const void>)thing;
- (void)encoderEnded;
@end

@interface SimComputeCommandEncoder : NSObject <MTLComputeCommandEncoder>
- (instancetype)initWithCommandBuffer:(SimCommandBuffer*)commandBuffer dispatchType:(MTLDispatchType)dispatchType;
@end
