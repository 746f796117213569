// The Metal backend from inside: its pipelines, its library, foreign buffers, what it leaves behind.

#include <thread>
#include <vector>

#import <Metal/Metal.h>
#include <gtest/gtest.h>

#include "cache_case.h"
#include "expect_error.h"
#include "metal/context.h"
#include "metal/device.h"
#include "metal/library.h"
#include "metal/storage.h"

#if defined(TQ_HB_METAL_SIMULATED)
extern "C" long metal_sim_live_objects(void);
extern "C" id<MTLDevice> metal_sim_new_device(void) NS_RETURNS_RETAINED;
#endif

namespace tq_hb {
namespace {

TEST(PipelineCache, MakesEachPipelineOnceUnderContention) {
  PipelineCache cache(MTLCreateSystemDefaultDevice());
  const std::vector<PipelineKey> keys = {{Kernel::kAttend, 256, 8, 8},
                                         {Kernel::kAttend, 256, 8, 8, true},
                                         {Kernel::kAttend, 256, 8, 6},
                                         {Kernel::kAttend, 512, 8, 8},
                                         {Kernel::kFwhtUndo, 256}};
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < 16; ++t) {
    threads.emplace_back([&, t] {
      for (std::size_t i = 0; i < 20; ++i) {
        const PipelineKey& key = keys[(i + t) % keys.size()];
        EXPECT_NE(cache.get(key), nil);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(cache.builds(), keys.size());
}

TEST(PipelineCache, LabelsPipelinesByKernel) {
  PipelineCache cache(MTLCreateSystemDefaultDevice());
  @autoreleasepool {
    id<MTLComputePipelineState> pipeline = cache.get({Kernel::kReduceUndo, 512});
    EXPECT_STREQ(pipeline.label.UTF8String, "flash_attn_vec_reduce_tq_hb_undo_dk512");
    EXPECT_GE(pipeline.maxTotalThreadsPerThreadgroup, 1024u);
  }
}

TEST(PipelineCache, CanMakeEveryPipeline) {
  PipelineCache cache(MTLCreateSystemDefaultDevice());
  const std::vector<PipelineKey> keys = all_pipelines({5, 6, 8});
  for (const PipelineKey& key : keys) EXPECT_NO_THROW(cache.get(key)) << kernel_name(key);
  EXPECT_EQ(cache.builds(), keys.size());
}

TEST(PipelineCache, NamesAKernelThatTheLibraryLacks) {
  PipelineCache cache(MTLCreateSystemDefaultDevice());
  EXPECT_TQ_ERROR(cache.get({Kernel::kReduce, 96}), ErrorCode::kDevice, "metal: flash_attn_vec_reduce_dk96");
  EXPECT_EQ(cache.builds(), 0u);
}

TEST(Library, ACompileErrorNamesFileAndLine) {
  const std::string source =
      "#include <metal_stdlib>\nusing namespace metal;\n#line 40 \"metal/kernels/broken.metal\"\n"
      "kernel void broken(device float* x [[buffer(0)]]) {\n  x[0] = missing;\n}\n";
  EXPECT_TQ_ERROR(compile_library(MTLCreateSystemDefaultDevice(), source), ErrorCode::kDevice, "do not compile",
                  "broken.metal:41", "missing");
}

TEST(WrapNative, TakesASharedBufferOfTheSameDevice) {
  const auto device = metal_device();
  @autoreleasepool {
    id<MTLDevice> native = MTLCreateSystemDefaultDevice();
    id<MTLBuffer> buffer = [native newBufferWithLength:4096 options:MTLResourceStorageModeShared];
    const auto storage = device->wrap_native((__bridge void*)buffer, nullptr);
    ASSERT_NE(storage, nullptr);
    EXPECT_EQ(storage->native_handle(), (__bridge void*)buffer);
    EXPECT_EQ(storage->host(), static_cast<std::byte*>(buffer.contents));
    EXPECT_EQ(storage->size(), 4096u);
  }
}

#if !defined(TQ_HB_METAL_SIMULATED)

// The simulated GPU has shared memory alone.
TEST(WrapNative, RefusesMemoryThatTheHostCannotReach) {
  @autoreleasepool {
    id<MTLBuffer> buffer = [MTLCreateSystemDefaultDevice() newBufferWithLength:4096
                                                                       options:MTLResourceStorageModePrivate];
    EXPECT_TQ_ERROR(metal_device()->wrap_native((__bridge void*)buffer, nullptr), ErrorCode::kInvalidArgument,
                    "must have shared storage");
  }
}

#else

TEST(WrapNative, RefusesABufferOfAnotherGpu) {
  @autoreleasepool {
    id<MTLBuffer> buffer = [metal_sim_new_device() newBufferWithLength:4096 options:MTLResourceStorageModeShared];
    EXPECT_TQ_ERROR(metal_device()->wrap_native((__bridge void*)buffer, nullptr), ErrorCode::kInvalidArgument,
                    "another device");
  }
}

// The address sanitizer, which watches simulated kernels too, stops the program at the overrun.
#if !__has_feature(address_sanitizer)
TEST(MetalEncoder, AGpuErrorNamesTheKernels) {
  const auto device = metal_device();
  const auto encoder = device->make_encoder();
  @autoreleasepool {
    id<MTLDevice> native = MTLCreateSystemDefaultDevice();
    id<MTLBuffer> buffer = [native newBufferWithLength:1024 options:MTLResourceStorageModeShared];
    // Claims to be larger than it is, so that the kernel runs over its end.
    const auto storage =
        std::make_shared<MetalStorage>(device.get(), std::make_shared<MetalContext>(native), buffer, 8192, nullptr);
    encoder->fwht({"fwht", Fwht::kPlain, Buffer(storage, DType::kFloat32, {8, 256})});
    encoder->commit();
  }
  for (int again = 0; again < 2; ++again) {
    EXPECT_TQ_ERROR(encoder->wait(), ErrorCode::kDevice, "metal: the GPU failed in one of fwht_standalone_f32_d256",
                    "buffer");
  }
}
#endif

void decode_step() {
  CacheCase test(2, 1, 256, 8, 8, 8, "metal");
  const auto encoder = test.device->make_encoder(true);
  encoder->hadamard_quantize(
      test.quantize_op(test.random({1, 1, 256}, 1), test.k_packed, test.k_norms, *test.k_codebook));
  encoder->flash_attn_vec(test.attend_op());
  encoder->fwht({"fwht", Fwht::kUndo, test.output});
  encoder->commit();
  encoder->wait();
  // And one that is never committed.
  test.device->make_encoder()->flash_attn_vec(test.attend_op());
}

TEST(MetalObjects, NoneIsLeftBehind) {
  decode_step();
  const long before = metal_sim_live_objects();
  for (int i = 0; i < 250; ++i) decode_step();  // 1000 encoders
  EXPECT_EQ(metal_sim_live_objects(), before);
}

#endif

}  // namespace
}  // namespace tq_hb
