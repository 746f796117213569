// A device, one small kernel and its pipeline, for the tests of the simulated Metal.
#pragma once

#include <string>

#import <Metal/Metal.h>
#include <gtest/gtest.h>

#include "runtime.h"
#include "simulated.h"

extern "C" void* objc_autoreleasePoolPush();
extern "C" void objc_autoreleasePoolPop(void* pool);

namespace metal_sim {

// y[i] = x[i] * factor * width, by way of threadgroup memory.
constexpr const char* kScaleSource = R"(
#include <metal_stdlib>
using namespace metal;

constant int width [[function_constant(50)]];

struct ScaleArgs {
  float factor;
  uint count;
};

kernel void scale(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                  constant ScaleArgs& args [[buffer(2)]], threadgroup float* scratch [[threadgroup(0)]],
                  uint i [[thread_position_in_grid]], uint lane [[thread_index_in_threadgroup]]) {
  scratch[lane] = x[i] * args.factor;
  y[i] = scratch[lane] * float(width);
}
)";

struct ScaleArgs {
  float factor;
  unsigned count;
};

inline std::string text(NSString* string) {
  return string == nil ? "(nil)" : string.UTF8String;
}

/// Each test runs in a pool of its own and must leave as many Objective-C objects as it found.
class MetalTest : public testing::Test {
 protected:
  void SetUp() override {
    live_before_ = metal_sim_live_objects();
    pool_ = objc_autoreleasePoolPush();
    device = MTLCreateSystemDefaultDevice();
    queue = [device newCommandQueue];
    NSError* error = nil;
    library = make_library(kScaleSource, &error);
    ASSERT_NE(library, nil) << text(error.localizedDescription);
    pipeline = make_pipeline(device, library);
  }

  void TearDown() override {
    pipeline = nil;
    library = nil;
    queue = nil;
    device = nil;
    objc_autoreleasePoolPop(pool_);
    EXPECT_EQ(metal_sim_live_objects(), live_before_);
  }

  id<MTLLibrary> make_library(const char* source, NSError* __autoreleasing* error) const {
    MTLCompileOptions* options = [MTLCompileOptions new];
    options.mathMode = MTLMathModeSafe;
    options.mathFloatingPointFunctions = MTLMathFloatingPointFunctionsPrecise;
    return [device newLibraryWithSource:[NSString stringWithUTF8String:source] options:options error:error];
  }

  static id<MTLFunction> make_function(id<MTLLibrary> library, int width) {
    MTLFunctionConstantValues* values = [MTLFunctionConstantValues new];
    [values setConstantValue:&width type:MTLDataTypeInt atIndex:50];
    return [library newFunctionWithName:@"scale" constantValues:values error:nullptr];
  }

  static id<MTLComputePipelineState> make_pipeline(id<MTLDevice> device, id<MTLLibrary> library, int width = 2) {
    MTLComputePipelineDescriptor* descriptor = [MTLComputePipelineDescriptor new];
    descriptor.computeFunction = make_function(library, width);
    descriptor.label = @"scale pipeline";
    return [device newComputePipelineStateWithDescriptor:descriptor
                                                 options:MTLPipelineOptionNone
                                              reflection:nullptr
                                                   error:nullptr];
  }

  id<MTLBuffer> make_floats(NSUInteger count, float value) const {
    id<MTLBuffer> buffer = [device newBufferWithLength:count * sizeof(float) options:MTLResourceStorageModeShared];
    // Asking for the contents keeps the buffer alive until the pool ends.
    @autoreleasepool {
      auto* floats = static_cast<float*>(buffer.contents);
      for (NSUInteger i = 0; i < count; ++i) floats[i] = value;
    }
    return buffer;
  }

  /// Binds everything that the kernel wants.
  void bind(id<MTLComputeCommandEncoder> encoder, id<MTLBuffer> x, id<MTLBuffer> y, float factor = 1) const {
    const ScaleArgs args{factor, 0};
    [encoder setComputePipelineState:pipeline];
    [encoder setBuffer:x offset:0 atIndex:0];
    [encoder setBuffer:y offset:0 atIndex:1];
    [encoder setBytes:&args length:sizeof args atIndex:2];
    [encoder setThreadgroupMemoryLength:128 atIndex:0];
  }

  static void dispatch(id<MTLComputeCommandEncoder> encoder, NSUInteger groups = 1) {
    [encoder dispatchThreadgroups:MTLSizeMake(groups, 1, 1) threadsPerThreadgroup:MTLSizeMake(32, 1, 1)];
  }

  id<MTLDevice> device;
  id<MTLCommandQueue> queue;
  id<MTLLibrary> library;
  id<MTLComputePipelineState> pipeline;

 private:
  long live_before_ = 0;
  void* pool_ = nullptr;
};

}  // namespace metal_sim
