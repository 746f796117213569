#include "statistics.h"

#include <algorithm>
#include <cstring>
#include <mutex>

namespace metal_sim {
namespace {

struct Statistics {
  std::uint64_t batches = 0;
  std::map<std::string, KernelStatistics> kernels;
};

std::mutex mutex;
Statistics statistics;

void add(KernelStatistics& to, const KernelStatistics& from) {
  to.dispatches += from.dispatches;
  to.threadgroups += from.threadgroups;
  to.threads += from.threads;
  to.threadgroup_bytes = std::max(to.threadgroup_bytes, from.threadgroup_bytes);
  to.simd_operations += from.simd_operations;
  to.simdgroup_barriers += from.simdgroup_barriers;
  to.threadgroup_barriers += from.threadgroup_barriers;
  for (const auto& [label, traffic] : from.buffers) {
    to.buffers[label].read += traffic.read;
    to.buffers[label].written += traffic.written;
  }
}

std::string quoted(const std::string& text) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string result = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      result += {'\\', c};
    } else if (byte < 0x20) {
      result += std::string("\\u00") + kHex[byte >> 4] + kHex[byte & 15];
    } else {
      result += c;
    }
  }
  return result + "\"";
}

/// {"name": value, ...} of anything that has pairs.
template <class Pairs, class Value>
std::string object(const Pairs& pairs, Value value) {
  std::string result = "{";
  for (const auto& [name, item] : pairs) result += (result.size() > 1 ? ", " : "") + quoted(name) + ": " + value(item);
  return result + "}";
}

std::string json(const Traffic& traffic) {
  return "{\"read\": " + std::to_string(traffic.read) + ", \"written\": " + std::to_string(traffic.written) + "}";
}

std::string json_counts(const KernelStatistics& kernel) {
  const std::pair<const char*, std::uint64_t> counts[] = {{"dispatches", kernel.dispatches},
                                                          {"threadgroups", kernel.threadgroups},
                                                          {"threads", kernel.threads},
                                                          {"threadgroup_bytes", kernel.threadgroup_bytes},
                                                          {"simd_operations", kernel.simd_operations},
                                                          {"simdgroup_barriers", kernel.simdgroup_barriers},
                                                          {"threadgroup_barriers", kernel.threadgroup_barriers}};
  std::string result;
  for (const auto& [name, count] : counts) result += quoted(name) + ": " + std::to_string(count) + ", ";
  return result + "\"buffers\": " + object(kernel.buffers, [](const Traffic& traffic) { return json(traffic); });
}

std::string json(const Statistics& all) {
  KernelStatistics total;
  for (const auto& [name, kernel] : all.kernels) add(total, kernel);
  return "{\"batches\": " + std::to_string(all.batches) + ", " + json_counts(total) + ", \"kernels\": " +
         object(all.kernels, [](const KernelStatistics& kernel) { return "{" + json_counts(kernel) + "}"; }) + "}";
}

}  // namespace

void count_batch() {
  const std::lock_guard lock(mutex);
  ++statistics.batches;
}

void count_dispatch(const std::string& kernel, const KernelStatistics& dispatch) {
  const std::lock_guard lock(mutex);
  add(statistics.kernels[kernel], dispatch);
}

}  // namespace metal_sim

void metal_sim_reset_statistics(void) {
  const std::lock_guard lock(metal_sim::mutex);
  metal_sim::statistics = {};
}

std::size_t metal_sim_statistics(char* json, std::size_t size) {
  const std::lock_guard lock(metal_sim::mutex);
  const std::string text = metal_sim::json(metal_sim::statistics);
  if (size > 0) {
    const std::size_t count = std::min(text.size(), size - 1);
    std::memcpy(json, text.data(), count);
    json[count] = '\0';
  }
  return text.size() + 1;
}
