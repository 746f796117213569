// Small tables that are made once per key, kept for good, and found without a lock.
#pragma once

#include <atomic>
#include <memory>

namespace tq_hb {

/// For few keys, and static: a child that is forked while a table is made finds none and makes its own, and threads
/// that outlast static destruction go on reading: there is no lock that another thread may hold, and nothing is ever
/// freed.
template <class Key, class Value>
class KeptValues {
 public:
  /// The value of `key`, from `make()` if there is none yet. Threads that ask for it at once may all make it: one's is
  /// kept. The reference stays valid.
  template <class Make>
  const Value& get(const Key& key, const Make& make) {
    const Node* first = first_.load(std::memory_order_acquire);
    if (const Node* found = find(first, key)) return found->value;
    std::unique_ptr<Node> made(new Node{key, make(), nullptr});
    do {
      if (const Node* found = find(first, key)) return found->value;
      made->next = first;
    } while (!first_.compare_exchange_weak(first, made.get(), std::memory_order_release, std::memory_order_acquire));
    return made.release()->value;
  }

 private:
  struct Node {
    Key key;
    Value value;
    const Node* next;
  };

  static const Node* find(const Node* node, const Key& key) noexcept {
    while (node != nullptr && !(node->key == key)) node = node->next;
    return node;
  }

  std::atomic<const Node*> first_{nullptr};
};

}  // namespace tq_hb
