// From Metal source to a shared object, by way of the cache folder.
#pragma once

#include <string>

#include "options.h"

namespace metal_sim {

/// The path of the compiled source; throws CompileError.
std::string compiled_file(const std::string& source, const Options& options);

}  // namespace metal_sim
