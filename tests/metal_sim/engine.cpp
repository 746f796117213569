#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>

#include "binding.h"
#include "checker.h"
#include "denormals.h"
#include "library.h"
#include "machine.h"
#include "memory_fault.h"
#include "options.h"
#include "random.h"
#include "recording.h"
#include "statistics.h"

namespace metal_sim {
namespace {

/// Memory of one [[threadgroup(n)]] parameter, kept from dispatch to dispatch while the size fits.
class GroupMemory {
 public:
  GroupMemory() = default;
  ~GroupMemory() { release(data_, size_); }
  GroupMemory(const GroupMemory&) = delete;
  GroupMemory& operator=(const GroupMemory&) = delete;

  std::byte* get(std::size_t size) {
    if (size != size_) {
      release(data_, size_);
      data_ = nullptr;
      data_ = allocate(size);
      size_ = size;
    }
    return data_;
  }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

std::string text(const std::uint32_t (&position)[3]) {
  return "(" + std::to_string(position[0]) + ", " + std::to_string(position[1]) + ", " + std::to_string(position[2]) +
         ")";
}

class Execution {
 public:
  /// The checker may be null.
  Execution(const Dispatch& dispatch, const Options& options, Random& random, Checker* checker)
      : dispatch_(dispatch),
        library_(static_cast<const LoadedLibrary&>(*dispatch.library)),
        options_(options),
        random_(random),
        checker_(checker) {}

  void run();

 private:
  void check_dispatch() const;
  void set_constants() const;
  void bind();
  void run_groups();
  [[noreturn]] void fault(const std::string& message) const;
  [[noreturn]] void fault(const Machine::Failure& failure) const;

