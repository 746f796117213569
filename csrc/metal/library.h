// The compiled kernels. For Objective-C++ files.
#pragma once

#include <string>

#import <Metal/Metal.h>

namespace tq_hb {

/// Compiles Metal source with safe math; throws what the compiler said, with file and line.
id<MTLLibrary> _Nonnull compile_library(id<MTLDevice> _Nonnull device, const std::string& source);

/// The project's kernels, from the source or the compiled library that the build embeds.
id<MTLLibrary> _Nonnull load_library(id<MTLDevice> _Nonnull device);

}  // namespace tq_hb
