#include "binding.h"

#include <cstdint>

namespace metal_sim {

std::string describe_outside(const std::vector<Region>& regions, const void* address) {
  constexpr std::uintptr_t kNear = std::uintptr_t{1} << 20;
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  std::uintptr_t nearest = kNear;
  std::string text = "at an address that belongs to no buffer";
  for (const Region& region : regions) {
    const auto begin = reinterpret_cast<std::uintptr_t>(region.begin), end = begin + region.size;
    if (at >= end && at - end < nearest) {
      nearest = at - end;
      text = std::to_string(nearest) + " bytes past the end of " + region.name;
    } else if (at < begin && begin - at < nearest) {
      nearest = begin - at;
      text = std::to_string(nearest) + " bytes before " + region.name;
    }
  }
  return text;
}

}  // namespace metal_sim