  const Dispatch& dispatch_;
  const LoadedLibrary& library_;
  const Options& options_;
  Random& random_;
  Checker* checker_;
  abi::GroupArguments arguments_{};
  std::vector<Region> regions_;
};

void Execution::run() {
  check_dispatch();
  set_constants();
  bind();
  const MachineCounts before = Machine::instance().counts();
  run_groups();
  const MachineCounts& after = Machine::instance().counts();

  KernelStatistics counts;
  counts.dispatches = 1;
  counts.threadgroups =
      std::uint64_t{1} * dispatch_.threadgroups.width * dispatch_.threadgroups.height * dispatch_.threadgroups.depth;
  counts.threads = counts.threadgroups * dispatch_.threads.width * dispatch_.threads.height * dispatch_.threads.depth;
  counts.simd_operations = after.simd_operations - before.simd_operations;
  counts.simdgroup_barriers = after.simdgroup_barriers - before.simdgroup_barriers;
  counts.threadgroup_barriers = after.threadgroup_barriers - before.threadgroup_barriers;
  counts.threadgroup_bytes = Machine::instance().declared_bytes();
  for (const unsigned slot : dispatch_.kernel->threadgroup_buffers) {
    counts.threadgroup_bytes += dispatch_.threadgroup_bytes[slot];
  }
  if (counts.threadgroup_bytes > kMaxThreadgroupBytes) {
    fault(std::to_string(counts.threadgroup_bytes) + " bytes of threadgroup memory");
  }
  if (checker_ != nullptr) counts.buffers = checker_->traffic();
  count_dispatch(dispatch_.kernel->name, counts);
}

void Execution::check_dispatch() const {
  const Size3& threads = dispatch_.threads;
  const std::uint64_t count = std::uint64_t{threads.width} * threads.height * threads.depth;
  if (count == 0 || count > kMaxThreadsPerThreadgroup) {
    fault(std::to_string(count) + " threads in a threadgroup");
  }
  for (const unsigned slot : dispatch_.kernel->buffers) {
    if (dispatch_.buffers[slot].data == nullptr) fault("buffer " + std::to_string(slot) + " is not bound");
  }
  for (const unsigned slot : dispatch_.kernel->threadgroup_buffers) {
    if (dispatch_.threadgroup_bytes[slot] == 0) {
      fault("threadgroup memory " + std::to_string(slot) + " has no length");
    }
  }
  for (const unsigned index : dispatch_.kernel->required_constants) {
    if (dispatch_.constants.count(index) == 0) fault("function constant " + std::to_string(index) + " is not set");
  }
}

void Execution::set_constants() const {
  const abi::Module& module = library_.module();
  for (unsigned i = 0; i < module.constant_count; ++i) {
    const abi::ConstantEntry& constant = module.constants[i];
    const auto value = dispatch_.constants.find(constant.index);
    *constant.is_defined = value != dispatch_.constants.end();
    std::memset(constant.value, 0, constant.size);
    if (!*constant.is_defined) continue;
    if (value->second.size() != constant.size)
      fault(std::string("function constant ") + constant.name + " has another size");
    std::memcpy(constant.value, value->second.data(), constant.size);
  }
  module.update_constants();
}

void Execution::bind() {
  static std::array<GroupMemory, kMaxThreadgroupBuffers> memory;
  for (const unsigned slot : dispatch_.kernel->buffers) {
    const Binding& binding = dispatch_.buffers[slot];
    arguments_.buffers[slot] = binding.data;
    const std::string label = binding.label.empty() ? slot_label(slot) : binding.label;
    const std::string name = "buffer " + std::to_string(slot) + (binding.label.empty() ? "" : " (" + label + ")");
    regions_.push_back({binding.data, binding.size, name, label, false});
  }
  for (const unsigned slot : dispatch_.kernel->threadgroup_buffers) {
    const std::uint32_t size = dispatch_.threadgroup_bytes[slot];
    std::byte* data = memory[slot].get(size);
    arguments_.memory[slot] = data;
    regions_.push_back({data, size, "threadgroup memory " + std::to_string(slot), "", true});
  }
  const Size3 &threads = dispatch_.threads, &groups = dispatch_.threadgroups;
  const std::uint32_t thread_counts[3] = {threads.width, threads.height, threads.depth};
  const std::uint32_t group_counts[3] = {groups.width, groups.height, groups.depth};
  std::copy_n(thread_counts, 3, arguments_.threads);
  std::copy_n(group_counts, 3, arguments_.groups);
}

void Execution::run_groups() {
  Machine& machine = Machine::instance();
  const std::uint32_t* groups = arguments_.groups;
  const std::uint32_t* threads = arguments_.threads;
  machine.begin({&library_.entry(*dispatch_.kernel),
                 {threads[0], threads[1], threads[2]},
                 options_.flush_denormals,
                 options_.seed ? &random_ : nullptr,
                 checker_});
  if (checker_ != nullptr) checker_->begin_dispatch(library_, dispatch_.kernel->name, regions_);
  for (const std::uint32_t group : random_.order(std::size_t{groups[0]} * groups[1] * groups[2])) {
    arguments_.position[0] = group % groups[0];
    arguments_.position[1] = group / groups[0] % groups[1];
    arguments_.position[2] = group / groups[0] / groups[1];
    for (const Region& region : regions_) {
      if (region.is_threadgroup) std::memset(const_cast<std::byte*>(region.begin), Machine::kPoison, region.size);
    }
    if (checker_ != nullptr) checker_->begin_group();
    const Machine::Failure failure = machine.run(arguments_);
    if (!failure.message.empty()) fault(failure);
  }
}

void Execution::fault(const std::string& message) const {
  throw Fault("kernel " + dispatch_.kernel->name + ": " + message);
}

void Execution::fault(const Machine::Failure& failure) const {
  const std::uint32_t* threads = arguments_.threads;
  const std::uint32_t thread[3] = {failure.thread % threads[0], failure.thread / threads[0] % threads[1],
                                   failure.thread / threads[0] / threads[1]};
  std::string message = failure.message;
  if (failure.address != nullptr) message += ", " + describe_outside(regions_, failure.address);
  if (failure.instruction != nullptr) message += ", at " + library_.describe(failure.instruction);
  fault(message + " [threadgroup " + text(arguments_.position) + ", thread " + text(thread) + "]");
}

std::mutex mutex;

}  // namespace

double execute(const std::vector<Batch>& batches) {
  const std::lock_guard lock(mutex);
  const Options options = read_options();
  if (!options.record.empty()) record_variant(batches, options.record);
  Random random(options.seed.value_or(0));
  const MemoryFaultGuard memory_faults;
  const DenormalsGuard denormals;
  const auto start = std::chrono::steady_clock::now();
  Checker checker;
  for (const Batch& batch : batches) {
    checker.begin_batch();
    for (const std::uint32_t index : random.order(batch.size())) {
      Execution(batch[index], options, random, options.check ? &checker : nullptr).run();
    }
    count_batch();
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

const abi::Engine& engine_functions() {
  static const abi::Engine functions = {
      [](abi::Site site, void* value, unsigned size, abi::Shuffle how, unsigned operand) {
        Machine::instance().shuffle(site, value, size, how, operand);
      },
      [](abi::Site site, void* value, unsigned size, abi::Combine* combine) {
        Machine::instance().reduce(site, value, size, combine);
      },
      [](abi::Site site, abi::Scope scope, unsigned flags) { Machine::instance().barrier(site, scope, flags); },
      [] { return Machine::instance().lane(); },
      [](void* memory, unsigned long size, const char* name) { Machine::instance().declare(memory, size, name); },
      [](const void* address, unsigned size, bool is_write, const void* instruction) {
        Machine::instance().access(address, size, is_write, instruction);
      },
      [](const void* address, unsigned size, bool is_write) {
        Machine::instance().begin_atomic(address, size, is_write, __builtin_return_address(0));
      },
      [] { Machine::instance().end_atomic(); },
      [](abi::Site site, const char* message) {
        Machine::instance().fail(
            [&] { return std::string(message) + ", at " + site.file + ":" + std::to_string(site.line); }());
      }};
  return functions;
}

}  // namespace metal_sim
