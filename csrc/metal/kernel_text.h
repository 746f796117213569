// The kernels as the build embeds them: metal/kernels/tq_hb.metal with its includes expanded.
#pragma once

#include <cstddef>

namespace tq_hb {

/// Pieces of the source, ended by a null pointer.
extern const char* const kKernelSource[];

#if defined(TQ_HB_METALLIB)
/// The source compiled by the build.
extern const unsigned char kKernelLibrary[];
extern const std::size_t kKernelLibraryBytes;
#endif

}  // namespace tq_hb
