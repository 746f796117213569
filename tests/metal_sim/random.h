// A small random generator whose sequence is the same everywhere.
#pragma once

#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace metal_sim {

/// SplitMix64.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::size_t below(std::size_t limit) { return next() % limit; }

  /// 0 ... count - 1 in an order that is not ascending, where there are two or more.
  std::vector<std::uint32_t> order(std::size_t count) {
    std::vector<std::uint32_t> result(count);
    std::iota(result.begin(), result.end(), 0u);
    for (std::size_t i = count; i > 1; --i) std::swap(result[i - 1], result[below(i)]);
    if (count > 1 && result[0] == 0) std::swap(result[0], result[count - 1]);
    return result;
  }

 private:
  std::uint64_t state_;
};

}  // namespace metal_sim
