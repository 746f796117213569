#include "metal/library.h"

#include <string>

#include "core/error.h"
#include "metal/kernel_text.h"
#include "metal/text.h"

namespace tq_hb {
namespace {

id<MTLLibrary> checked(id<MTLLibrary> library, const std::string& failure) {
  if (library == nil) throw Error(ErrorCode::kDevice, "metal: the kernels do not compile: " + failure);
  return library;
}

}  // namespace

id<MTLLibrary> compile_library(id<MTLDevice> device, const std::string& source) {
  id<MTLLibrary> library = nil;
  std::string failure;
  @autoreleasepool {
    MTLCompileOptions* options = [[MTLCompileOptions alloc] init];
    // Fast math would let the compiler drop the checks for NaN, and change the codec's bytes.
    if (@available(macOS 15.0, *)) {
      options.languageVersion = MTLLanguageVersion3_2;
      options.mathMode = MTLMathModeSafe;
      options.mathFloatingPointFunctions = MTLMathFloatingPointFunctionsPrecise;
    } else {
      options.languageVersion = MTLLanguageVersion3_0;
      options.fastMathEnabled = NO;
    }
    NSError* error = nil;
    library = [device newLibraryWithSource:to_ns_string(source) options:options error:&error];
    if (library == nil) failure = describe(error);
    library.label = @"tq_hb";
  }
  return checked(library, failure);
}

#if defined(TQ_HB_METALLIB)

id<MTLLibrary> load_library(id<MTLDevice> device) {
  id<MTLLibrary> library = nil;
  std::string failure;
  @autoreleasepool {
    NSError* error = nil;
    dispatch_data_t bytes =
        dispatch_data_create(kKernelLibrary, kKernelLibraryBytes, nullptr, DISPATCH_DATA_DESTRUCTOR_DEFAULT);
    library = [device newLibraryWithData:bytes error:&error];
    if (library == nil) failure = describe(error);
    library.label = @"tq_hb";
  }
  return checked(library, failure);
}

#else

id<MTLLibrary> load_library(id<MTLDevice> device) {
  std::string source;
  for (const char* const* piece = kKernelSource; *piece != nullptr; ++piece) source += *piece;
  return compile_library(device, source);
}

#endif

}  // namespace tq_hb
