// Remembers the first row of an op that held a value which cannot be used.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <string>

#include "core/error.h"

namespace tq_hb {

class BadRows {
 public:
  /// Rows are counted token by token, head by head inside a token. May be called from any thread.
  void report(std::uint64_t row) noexcept {
    std::uint64_t seen = first_.load(std::memory_order_relaxed);
    while (row < seen && !first_.compare_exchange_weak(seen, row, std::memory_order_relaxed)) {
    }
  }

  /// Throws if a row was reported.
  void check(const std::string& op, const std::string& field, RowRule rule, std::uint64_t heads) const {
    const std::uint64_t row = first_.load(std::memory_order_relaxed);
    if (row == kNone) return;
    throw Error(ErrorCode::kInvalidArgument, bad_row_message(op, field, rule, row / heads, row % heads));
  }

 private:
  static constexpr std::uint64_t kNone = std::numeric_limits<std::uint64_t>::max();
  std::atomic<std::uint64_t> first_{kNone};
};

}  // namespace tq_hb
