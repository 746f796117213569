// The cpu backend's persistent workers.
//
// Workers spin briefly before they sleep, since decode calls follow each other closely. A call made
// while the pool is busy runs on its own thread: results never depend on how many threads helped.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace tq_hb {

/// A call's task, by reference: what std::function would copy to the heap. It is called with its number, and if it
/// takes that, with the number of its thread as well, which no other task of the call has meanwhile.
class TaskRef {
 public:
  template <class Task>
  TaskRef(const Task& task) noexcept  // NOLINT: meant to be implicit
      : task_(&task), call_([](const void* object, std::size_t i, [[maybe_unused]] unsigned thread) {
          const Task& called = *static_cast<const Task*>(object);
          if constexpr (std::is_invocable_v<const Task&, std::size_t, unsigned>) {
            called(i, thread);
          } else {
            called(i);
          }
        }) {}
  void operator()(std::size_t i, unsigned thread) const { call_(task_, i, thread); }

 private:
  const void* task_;
  void (*call_)(const void* task, std::size_t i, unsigned thread);
};

class ThreadPool {
 public:
  /// The process's pool; a forked child gets a fresh one.
  static ThreadPool& instance();

  ThreadPool();
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// Threads that work on a call, the caller included.
  unsigned num_threads() const noexcept { return num_threads_.load(std::memory_order_relaxed); }
  void set_num_threads(unsigned count);
  /// Starts the workers now rather than at the first call.
  void start();

  /// Runs task(0) ... task(count - 1) and returns when all are done. Tasks must not throw. At most so many threads work
  /// on them, at least one: the caller, which is number 0.
  void parallel_for(std::size_t count, TaskRef task, unsigned most_threads = std::numeric_limits<unsigned>::max());

 private:
  struct Job;

  /// Sole use of the workers while it lives, if the pool was free.
  class Claim;

  /// A job that no worker looks at any more; to be called with job_mutex_ held.
  Job& free_job();
  void start_workers();
  void stop_workers();
  void work(unsigned thread, std::uint64_t seen);

  std::atomic<unsigned> num_threads_{std::max(1u, std::thread::hardware_concurrency())};
  // Set for the whole of a parallel call, and while workers start or stop. A flag rather than a mutex, since
  // a task may call parallel_for itself.
  std::atomic<bool> claimed_{false};
  std::vector<std::thread> workers_;
  std::mutex job_mutex_;  // guards jobs_, job_, stopping_ and the sleep
  std::condition_variable job_ready_;
  std::vector<std::unique_ptr<Job>> jobs_;  // used again: a worker that wakes late may still look at an old one
  Job* job_ = nullptr;
  bool stopping_ = false;
  std::atomic<std::uint64_t> generation_{0};
};

}  // namespace tq_hb
