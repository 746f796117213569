// The simulated device: its limits, and the makers of everything else.
#include <mutex>
#include <new>

#include <unistd.h>

#import "Foundation/private.h"
#include "runtime.h"
#import "simulated.h"

using metal_sim::require;

NSErrorDomain const MTLLibraryErrorDomain = @"MTLLibraryErrorDomain";

namespace {

constexpr const char* kProtocol = "MTLDevice";
constexpr std::uint64_t kMemoryBytes = 4ull << 30;
constexpr NSUInteger kStorageModeMask = 0xF0;

std::string cpu_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return "x86-64 AVX-512";
  if (__builtin_cpu_supports("avx2")) return "x86-64 AVX2";
  return "x86-64";
#else
  return "arm64";
#endif
}

}  // namespace

@interface SimDevice : NSObject <MTLDevice>
@end

namespace {

// The default device lives as long as somebody holds it, so that it is not counted as alive for ever.
std::mutex default_device_lock;
void* default_device;
std::uint64_t last_registry_id;

}  // namespace

@implementation SimDevice
@synthesize registryID = registryID_;

- (instancetype)initWithRegistryID:(uint64_t)registryID {
  registryID_ = registryID;
  return self;
}

- (void)dealloc {
  std::lock_guard lock(default_device_lock);
  if (default_device == (__bridge void*)self) default_device = nullptr;
}

- (NSString*)name {
  return to_nsstring("Simulated Metal (" + cpu_isa() + ")");
}
- (BOOL)hasUnifiedMemory {
  return YES;
}
- (NSUInteger)maxBufferLength {
  return kMemoryBytes;
}
- (NSUInteger)maxThreadgroupMemoryLength {
  return metal_sim::kMaxThreadgroupBytes;
}
- (MTLSize)maxThreadsPerThreadgroup {
  constexpr NSUInteger kMost = metal_sim::kMaxThreadsPerThreadgroup;
  return MTLSizeMake(kMost, kMost, kMost);
}
- (uint64_t)recommendedMaxWorkingSetSize {
  return kMemoryBytes;
}

- (id<MTLCommandQueue>)newCommandQueue {
  return [[SimCommandQueue alloc] initWithDevice:self];
}

- (id<MTLBuffer>)newBufferWithLength:(NSUInteger)length options:(MTLResourceOptions)options {
  require(length > 0, kProtocol, _cmd, "length must be at least 1");
  require((options & kStorageModeMask) == MTLResourceStorageModeShared, kProtocol, _cmd,
          "options must have MTLResourceStorageModeShared, the only storage mode simulated");
  if (length > kMemoryBytes) return nil;
  try {
    auto memory = metal_sim::allocate_memory(length);
    return [[SimBuffer alloc] initWithDevice:self memory:std::move(memory)];
  } catch (const std::bad_alloc&) {
    return nil;
  }
}

- (id<MTLBuffer>)newBufferWithBytesNoCopy:(void*)pointer
                                   length:(NSUInteger)length
                                  options:(MTLResourceOptions)options
                              deallocator:(void (^)(void*, NSUInteger))deallocator {
  require((options & kStorageModeMask) == MTLResourceStorageModeShared, kProtocol, _cmd,
          "options must have MTLResourceStorageModeShared, the only storage mode simulated");
  require(deallocator == nil, kProtocol, _cmd, "deallocator must be nil, the only one simulated");
  const auto page = static_cast<NSUInteger>(getpagesize());
  const bool is_page_aligned = reinterpret_cast<std::uintptr_t>(pointer) % page == 0 && length % page == 0;
  if (pointer == nullptr || length == 0 || length > kMemoryBytes || !is_page_aligned) return nil;
  return [[SimBuffer alloc] initWithDevice:self memory:metal_sim::adopt_memory(pointer, length)];
}

- (id<MTLLibrary>)newLibraryWithSource:(NSString*)source
                               options:(MTLCompileOptions*)options
                                 error:(NSError* __autoreleasing*)error {
  require(source != nil, kProtocol, _cmd, "source must not be nil");
  // Under fast math Apple's compiler may assume that no NaN occurs, and its functions are looser; nothing here
  // behaves like that.
  if (options == nil || options.mathMode != MTLMathModeSafe ||
      options.mathFloatingPointFunctions != MTLMathFloatingPointFunctionsPrecise) {
    report(error, MTLLibraryErrorDomain, MTLLibraryErrorUnsupported,
           "the simulated compiler has safe math and precise functions only: set mathMode and "
           "mathFloatingPointFunctions, or fastMathEnabled to NO");
    return nil;
  }
  try {
    auto compiled = metal_sim::compile(source.UTF8String);
    return [[SimLibrary alloc] initWithDevice:self compiled:std::move(compiled)];
  } catch (const metal_sim::CompileError& failure) {
    report(error, MTLLibraryErrorDomain, MTLLibraryErrorCompileFailure, failure.what());
  }
  return nil;
}

- (id<MTLComputePipelineState>)newComputePipelineStateWithDescriptor:(MTLComputePipelineDescriptor*)descriptor
                                                             options:(MTLPipelineOption)options
                                                          reflection:
                                                              (MTLAutoreleasedComputePipelineReflection*)reflection
                                                               error:(NSError* __autoreleasing*)error {
  require(options == MTLPipelineOptionNone, kProtocol, _cmd,
          "options must be MTLPipelineOptionNone, the only one simulated");
  require(reflection == nullptr, kProtocol, _cmd, "reflection must be null, it is not simulated");
  return [[SimComputePipelineState alloc] initWithDevice:self descriptor:descriptor];
}

- (id<MTLResidencySet>)newResidencySetWithDescriptor:(MTLResidencySetDescriptor*)desc
                                               error:(NSError* __autoreleasing*)error {
  require(desc != nil, kProtocol, _cmd, "desc must not be nil");
  return [[SimResidencySet alloc] initWithDevice:self];
}

@end

id<MTLDevice> metal_sim_new_device(void) {
  std::lock_guard lock(default_device_lock);
  return [[SimDevice alloc] initWithRegistryID:++last_registry_id];
}

id<MTLDevice> MTLCreateSystemDefaultDevice(void) {
  std::lock_guard lock(default_device_lock);
  if (default_device != nullptr && objc_try_retain(static_cast<objc::Object*>(default_device)) != nullptr) {
    return (__bridge_transfer SimDevice*)default_device;
  }
  SimDevice* device = [[SimDevice alloc] initWithRegistryID:++last_registry_id];
  default_device = (__bridge void*)device;
  return device;
}
