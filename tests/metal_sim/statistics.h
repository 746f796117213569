// What has been executed since the last reset, for tests to assert on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace metal_sim {

struct Traffic {
  std::uint64_t read = 0, written = 0;
};

struct KernelStatistics {
  std::uint64_t dispatches = 0, threadgroups = 0, threads = 0;
  std::uint64_t threadgroup_bytes = 0;  ///< of the dispatch that used most
  std::uint64_t simd_operations = 0, simdgroup_barriers = 0, threadgroup_barriers = 0;
  std::map<std::string, Traffic> buffers;  ///< bytes by label; only where accesses are checked
};

void count_batch();
/// Adds one finished dispatch; the bytes are a maximum, everything else a sum.
void count_dispatch(const std::string& kernel, const KernelStatistics& dispatch);

}  // namespace metal_sim

extern "C" {
__attribute__((visibility("default"))) void metal_sim_reset_statistics(void);
/// Writes JSON, cut off at `size` but terminated; returns the size needed, the final zero included.
__attribute__((visibility("default"))) std::size_t metal_sim_statistics(char* json, std::size_t size);
}
