// Every misuse that the simulated Metal refuses, each by the method and the rule it names.
#include <functional>

#include "metal_fixture.h"

namespace metal_sim {
namespace {

class MisuseTest : public MetalTest {
 protected:
  void SetUp() override {
    MetalTest::SetUp();
    x = make_floats(32, 1);
    y = make_floats(32, 0);
    commands = [queue commandBuffer];
    encoder = [commands computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent];
    bind(encoder, x, y);
  }

  void TearDown() override {
    encoder = nil;
    commands = nil;
    x = y = nil;
    MetalTest::TearDown();
  }

  static void expect_misuse(const std::function<void()>& call, const std::string& method, const std::string& rule) {
    @autoreleasepool {
      try {
        call();
        ADD_FAILURE() << method << " accepted: " << rule;
      } catch (const Misuse& misuse) {
        const std::string message = misuse.what();
        EXPECT_NE(message.find(method + "]: "), std::string::npos) << message;
        EXPECT_NE(message.find(rule), std::string::npos) << message;
      }
    }
  }

  id<MTLBuffer> x, y;
  id<MTLCommandBuffer> commands;
  id<MTLComputeCommandEncoder> encoder;
};

constexpr const char* kDispatch = "dispatchThreadgroups:threadsPerThreadgroup:";

TEST_F(MisuseTest, UnboundBuffer) {
  [encoder setBuffer:nil offset:0 atIndex:1];
  expect_misuse([&] { dispatch(encoder); }, kDispatch, "scale: buffer 1 is not bound");
}

TEST_F(MisuseTest, UnboundThreadgroupMemory) {
  [encoder setThreadgroupMemoryLength:0 atIndex:0];
  expect_misuse([&] { dispatch(encoder); }, kDispatch, "threadgroup memory 0 has no length");
}

TEST_F(MisuseTest, NoPipeline) {
  [encoder endEncoding];
  encoder = [commands computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent];
  expect_misuse([&] { dispatch(encoder); }, kDispatch, "no pipeline");
}

TEST_F(MisuseTest, BufferIndexAndOffset) {
  expect_misuse([&] { [encoder setBuffer:x offset:0 atIndex:31]; },
                "setBuffer:offset:atIndex:", "less than 31, got 31");
  expect_misuse([&] { [encoder setBuffer:x offset:128 atIndex:0]; }, "setBuffer:offset:atIndex:", "128 bytes, got 128");
}

TEST_F(MisuseTest, SetBytes) {
  const char bytes[5000] = {};
  expect_misuse([&] { [encoder setBytes:bytes length:0 atIndex:2]; }, "setBytes:length:atIndex:", "1 to 4096, got 0");
  expect_misuse([&] { [encoder setBytes:bytes length:4097 atIndex:2]; }, "setBytes:length:atIndex:", "got 4097");
  expect_misuse([&] { [encoder setBytes:bytes length:4 atIndex:31]; }, "setBytes:length:atIndex:", "less than 31");
}

TEST_F(MisuseTest, ThreadgroupMemory) {
  const char* method = "setThreadgroupMemoryLength:atIndex:";
  expect_misuse([&] { [encoder setThreadgroupMemoryLength:24 atIndex:0]; }, method, "multiple of 16, got 24");
  expect_misuse([&] { [encoder setThreadgroupMemoryLength:32784 atIndex:0]; }, method, "at most 32768");
  expect_misuse([&] { [encoder setThreadgroupMemoryLength:16 atIndex:31]; }, method, "less than 31");
  [encoder setThreadgroupMemoryLength:32768 atIndex:0];
  [encoder setThreadgroupMemoryLength:16 atIndex:1];
  expect_misuse([&] { dispatch(encoder); }, kDispatch, "at most 32768 bytes in all, got 32784");
}

TEST_F(MisuseTest, GridSizes) {
  const auto run = [&](MTLSize groups, MTLSize threads) {
    [encoder dispatchThreadgroups:groups threadsPerThreadgroup:threads];
  };
  const MTLSize one = MTLSizeMake(1, 1, 1);
  expect_misuse([&] { run(MTLSizeMake(0, 1, 1), one); }, kDispatch, "got (0, 1, 1)");
  expect_misuse([&] { run(MTLSizeMake(1ul << 32, 1, 1), one); }, kDispatch, "threadgroupsPerGrid");
  expect_misuse([&] { run(one, MTLSizeMake(1, 0, 1)); }, kDispatch, "threadsPerThreadgroup");
  expect_misuse([&] { run(one, MTLSizeMake(1025, 1, 1)); }, kDispatch, "1 to 1024");
  expect_misuse([&] { run(one, MTLSizeMake(32, 33, 1)); }, kDispatch, "at most 1024 in all, got (32, 33, 1)");
}

TEST_F(MisuseTest, PipelineLimits) {
  MTLComputePipelineDescriptor* descriptor = [MTLComputePipelineDescriptor new];
  const auto build = [&] {
    return [device newComputePipelineStateWithDescriptor:descriptor
                                                 options:MTLPipelineOptionNone
                                              reflection:nullptr
                                                   error:nullptr];
  };
  const char* method = "newComputePipelineStateWithDescriptor:options:reflection:error:";
  expect_misuse([&] { build(); }, method, "computeFunction must not be nil");
  descriptor.computeFunction = make_function(library, 1);
  descriptor.maxTotalThreadsPerThreadgroup = 2048;
  expect_misuse([&] { build(); }, method, "at most 1024, got 2048");
  descriptor.maxTotalThreadsPerThreadgroup = 64;
  descriptor.threadGroupSizeIsMultipleOfThreadExecutionWidth = YES;
  [encoder setComputePipelineState:build()];
  const auto run = [&](NSUInteger threads) {
    [encoder dispatchThreadgroups:MTLSizeMake(1, 1, 1) threadsPerThreadgroup:MTLSizeMake(threads, 1, 1)];
  };
  expect_misuse([&] { run(96); }, kDispatch, "1 to 64");
  expect_misuse([&] { run(33); }, kDispatch, "multiple of 32 threads, got 33");
}

TEST_F(MisuseTest, LifeOfACommandBuffer) {
  expect_misuse([&] { [commands computeCommandEncoderWithDispatchType:MTLDispatchTypeSerial]; },
                "computeCommandEncoderWithDispatchType:", "must be ended first");
  expect_misuse([&] { [commands commit]; }, "commit", "must be ended first");
  [encoder endEncoding];
  expect_misuse([&] { [commands waitUntilCompleted]; }, "waitUntilCompleted", "committed first");
  [commands commit];
  expect_misuse([&] { [commands commit]; }, "commit", "already committed");
  expect_misuse([&] { [commands computeCommandEncoderWithDispatchType:MTLDispatchTypeSerial]; },
                "computeCommandEncoderWithDispatchType:", "already committed");
}

TEST_F(MisuseTest, EndedEncoder) {
  [encoder endEncoding];
  const std::string rule = "the encoder has ended";
  const int value = 1;
  expect_misuse([&] { [encoder setComputePipelineState:pipeline]; }, "setComputePipelineState:", rule);
  expect_misuse([&] { [encoder setBuffer:x offset:0 atIndex:0]; }, "setBuffer:offset:atIndex:", rule);
  expect_misuse([&] { [encoder setBytes:&value length:4 atIndex:2]; }, "setBytes:length:atIndex:", rule);
  expect_misuse([&] { [encoder setThreadgroupMemoryLength:16 atIndex:0]; },
                "setThreadgroupMemoryLength:atIndex:", rule);
  expect_misuse([&] { [encoder memoryBarrierWithScope:MTLBarrierScopeBuffers]; }, "memoryBarrierWithScope:", rule);
  expect_misuse([&] { [encoder insertDebugSignpost:@"x"]; }, "insertDebugSignpost:", rule);
  expect_misuse([&] { dispatch(encoder); }, kDispatch, rule);
  expect_misuse([&] { [encoder endEncoding]; }, "endEncoding", rule);
}

TEST_F(MisuseTest, EncoderReleasedBeforeItsEnd) {
  EXPECT_DEATH(encoder = nil, "dealloc\\]: the encoder was released before endEncoding");
  [encoder endEncoding];
}

TEST_F(MisuseTest, ObjectsOfAnotherDevice) {
  @autoreleasepool {
    id<MTLDevice> other = metal_sim_new_device();
    id<MTLBuffer> foreign = [other newBufferWithLength:128 options:MTLResourceStorageModeShared];
    id<MTLResidencySet> foreign_set = [other newResidencySetWithDescriptor:[MTLResidencySetDescriptor new]
                                                                     error:nullptr];
    expect_misuse([&] { [encoder setBuffer:foreign offset:0 atIndex:0]; }, "setBuffer:offset:atIndex:", "device");
    expect_misuse([&] { make_pipeline(other, library); },
                  "newComputePipelineStateWithDescriptor:options:reflection:error:", "of this device");
    expect_misuse([&] { [queue addResidencySet:foreign_set]; }, "addResidencySet:", "device");
    expect_misuse([&] { [foreign_set addAllocation:x]; }, "addAllocation:", "device");
    id<MTLCommandBuffer> foreign_commands = [[other newCommandQueue] commandBuffer];
    id<MTLComputeCommandEncoder> foreign_encoder =
        [foreign_commands computeCommandEncoderWithDispatchType:MTLDispatchTypeSerial];
    expect_misuse([&] { [foreign_encoder setComputePipelineState:pipeline]; }, "setComputePipelineState:", "device");
  }
}

TEST_F(MisuseTest, FunctionConstantOfAnotherType) {
  MTLFunctionConstantValues* values = [MTLFunctionConstantValues new];
  const float width = 1;
  [values setConstantValue:&width type:MTLDataTypeFloat atIndex:50];
  expect_misuse([&] { (void)[library newFunctionWithName:@"scale" constantValues:values error:nullptr]; },
                "newFunctionWithName:constantValues:error:", "width at index 50 must be int, got float");
  expect_misuse([&] { [values setConstantValue:&width type:MTLDataTypeNone atIndex:50]; },
                "setConstantValue:type:atIndex:", "scalar type");
}

TEST_F(MisuseTest, BufferFreedBeforeCompletion) {
  [encoder endEncoding];
  const auto record = [&](NSUInteger count) {
    MTLCommandBufferDescriptor* descriptor = [MTLCommandBufferDescriptor new];
    EXPECT_TRUE(descriptor.retainedReferences);
    descriptor.retainedReferences = NO;
    id<MTLCommandBuffer> unretained = [queue commandBufferWithDescriptor:descriptor];
    encoder = [unretained computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent];
    x = make_floats(count, 1);
    bind(encoder, x, y);
    dispatch(encoder);
    [encoder endEncoding];
    return unretained;
  };
  @autoreleasepool {
    commands = record(32);
    x = nil;
    expect_misuse([&] { [commands commit]; }, "commit", "a buffer was released before the command buffer completed");
    commands = record(32);
    [commands commit];
    x = nil;
    expect_misuse([&] { [commands waitUntilCompleted]; }, "waitUntilCompleted", "a buffer was released");
  }
}

TEST_F(MisuseTest, BuffersThatCannotBe) {
  expect_misuse([&] { (void)[device newBufferWithLength:0 options:MTLResourceStorageModeShared]; },
                "newBufferWithLength:options:", "at least 1");
  expect_misuse([&] { (void)[device newBufferWithLength:16 options:MTLResourceStorageModePrivate]; },
                "newBufferWithLength:options:", "MTLResourceStorageModeShared");
}

}  // namespace
}  // namespace metal_sim
