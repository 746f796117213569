// What is built once per key and then looked up by many threads: pipelines, specialised kernels.
#pragma once

#include <atomic>
#include <cstddef>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <unordered_map>

namespace tq_hb {

/// A key's value is built by the first thread that asks for it, while others that want the same key wait and
/// threads with other keys go on. A build that throws is tried again by the next call.
template <class Key, class Value, class Hash = std::hash<Key>>
class SpecCache {
 public:
  /// The value of `key`, from `build()` if there is none yet. The reference stays valid.
  template <class Build>
  const Value& get(const Key& key, const Build& build) {
    Entry& entry = entry_of(key);
    if (!entry.is_ready.load(std::memory_order_acquire)) {
      const std::lock_guard<std::mutex> lock(entry.mutex);
      if (!entry.value) {
        entry.value.emplace(build());
        builds_.fetch_add(1, std::memory_order_relaxed);
        entry.is_ready.store(true, std::memory_order_release);
      }
    }
    return *entry.value;
  }

  /// How many values have been built.
  std::size_t builds() const noexcept { return builds_.load(std::memory_order_relaxed); }

 private:
  struct Entry {
    std::atomic<bool> is_ready{false};
    std::mutex mutex;  // held while the value is built
    std::optional<Value> value;
  };

  Entry& entry_of(const Key& key) {
    {
      const std::shared_lock<std::shared_mutex> lock(mutex_);
      const auto found = entries_.find(key);
      if (found != entries_.end()) return found->second;
    }
    const std::lock_guard<std::shared_mutex> lock(mutex_);
    return entries_.try_emplace(key).first->second;
  }

  std::shared_mutex mutex_;                       // guards the map, not its entries
  std::unordered_map<Key, Entry, Hash> entries_;  // its nodes never move
  std::atomic<std::size_t> builds_{0};
};

}  // namespace tq_hb
