// What a dispatch may touch: the ranges bound to its slots, and its threadgroup memory.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "engine.h"

namespace metal_sim {

struct Region {
  const std::byte* begin;
  std::size_t size;
  std::string name;   ///< for messages
  std::string label;  ///< under which its traffic is counted
  bool is_threadgroup;

  bool contains(const std::byte* address, std::size_t bytes) const {
    return address >= begin && bytes <= size && static_cast<std::size_t>(address - begin) <= size - bytes;
  }
};

inline std::string slot_label(unsigned slot) {
  return "<slot " + std::to_string(slot) + ">";
}

/// Says where an address lies that is in none of the regions.
std::string describe_outside(const std::vector<Region>& regions, const void* address);

}  // namespace metal_sim
