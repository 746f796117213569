// Which memory the ops since the last barrier touch, so that a barrier can be placed where one is needed.
#pragma once

#include <vector>

#include "core/ops.h"

namespace tq_hb {

class HazardTracker {
 public:
  /// Whether an op would read what an earlier one writes, or write what an earlier one touches.
  bool conflicts(const Accesses& op) const noexcept {
    return overlaps(op.reads, writes_) || overlaps(op.writes, writes_) || overlaps(op.writes, reads_);
  }
  void add(const Accesses& op) {
    append(op.reads, reads_);
    append(op.writes, writes_);
  }
  void clear() noexcept {
    reads_.clear();
    writes_.clear();
  }

 private:
  static bool overlaps(const std::vector<const Buffer*>& wanted, const std::vector<Buffer>& pending) noexcept {
    for (const Buffer* buffer : wanted) {
      for (const Buffer& other : pending) {
        if (buffer->overlaps(other)) return true;
      }
    }
    return false;
  }
  static void append(const std::vector<const Buffer*>& from, std::vector<Buffer>& to) {
    for (const Buffer* buffer : from) to.push_back(*buffer);
  }

  std::vector<Buffer> reads_, writes_;
};

}  // namespace tq_hb
