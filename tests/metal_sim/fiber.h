// Fibers: one stack per GPU thread, switched without the operating system.
//
// Sanitizers are told of every switch. For the thread sanitizer a switch orders nothing; the machine that
// runs the fibers says where order exists.
#pragma once

#include <cstddef>

#include <boost/context/detail/fcontext.hpp>

#include "sanitizers.h"

namespace metal_sim {

class Fiber {
 public:
  /// A fiber for the code that is running already.
  Fiber();
  /// A fiber with a stack of its own, which starts in `entry`; that must not return.
  explicit Fiber(void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// Leaves the running fiber `from` and continues this one.
  void resume(Fiber& from);
  /// Forgets what ran on the stack: the next switch starts in `entry` again.
  void restart();

  std::byte* stack_top() const { return stack_ + size_; }
  /// Whether the address lies on the stack or on the inaccessible page below it.
  bool owns(const void* address) const;

 private:
  static void start(boost::context::detail::transfer_t transfer);
  void arrived(boost::context::detail::transfer_t transfer);

  void (*entry_)() = nullptr;
  std::byte* stack_ = nullptr;  ///< lowest usable byte
  std::size_t size_ = 0;
  boost::context::detail::fcontext_t context_ = nullptr;
  void* sanitizer_fiber_ = nullptr;
  void* fake_stack_ = nullptr;
};

inline void Fiber::resume(Fiber& from) {
  constexpr unsigned kNoOrder = 1;
  if (under_address_sanitizer()) __sanitizer_start_switch_fiber(&from.fake_stack_, stack_, size_);
  if (under_thread_sanitizer()) __tsan_switch_to_fiber(sanitizer_fiber_, kNoOrder);
  // The other side learns from the transfer who it is and by whom it was entered.
  Fiber* both[2] = {this, &from};
  from.arrived(boost::context::detail::jump_fcontext(context_, both));
}

inline void Fiber::arrived(boost::context::detail::transfer_t transfer) {
  static_cast<Fiber**>(transfer.data)[1]->context_ = transfer.fctx;
  if (under_address_sanitizer()) __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
}

}  // namespace metal_sim
