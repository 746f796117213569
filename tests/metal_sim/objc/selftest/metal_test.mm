// The simulated Metal at its proper use.
#include <algorithm>
#include <cstdlib>
#include <thread>
#include <vector>

#include <unistd.h>

#include "metal_fixture.h"

extern "C" void metal_sim_reset_statistics(void);
extern "C" std::size_t metal_sim_statistics(char* json, std::size_t size);

namespace metal_sim {
namespace {

class Metal : public MetalTest {
 protected:
  /// As JSON without blanks.
  static std::string statistics() {
    std::string json(metal_sim_statistics(nullptr, 0) + 1, '\0');
    metal_sim_statistics(json.data(), json.size());
    json.resize(json.find('\0'));
    json.erase(std::remove(json.begin(), json.end(), ' '), json.end());
    return json;
  }

  id<MTLCommandBuffer> scale_once(id<MTLBuffer> x, id<MTLBuffer> y, NSUInteger groups) {
    id<MTLCommandBuffer> commands = [queue commandBuffer];
    id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent];
    bind(encoder, x, y);
    dispatch(encoder, groups);
    [encoder endEncoding];
    [commands commit];
    [commands waitUntilCompleted];
    return commands;
  }
};

TEST_F(Metal, DeviceSaysThatItIsSimulated) {
  EXPECT_NE(text(device.name).find("Simulated"), std::string::npos);
  EXPECT_TRUE(device.hasUnifiedMemory);
  EXPECT_EQ(device.maxThreadgroupMemoryLength, 32768u);
  EXPECT_EQ(device.maxThreadsPerThreadgroup.width, 1024u);
  EXPECT_GT(device.maxBufferLength, 0u);
  EXPECT_GT(device.recommendedMaxWorkingSetSize, 0u);
}

TEST_F(Metal, DefaultDeviceIsOneObject) {
  id<MTLDevice> again = MTLCreateSystemDefaultDevice();
  id<MTLDevice> other = metal_sim_new_device();
  EXPECT_EQ(again, device);
  EXPECT_NE(other, device);
  EXPECT_NE(other.registryID, device.registryID);
}

TEST_F(Metal, FreshBuffersAreNotZero) {
  id<MTLBuffer> buffer = [device newBufferWithLength:3 options:MTLResourceStorageModeShared];
  for (int i = 0; i < 3; ++i) EXPECT_EQ(static_cast<unsigned char*>(buffer.contents)[i], 0xA5);
  EXPECT_EQ(buffer.length, 3u);
  EXPECT_GE(buffer.allocatedSize, buffer.length);
  EXPECT_EQ(buffer.storageMode, MTLStorageModeShared);
  EXPECT_EQ(buffer.device, device);
}

TEST_F(Metal, TooLargeBuffersAreNil) {
  EXPECT_EQ([device newBufferWithLength:device.maxBufferLength + 1 options:MTLResourceStorageModeShared], nil);
}

TEST_F(Metal, HostMemoryIsWrappedOnWholePagesOnly) {
  const auto page = static_cast<std::size_t>(getpagesize());
  const auto free_memory = [](void* memory) { std::free(memory); };
  std::unique_ptr<void, decltype(free_memory)> memory(std::aligned_alloc(page, 2 * page), free_memory);
  const auto wrap = [this](void* pointer, std::size_t length) {
    return [device newBufferWithBytesNoCopy:pointer length:length options:MTLResourceStorageModeShared deallocator:nil];
  };
  EXPECT_EQ(wrap(memory.get(), 2 * page).contents, memory.get());
  EXPECT_EQ(wrap(memory.get(), page + 1), nil);
  EXPECT_EQ(wrap(static_cast<char*>(memory.get()) + 64, page), nil);
  EXPECT_EQ(wrap(memory.get(), 0), nil);
}

TEST_F(Metal, KernelsRun) {
  id<MTLBuffer> x = make_floats(64, 3), y = make_floats(64, 0);
  id<MTLCommandBuffer> commands = scale_once(x, y, 2);
  EXPECT_EQ(commands.status, MTLCommandBufferStatusCompleted) << text(commands.error.localizedDescription);
  EXPECT_EQ(commands.error, nil);
  EXPECT_GT(commands.GPUStartTime, 0);
  EXPECT_GT(commands.GPUEndTime, commands.GPUStartTime);
  for (int i = 0; i < 64; ++i) EXPECT_EQ(static_cast<float*>(y.contents)[i], 6.0f);
}

TEST_F(Metal, StateIsTakenAtTheDispatch) {
  id<MTLBuffer> x = make_floats(32, 1), y = make_floats(32, 0), z = make_floats(64, 0);
  id<MTLCommandBuffer> commands = [queue commandBuffer];
  id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent];
  ScaleArgs args{5, 0};
  bind(encoder, x, y);
  [encoder setBytes:&args length:sizeof args atIndex:2];
  args.factor = 99;
  dispatch(encoder);
  bind(encoder, x, z, 7);
  [encoder setBuffer:z offset:128 atIndex:1];
  dispatch(encoder);
  [encoder endEncoding];
  [commands commit];
  EXPECT_EQ(static_cast<float*>(y.contents)[31], 10.0f);
  EXPECT_EQ(static_cast<float*>(z.contents)[32], 14.0f);
  EXPECT_EQ(static_cast<float*>(z.contents)[31], 0.0f);
}

