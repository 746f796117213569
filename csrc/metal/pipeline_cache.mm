#include "metal/pipeline_cache.h"

#include <string>

#include "core/abi.h"
#include "core/error.h"
#include "metal/library.h"
#include "metal/text.h"

namespace tq_hb {
namespace {

constexpr NSUInteger kSimdWidth = 32;

MTLFunctionConstantValues* constants_of(const PipelineKey& key) {
  MTLFunctionConstantValues* constants = [[MTLFunctionConstantValues alloc] init];
  if (key.k_cbits == 0) return constants;
  const int k_cbits = static_cast<int>(key.k_cbits);
  const int v_cbits = static_cast<int>(key.v_cbits);
  const bool direct = key.direct;
  const bool plane = key.plane;
  [constants setConstantValue:&k_cbits type:MTLDataTypeInt atIndex:TQ_CONSTANT_K_CBITS];
  [constants setConstantValue:&v_cbits type:MTLDataTypeInt atIndex:TQ_CONSTANT_V_CBITS];
  [constants setConstantValue:&direct type:MTLDataTypeBool atIndex:TQ_CONSTANT_DIRECT];
  [constants setConstantValue:&plane type:MTLDataTypeBool atIndex:TQ_CONSTANT_PLANE];
  return constants;
}

}  // namespace

id<MTLLibrary> PipelineCache::library() {
  const std::lock_guard<std::mutex> lock(library_mutex_);
  if (library_ == nil) library_ = load_library(device_);
  return library_;
}

id<MTLComputePipelineState> PipelineCache::build(const PipelineKey& key) {
  const std::string name = kernel_name(key);
  id<MTLLibrary> library = this->library();
  id<MTLComputePipelineState> pipeline = nil;
  std::string reason;
  @autoreleasepool {
    NSError* error = nil;
    id<MTLFunction> function = [library newFunctionWithName:to_ns_string(name)
                                             constantValues:constants_of(key)
                                                      error:&error];
    if (function != nil) {
      MTLComputePipelineDescriptor* descriptor = [[MTLComputePipelineDescriptor alloc] init];
      descriptor.label = to_ns_string(name);
      descriptor.computeFunction = function;
      descriptor.threadGroupSizeIsMultipleOfThreadExecutionWidth = YES;
      descriptor.maxTotalThreadsPerThreadgroup = max_threads(key);
      pipeline = [device_ newComputePipelineStateWithDescriptor:descriptor
                                                        options:MTLPipelineOptionNone
                                                     reflection:nil
                                                          error:&error];
    }
    if (pipeline == nil) reason = describe(error);
  }
  if (pipeline == nil) throw Error(ErrorCode::kDevice, "metal: " + name + ": " + reason);
  if (pipeline.threadExecutionWidth != kSimdWidth || pipeline.maxTotalThreadsPerThreadgroup < max_threads(key)) {
    throw Error(ErrorCode::kDevice, "metal: " + name + ": needs SIMD groups of 32 and " +
                                        std::to_string(max_threads(key)) + " threads per threadgroup, the device has " +
                                        std::to_string(pipeline.threadExecutionWidth) + " and " +
                                        std::to_string(pipeline.maxTotalThreadsPerThreadgroup));
  }
  return pipeline;
}

}  // namespace tq_hb
