#include "machine.h"

#include <algorithm>
#include <cstring>

#include "denormals.h"
#include "sanitizers.h"

namespace metal_sim {
namespace {

void acquire(void* address) {
  if (under_thread_sanitizer()) __tsan_acquire(address);
}
void release(void* address) {
  if (under_thread_sanitizer()) __tsan_release(address);
}

bool same_place(const abi::Site& a, const abi::Site& b) {
  return a.line == b.line && a.column == b.column && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

std::string text(const abi::Site& site) {
  return std::string(site.file) + ":" + std::to_string(site.line);
}

// Copies that compile to moves: quick, and nothing the thread sanitizer could intercept.
void copy(void* to, const void* from, unsigned size) {
  switch (size) {
    case 1:
      std::memcpy(to, from, 1);
      break;
    case 2:
      std::memcpy(to, from, 2);
      break;
    case 4:
      std::memcpy(to, from, 4);
      break;
    case 8:
      std::memcpy(to, from, 8);
      break;
    case 16:
      std::memcpy(to, from, 16);
      break;
    case 32:
      std::memcpy(to, from, 32);
      break;
    default:
      __builtin_unreachable();  // the shim refuses other sizes
  }
}

void poison(void* memory, std::size_t size) {
  if (!under_thread_sanitizer()) {
    std::memset(memory, Machine::kPoison, size);
  } else {
    auto* bytes = static_cast<volatile unsigned char*>(memory);
    for (std::size_t i = 0; i < size; ++i) bytes[i] = Machine::kPoison;
  }
}

}  // namespace

Machine& Machine::instance() {
  static Machine machine;
  return machine;
}

void Machine::begin(const Setup& setup) {
  setup_ = setup;
  count_ = setup.threads[0] * setup.threads[1] * setup.threads[2];
  while (threads_.size() < count_) threads_.push_back(std::make_unique<Thread>(&Machine::thread_main));
  for (unsigned i = 0; i < count_; ++i) {
    Thread& thread = *threads_[i];
    thread.simdgroup = i / abi::kLanes;
    thread.lane = i % abi::kLanes;
    thread.arguments.index = i;
    thread.arguments.position[0] = i % setup.threads[0];
    thread.arguments.position[1] = i / setup.threads[0] % setup.threads[1];
    thread.arguments.position[2] = i / setup.threads[0] / setup.threads[1];
  }
  for (unsigned first = 0; first < count_; first += abi::kLanes) {
    simdgroups_[first / abi::kLanes].lanes = std::min(abi::kLanes, count_ - first);
  }
}

Machine::Failure Machine::run(const abi::GroupArguments& arguments) {
  Fiber scheduler;
  scheduler_ = &scheduler;
  failure_ = {};
  declared_.clear();
  finished_ = ready_begin_ = ready_count_ = 0;
  group_meeting_.arrived = 0;
  for (unsigned first = 0; first < count_; first += abi::kLanes) simdgroups_[first / abi::kLanes].meeting.arrived = 0;
  for (unsigned i = 0; i < count_; ++i) {
    threads_[i]->arguments.group = &arguments;
    threads_[i]->in_atomic = false;
    push(i);
  }
  release(&group_order_);
  current_ = threads_[pop()].get();
  current_->fiber.resume(scheduler);
  current_ = nullptr;
  acquire(&group_order_);
  if (!failure_.message.empty()) {
    for (auto& thread : threads_) thread->fiber.restart();
  }
  return failure_;
}

void Machine::thread_main() {
  Machine& machine = instance();
  for (;;) {
    Thread& self = *machine.current_;
    acquire(&machine.group_order_);
    set_flush_denormals(machine.setup_.flush_denormals);
    machine.setup_.kernel->call(self.arguments);
    self.state = State::kFinished;
    ++machine.finished_;
    release(&machine.group_order_);
    machine.switch_away();
  }
}

inline void Machine::push(unsigned thread) {
  threads_[thread]->state = State::kReady;
  ready_[(ready_begin_ + ready_count_++) % kMaxThreadsPerThreadgroup] = static_cast<std::uint16_t>(thread);
}

inline unsigned Machine::pop() {
  const unsigned first = ready_begin_;
  if (setup_.schedule != nullptr) {
    const unsigned other =
        (first + static_cast<unsigned>(setup_.schedule->below(ready_count_))) % kMaxThreadsPerThreadgroup;
    std::swap(ready_[first], ready_[other]);
  }
  ready_begin_ = (first + 1) % kMaxThreadsPerThreadgroup;
  --ready_count_;
  return ready_[first];
}

inline void Machine::switch_away() {
  if (ready_count_ == 0) {
    if (finished_ < count_) fail(stuck_report());
    Thread& self = *current_;
    scheduler_->resume(self.fiber);
    return;
  }
  switch_to(*threads_[pop()]);
}

inline void Machine::switch_to(Thread& thread) {
  Thread& self = *current_;
  if (&thread == &self) return;
  current_ = &thread;
  thread.fiber.resume(self.fiber);
}

void Machine::fail(std::string&& message, const void* instruction, const void* address) {
  failure_ = {std::move(message), instruction, address, current_->arguments.index};
  scheduler_->resume(current_->fiber);
  __builtin_unreachable();  // the fiber is restarted before it is used again
}

inline bool Machine::arrive(Meeting& meeting, abi::Site site, State kind, unsigned operand, unsigned expected) {
  Thread& self = *current_;
  self.site = site;
  if (meeting.arrived == 0) {
    meeting.site = site;
    meeting.kind = kind;
    meeting.operand = operand;
  } else if (meeting.kind != kind || !same_place(meeting.site, site)) {
    fail([&] { return "threads meet at different operations: " + text(meeting.site) + " and " + text(site); }());
  } else if (meeting.operand != operand) {
    fail([&] { return "the operand must be the same in all lanes, at " + text(site); }());
  }
  return ++meeting.arrived == expected;
}

inline void Machine::meet(Meeting& meeting, State kind, bool is_last, unsigned first, unsigned count) {
  Thread& self = *current_;
  if (!is_last) {
    self.state = kind;
    switch_away();
    return;
  }
  meeting.arrived = 0;
  meeting.phase ^= 1;
  for (unsigned i = first; i < first + count; ++i) {
    if (i != self.arguments.index) push(i);
  }
  if (setup_.schedule != nullptr) {
    push(self.arguments.index);
    switch_away();
  }
}

void Machine::shuffle(abi::Site site, void* value, unsigned size, abi::Shuffle how, unsigned operand) {
  Thread& self = *current_;
  Simdgroup& group = simdgroups_[self.simdgroup];
  unsigned source = operand;
  switch (how) {
    case abi::Shuffle::kFrom:
    case abi::Shuffle::kBroadcast:
      break;
    case abi::Shuffle::kXor:
      source = self.lane ^ operand;
      break;
    case abi::Shuffle::kUp:
      source = self.lane >= operand ? self.lane - operand : self.lane;
      break;
    case abi::Shuffle::kDown:
      source = self.lane + operand < group.lanes ? self.lane + operand : self.lane;
      break;
  }
  if (source >= group.lanes) {
    fail([&] {
      return "a shuffle reads lane " + std::to_string(source) + " of " + std::to_string(group.lanes) + ", at " +
             text(site);
    }());
  }
  abi::Slot* slots = group.slots[group.meeting.phase];
  copy(slots[self.lane].bytes, value, size);
  const unsigned uniform = how == abi::Shuffle::kFrom ? 0 : operand;
  const bool is_last = arrive(group.meeting, site, State::kSimdOperation, uniform, group.lanes);
  if (is_last) ++counts_.simd_operations;
  meet(group.meeting, State::kSimdOperation, is_last, self.simdgroup * abi::kLanes, group.lanes);
  copy(value, slots[source].bytes, size);
}

void Machine::reduce(abi::Site site, void* value, unsigned size, abi::Combine* combine) {
  Thread& self = *current_;
  Simdgroup& group = simdgroups_[self.simdgroup];
  abi::Slot* slots = group.slots[group.meeting.phase];
  copy(slots[self.lane].bytes, value, size);
  const bool is_last = arrive(group.meeting, site, State::kSimdOperation, 0, group.lanes);
  if (is_last) {
    ++counts_.simd_operations;
    combine(slots, group.lanes);
  }
  meet(group.meeting, State::kSimdOperation, is_last, self.simdgroup * abi::kLanes, group.lanes);
  copy(value, slots[self.lane].bytes, size);
}

void Machine::barrier(abi::Site site, abi::Scope scope, unsigned memory_flags) {
  Thread& self = *current_;
  const bool is_group = scope == abi::Scope::kGroup;
  Simdgroup& simdgroup = simdgroups_[self.simdgroup];
  Meeting& meeting = is_group ? group_meeting_ : simdgroup.meeting;
  const State kind = is_group ? State::kThreadgroupBarrier : State::kSimdgroupBarrier;
  char* order = &meeting.order[meeting.phase];
  if (memory_flags != abi::kNoMemory) release(order);
  const bool is_last = arrive(meeting, site, kind, memory_flags, is_group ? count_ : simdgroup.lanes);
  if (is_last) {
    ++(is_group ? counts_.threadgroup_barriers : counts_.simdgroup_barriers);
    if (setup_.observer != nullptr) setup_.observer->barrier_passed(scope, self.simdgroup, memory_flags);
  }
  meet(meeting, kind, is_last, is_group ? 0 : self.simdgroup * abi::kLanes, is_group ? count_ : simdgroup.lanes);
  if (memory_flags != abi::kNoMemory) acquire(order);
}

unsigned Machine::lane() const {
  return current_->lane;
}

void Machine::declare(void* memory, std::size_t size, const char* name) {
  const std::pair<const void*, std::size_t> variable{memory, size};
  if (std::find(declared_.begin(), declared_.end(), variable) != declared_.end()) return;
  declared_.push_back(variable);
  poison(memory, size);
  if (setup_.observer != nullptr) setup_.observer->declared(memory, size, name);
}

std::size_t Machine::declared_bytes() const {
  std::size_t bytes = 0;
  for (const auto& variable : declared_) bytes += variable.second;
  return bytes;
}

void Machine::access(const void* address, unsigned size, bool is_write, const void* instruction) {
  Thread& self = *current_;
  if (setup_.observer == nullptr || self.in_atomic || self.fiber.owns(address)) return;
  std::string wrong = setup_.observer->access({address, size, is_write, false, self.arguments.index, instruction});
  if (!wrong.empty()) fail(std::move(wrong), instruction);
}

void Machine::begin_atomic(const void* address, unsigned size, bool is_write, const void* instruction) {
  Thread& self = *current_;
  self.in_atomic = true;
  if (setup_.observer == nullptr) return;
  std::string wrong = setup_.observer->access({address, size, is_write, true, self.arguments.index, instruction});
  if (!wrong.empty()) fail(std::move(wrong), instruction);
}

void Machine::end_atomic() {
  current_->in_atomic = false;
}

bool Machine::is_running() const {
  return current_ != nullptr;
}

std::byte* Machine::abandon_stack() const {
  return current_->fiber.stack_top();
}

bool Machine::on_stack_of_running_thread(const void* address) const {
  return current_->fiber.owns(address);
}

std::string Machine::stuck_report() const {
  static constexpr std::pair<State, const char*> kStates[] = {{State::kSimdOperation, "in a simdgroup operation"},
                                                              {State::kSimdgroupBarrier, "at a simdgroup_barrier"},
                                                              {State::kThreadgroupBarrier, "at a threadgroup_barrier"},
                                                              {State::kFinished, "finished"}};
  std::string report = "threads wait for each other:";
  for (unsigned first = 0; first < count_; first += abi::kLanes) {
    report += (first == 0 ? " simdgroup " : "; simdgroup ") + std::to_string(first / abi::kLanes) + " has";
    const char* separator = " ";
    for (const auto& [state, words] : kStates) {
      unsigned threads = 0;
      const abi::Site* site = nullptr;
      for (unsigned i = first; i < std::min(first + abi::kLanes, count_); ++i) {
        if (threads_[i]->state != state) continue;
        ++threads;
        site = &threads_[i]->site;
      }
      if (threads == 0) continue;
      report += separator + std::to_string(threads) + " " + words;
      if (state != State::kFinished) report += " (" + text(*site) + ")";
      separator = ", ";
    }
  }
  return report;
}

}  // namespace metal_sim