TEST_F(Metal, BarriersEncodersAndCommandBuffersKeepTheirOrder) {
  id<MTLBuffer> a = make_floats(32, 1), b = make_floats(32, 0);
  for (MTLDispatchType type : {MTLDispatchTypeConcurrent, MTLDispatchTypeSerial}) {
    id<MTLCommandBuffer> commands = [queue commandBuffer];
    for (int round = 0; round < 2; ++round) {
      id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoderWithDispatchType:type];
      bind(encoder, a, b);
      dispatch(encoder);
      if (type == MTLDispatchTypeConcurrent) [encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];
      bind(encoder, b, a);
      dispatch(encoder);
      [encoder endEncoding];
    }
    [commands commit];
    [commands waitUntilCompleted];
  }
  EXPECT_EQ(static_cast<float*>(a.contents)[0], 256.0f);
}

TEST_F(Metal, CommandBuffersRetainWhatTheyUse) {
  id<MTLBuffer> y = make_floats(32, 0);
  id<MTLCommandBuffer> commands = [queue commandBuffer];
  id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent];
  bind(encoder, make_floats(32, 4), y);
  dispatch(encoder);
  [encoder endEncoding];
  encoder = nil;
  [commands commit];
  [commands waitUntilCompleted];
  EXPECT_EQ(static_cast<float*>(y.contents)[0], 8.0f);
}

TEST_F(Metal, BarriersSeparateBatches) {
  id<MTLBuffer> x = make_floats(32, 1), y = make_floats(32, 0), z = make_floats(32, 0);
  const auto run = [&] {
    metal_sim_reset_statistics();
    id<MTLCommandBuffer> commands = [queue commandBuffer];
    id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent];
    bind(encoder, x, y);
    dispatch(encoder);
    bind(encoder, x, z);
    dispatch(encoder);
    [encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];
    [encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];
    dispatch(encoder);
    [encoder endEncoding];
    [commands commit];
    return statistics();
  };
  const std::string ordered = run();
  EXPECT_NE(ordered.find("\"dispatches\":3"), std::string::npos) << ordered;
  EXPECT_NE(ordered.find("\"batches\":2"), std::string::npos) << ordered;
  setenv("METAL_SIM_DROP_BARRIERS", "1", 1);
  const std::string unordered = run();
  unsetenv("METAL_SIM_DROP_BARRIERS");
  EXPECT_NE(unordered.find("\"batches\":1"), std::string::npos) << unordered;
}

TEST_F(Metal, MissingBarriersAndLabelsShowUnderCheck) {
  setenv("METAL_SIM_CHECK", "1", 1);
  library = make_library(kScaleSource, nullptr);
  pipeline = make_pipeline(device, library);
  id<MTLBuffer> x = make_floats(32, 1), y = make_floats(32, 0), z = make_floats(32, 0);
  x.label = @"source";
  metal_sim_reset_statistics();
  EXPECT_EQ(scale_once(x, y, 1).status, MTLCommandBufferStatusCompleted);
  EXPECT_NE(statistics().find("\"source\":{\"read\":128,\"written\":0}"), std::string::npos) << statistics();

  id<MTLCommandBuffer> commands = [queue commandBuffer];
  id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent];
  bind(encoder, x, y);
  dispatch(encoder);
  bind(encoder, y, z);
  dispatch(encoder);
  [encoder endEncoding];
  [commands commit];
  EXPECT_EQ(commands.status, MTLCommandBufferStatusError);
  unsetenv("METAL_SIM_CHECK");
}

