// Runs one threadgroup at a time: a fiber per GPU thread, which meet at simdgroup operations and barriers.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine.h"
#include "fiber.h"
#include "include/abi.h"
#include "random.h"

namespace metal_sim {

/// Rendezvous since the process started.
struct MachineCounts {
  std::uint64_t simd_operations = 0, simdgroup_barriers = 0, threadgroup_barriers = 0;
};

/// One load or store of a kernel.
struct Access {
  const void* address;
  unsigned size;
  bool is_write, is_atomic;
  unsigned thread;          ///< index in the threadgroup
  const void* instruction;  ///< the one after it
};

/// Told of the order that barriers create and of every access; see Checker.
class MachineObserver {
 public:
  virtual ~MachineObserver() = default;
  virtual void barrier_passed(abi::Scope scope, unsigned simdgroup, unsigned memory_flags) = 0;
  virtual void declared(void* memory, std::size_t size, const char* name) = 0;
  /// Says what is wrong with the access; nothing if it is right.
  virtual std::string access(const Access& access) = 0;
};

class Machine {
 public:
  /// What threadgroup memory holds before a kernel writes it: NaN in every float type.
  static constexpr int kPoison = 0xff;

  static Machine& instance();

  /// What holds for all threadgroups of a dispatch. The observer may be null.
  struct Setup {
    const abi::KernelEntry* kernel;
    unsigned threads[3];
    bool flush_denormals;
    Random* schedule;  ///< null: first in, first out
    MachineObserver* observer;
  };

  /// Why a threadgroup stopped: what happened, and the instruction where no site is known.
  struct Failure {
    std::string message;
    const void* instruction = nullptr;
    const void* address = nullptr;  ///< of a memory fault
    unsigned thread = 0;
  };

  void begin(const Setup& setup);
  /// Runs every thread to its end. An empty message says that all went well.
  Failure run(const abi::GroupArguments& arguments);

  const MachineCounts& counts() const { return counts_; }
  /// Bytes of the variables in threadgroup memory that the last threadgroup declared.
  std::size_t declared_bytes() const;

  // Called by the running kernel.
  void shuffle(abi::Site site, void* value, unsigned size, abi::Shuffle how, unsigned operand);
  void reduce(abi::Site site, void* value, unsigned size, abi::Combine* combine);
  void barrier(abi::Site site, abi::Scope scope, unsigned memory_flags);
  unsigned lane() const;
  void declare(void* memory, std::size_t size, const char* name);
  void access(const void* address, unsigned size, bool is_write, const void* instruction);
  void begin_atomic(const void* address, unsigned size, bool is_write, const void* instruction);
  void end_atomic();
  /// Ends the dispatch. The caller's stack is abandoned, so nothing in it may own memory: `message` is moved from.
  [[noreturn]] void fail(std::string&& message, const void* instruction = nullptr, const void* address = nullptr);

  /// Whether a kernel runs in the calling thread; then a memory fault is the kernel's.
  bool is_running() const;
  /// For the signal handler: the top of the running fiber's stack, whose contents are given up.
  std::byte* abandon_stack() const;
  bool on_stack_of_running_thread(const void* address) const;

 private:
  enum class State : std::uint8_t { kReady, kSimdOperation, kSimdgroupBarrier, kThreadgroupBarrier, kFinished };

  struct Thread {
    explicit Thread(void (*entry)()) : fiber(entry) {}
    Fiber fiber;
    abi::Arguments arguments{};
    abi::Site site{};
    unsigned simdgroup = 0, lane = 0;
    State state = State::kReady;
    bool in_atomic = false;
  };

  /// Where threads meet. The first to arrive sets what the others must agree on.
  struct Meeting {
    abi::Site site{};
    State kind = State::kReady;
    unsigned operand = 0, arrived = 0;
    unsigned phase = 0;  ///< alternates, so that a fast thread cannot overwrite what a slow one still reads
    char order[2] = {};  ///< addresses that stand for the order a barrier creates
  };
  struct Simdgroup {
    Meeting meeting;
    unsigned lanes = 0;
    abi::Slot slots[2][abi::kLanes];
  };

  Machine() = default;
  static void thread_main();
  void push(unsigned thread);
  unsigned pop();
  /// Leaves the running thread, which waits or has ended, for one that can go on.
  void switch_away();
  void switch_to(Thread& thread);
  /// Whether the running thread is the last of `expected` to arrive.
  bool arrive(Meeting& meeting, abi::Site site, State kind, unsigned operand, unsigned expected);
  /// Waits unless the last; the last makes the threads [first, first + count) ready.
  void meet(Meeting& meeting, State kind, bool is_last, unsigned first, unsigned count);
  std::string stuck_report() const;

  Setup setup_{};
  MachineCounts counts_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::array<Simdgroup, kMaxThreadsPerThreadgroup / abi::kLanes> simdgroups_;
  Meeting group_meeting_;
  Fiber* scheduler_ = nullptr;
  Thread* current_ = nullptr;
  unsigned count_ = 0, finished_ = 0;
  std::array<std::uint16_t, kMaxThreadsPerThreadgroup> ready_{};
  unsigned ready_begin_ = 0, ready_count_ = 0;
  std::vector<std::pair<const void*, std::size_t>> declared_;
  char group_order_ = 0;  ///< stands for the order between the scheduler and the threads
  Failure failure_;
};

}  // namespace metal_sim
