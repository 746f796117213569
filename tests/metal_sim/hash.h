// Names for contents: FNV-1a twice, from different starts.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace metal_sim {

inline std::string hash_text(const std::string& text) {
  std::uint64_t halves[2] = {0xcbf29ce484222325u, 0x9e3779b97f4a7c15u};
  for (std::uint64_t& half : halves) {
    for (const char c : text) half = (half ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  }
  char digits[33];
  std::snprintf(digits, sizeof(digits), "%016llx%016llx", static_cast<unsigned long long>(halves[0]),
                static_cast<unsigned long long>(halves[1]));
  return digits;
}

}  // namespace metal_sim