TEST_F(Metal, OutOfBoundsBecomesAnError) {
  // A whole page, so that the store meets the guard page behind it.
  id<MTLBuffer> x = make_floats(2048, 1), y = make_floats(1024, 0);
#if __has_feature(address_sanitizer)
  // The sanitizer watches kernels too and stops the program at the access.
  EXPECT_DEATH(scale_once(x, y, 64), "heap-buffer-overflow");
#else
  id<MTLCommandBuffer> commands = scale_once(x, y, 64);
  EXPECT_EQ(commands.status, MTLCommandBufferStatusError);
  EXPECT_STREQ(text(commands.error.domain).c_str(), "MTLCommandBufferErrorDomain");
  EXPECT_NE(text(commands.error.localizedDescription).find("scale"), std::string::npos)
      << text(commands.error.localizedDescription);
#endif
  EXPECT_EQ(scale_once(x, y, 1).status, MTLCommandBufferStatusCompleted);
}

TEST_F(Metal, CompileErrorsComeBackWithTheMessage) {
  NSError* error = nil;
  EXPECT_EQ(make_library("#include <metal_stdlib>\nkernel void f(device float* x [[buffer(0)]]) { x[0] = flaot(1); }",
                         &error),
            nil);
  EXPECT_EQ(error.code, static_cast<NSInteger>(MTLLibraryErrorCompileFailure));
  EXPECT_NE(text(error.localizedDescription).find("flaot"), std::string::npos);
}

TEST_F(Metal, FastMathIsRefused) {
  NSError* error = nil;
  MTLCompileOptions* options = [MTLCompileOptions new];
  EXPECT_TRUE(options.fastMathEnabled);
  EXPECT_EQ([device newLibraryWithSource:@"" options:options error:&error], nil);
  EXPECT_NE(text(error.localizedDescription).find("safe math"), std::string::npos);
  options.fastMathEnabled = NO;
  EXPECT_EQ(options.mathMode, MTLMathModeSafe);
}

TEST_F(Metal, LibrariesKnowTheirFunctions) {
  NSError* error = nil;
  EXPECT_EQ(library.functionNames.count, 1u);
  EXPECT_EQ(text(library.functionNames[0]), "scale");
  EXPECT_EQ([library newFunctionWithName:@"none" constantValues:[MTLFunctionConstantValues new] error:&error], nil);
  EXPECT_EQ(error.code, static_cast<NSInteger>(MTLLibraryErrorFunctionNotFound));
  EXPECT_EQ(text(make_function(library, 1).name), "scale");
}

TEST_F(Metal, FunctionsNeedTheirConstants) {
  NSError* error = nil;
  EXPECT_EQ([library newFunctionWithName:@"scale" constantValues:[MTLFunctionConstantValues new] error:&error], nil);
  EXPECT_NE(text(error.localizedDescription).find("index 50"), std::string::npos);
}

TEST_F(Metal, PipelinesTellTheirLimits) {
  EXPECT_EQ(text(pipeline.label), "scale pipeline");
  EXPECT_EQ(pipeline.threadExecutionWidth, 32u);
  EXPECT_EQ(pipeline.maxTotalThreadsPerThreadgroup, 1024u);
}

TEST_F(Metal, LabelsAreKept) {
  id<MTLCommandBuffer> commands = [queue commandBuffer];
  commands.label = @"commands";
  queue.label = @"queue";
  library.label = @"library";
  EXPECT_EQ(text(commands.label) + text(queue.label) + text(library.label), "commandsqueuelibrary");
}

TEST_F(Metal, ResidencySetsHoldTheirMembersUntilCommitted) {
  NSError* error = nil;
  id<MTLResidencySet> set = [device newResidencySetWithDescriptor:[MTLResidencySetDescriptor new] error:&error];
  ASSERT_NE(set, nil);
  const long before = metal_sim_live_objects();
  {
    id<MTLBuffer> buffer = make_floats(1, 0);
    [set addAllocation:buffer];
    [set commit];
    [set removeAllocation:buffer];
  }
  EXPECT_EQ(metal_sim_live_objects(), before + 1);
  [set commit];
  EXPECT_EQ(metal_sim_live_objects(), before);
  [set requestResidency];
  [queue addResidencySet:set];
}

TEST_F(Metal, PipelinesAreBuiltByManyThreads) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 16; ++t) {
    threads.emplace_back([this, t] {
      for (int i = 0; i < 50; ++i) {
        @autoreleasepool {
          EXPECT_NE(make_pipeline(device, library, t), nil);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace metal_sim
