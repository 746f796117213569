// Size arithmetic that refuses to wrap.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>

#include "core/error.h"

namespace tq_hb {

/// Product of `factors` as a byte or element count; throws when it leaves the 63-bit range that
/// pointers and signed strides can hold.
inline std::uint64_t checked_product(const std::string& op, const std::string& what,
                                     std::initializer_list<std::uint64_t> factors) {
  constexpr std::uint64_t kLimit = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  std::uint64_t product = 1;
  for (const std::uint64_t factor : factors) {
    if (factor == 0) return 0;
  }
  for (const std::uint64_t factor : factors) {
    if (product > kLimit / factor) throw invalid(op, what, "must fit in 63 bits", "an overflow");
    product *= factor;
  }
  return product;
}

}  // namespace tq_hb
