// Which sanitizer the stand-alone driver is built with, if any.
//
// METAL_SIM_SANITIZER is "thread", "address" or "". The engine itself is never instrumented by the thread
// sanitizer, so this cannot be asked of the compiler.
#pragma once

#include <string_view>

namespace metal_sim {

constexpr bool kThreadSanitizer = std::string_view(METAL_SIM_SANITIZER) == "thread";
constexpr bool kAddressSanitizer = std::string_view(METAL_SIM_SANITIZER) == "address";

}  // namespace metal_sim
