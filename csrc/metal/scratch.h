// Working memory for ops that bring none. For Objective-C++ files.
#pragma once

#include <memory>
#include <vector>

#include "metal/storage.h"

namespace tq_hb {

/// Memory handed out since the last barrier may be in use by launches that overlap; what was given before is free.
class Scratch {
 public:
  Scratch(const Device* _Nonnull device, std::shared_ptr<MetalContext> context)
      : device_(device), context_(std::move(context)) {}

  /// At least `bytes`, the caller's until release().
  std::shared_ptr<Storage> take(std::uint64_t bytes) {
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if ((*it)->size() < bytes) continue;
      std::shared_ptr<Storage> found = std::move(*it);
      free_.erase(it);
      return found;
    }
    return allocate_metal_storage(device_, context_, bytes);
  }
  /// For others after the next barrier.
  void release(std::shared_ptr<Storage> storage) { pending_.push_back(std::move(storage)); }
  void after_barrier() {
    for (std::shared_ptr<Storage>& storage : pending_) free_.push_back(std::move(storage));
    pending_.clear();
  }

 private:
  const Device* _Nonnull device_;
  std::shared_ptr<MetalContext> context_;
  std::vector<std::shared_ptr<Storage>> free_, pending_;
};

}  // namespace tq_hb
