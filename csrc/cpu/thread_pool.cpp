#include "cpu/thread_pool.h"

#include <algorithm>
#include <system_error>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace tq_hb {
namespace {

// 50 to 200 microseconds, as a processor pauses: longer than the gap between the ops of one decode step.
constexpr int kSpins = 4000;

inline void relax() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// -1 where the system does not tell.
inline int current_processor() noexcept {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

/// Where a worker runs. Linux may wake it on the very processor that wakes it, though another one is idle: until the
/// next tick, milliseconds later, the two would take turns.
class WorkerPlace {
 public:
  /// Moves to another processor if this is the one it runs on, and it may use enough others for so many threads.
  void leave(int processor, std::size_t threads) noexcept {
#if defined(__linux__)
    if (processor < 0 || current_processor() != processor) return;
    // Of a system with more processors than a cpu_set_t has, none are known.
    cpu_set_t now;
    if (sched_getaffinity(0, sizeof(now), &now) != 0) return;
    if (!CPU_EQUAL(&now, &others_)) allowed_ = now;
    cpu_set_t others = allowed_;
    CPU_CLR(processor, &others);
    if (static_cast<std::size_t>(CPU_COUNT(&others)) + 1 < threads) return;
    if (sched_setaffinity(0, sizeof(others), &others) == 0) others_ = others;
#else
    static_cast<void>(processor);
    static_cast<void>(threads);
#endif
  }

 private:
#if defined(__linux__)
  cpu_set_t allowed_{};  // by whoever chose last, but for this class
  cpu_set_t others_{};   // as this class has set
#endif
};

std::atomic<ThreadPool*> g_pool{nullptr};
// Survives the pool of a parent process, so that a forked child keeps its setting.
std::atomic<unsigned> g_num_threads{0};

}  // namespace

struct ThreadPool::Job {
  /// Takes tasks until none is left: half of a thread's share of what is left at a time. Tasks that follow each other
  /// mostly have memory that does.
  void run(unsigned thread) noexcept {
    std::size_t begin = next.load(std::memory_order_relaxed);
    while (begin < count) {
      const std::size_t end = begin + std::max<std::size_t>((count - begin) / (std::size_t{2} * threads), 1);
      if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      for (std::size_t i = begin; i < end; ++i) (*task)(i, thread);
      unfinished.fetch_sub(end - begin, std::memory_order_release);
      begin = next.load(std::memory_order_relaxed);
    }
  }

  const TaskRef* task = nullptr;
  std::size_t count = 0;
  unsigned threads = 1;  // that may take tasks: the first ones
  int processor = -1;    // that the caller was on
  std::atomic<std::size_t> next{0};
  std::atomic<std::size_t> unfinished{0};
  std::atomic<unsigned> workers{0};
};

class ThreadPool::Claim {
 public:
  enum Mode { kTry, kWait };

  Claim(ThreadPool& pool, Mode mode) noexcept : pool_(pool) {
    held_ = !pool_.claimed_.exchange(true, std::memory_order_acquire);
    while (!held_ && mode == kWait) {
      std::this_thread::yield();
      held_ = !pool_.claimed_.exchange(true, std::memory_order_acquire);
    }
  }
  ~Claim() {
    if (held_) pool_.claimed_.store(false, std::memory_order_release);
  }
  Claim(const Claim&) = delete;
  Claim& operator=(const Claim&) = delete;

  bool is_held() const noexcept { return held_; }

 private:
  ThreadPool& pool_;
  bool held_;
};

ThreadPool& ThreadPool::instance() {
  ThreadPool* pool = g_pool.load(std::memory_order_acquire);
  if (pool != nullptr) return *pool;
#if defined(__unix__) || defined(__APPLE__)
  // The parent's workers do not exist in the child, and its locks may be held: leave that pool behind.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr); });
  static_cast<void>(registered);
#endif
  auto fresh = std::make_unique<ThreadPool>();
  if (const unsigned count = g_num_threads.load()) fresh->num_threads_.store(count);
  // Lives until the process ends: workers may outlast static destruction.
  if (g_pool.compare_exchange_strong(pool, fresh.get(), std::memory_order_acq_rel)) return *fresh.release();
  return *pool;
}

ThreadPool::ThreadPool() = default;

ThreadPool::~ThreadPool() {
  const Claim claim(*this, Claim::kWait);
  stop_workers();
}

void ThreadPool::set_num_threads(unsigned count) {
  const Claim claim(*this, Claim::kWait);
  if (count == num_threads()) return;
  stop_workers();
  num_threads_.store(count, std::memory_order_relaxed);
  if (this == g_pool.load()) g_num_threads.store(count);
}

void ThreadPool::start() {
  const Claim claim(*this, Claim::kWait);
  start_workers();
}

void ThreadPool::start_workers() {
  while (workers_.size() + 1 < num_threads()) {
    const std::uint64_t seen = generation_.load(std::memory_order_relaxed);
    const auto thread = static_cast<unsigned>(workers_.size() + 1);
    try {
      workers_.emplace_back([this, thread, seen] { work(thread, seen); });
    } catch (const std::system_error&) {
      return;  // the system has no more threads to give: the work is shared by those there are
    }
  }
}

void ThreadPool::stop_workers() {
  {
    const std::lock_guard<std::mutex> lock(job_mutex_);
    stopping_ = true;
    generation_.fetch_add(1, std::memory_order_release);
  }
  job_ready_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
  stopping_ = false;
}

ThreadPool::Job& ThreadPool::free_job() {
  for (const std::unique_ptr<Job>& job : jobs_) {
    if (job->workers.load(std::memory_order_acquire) == 0) return *job;
  }
  return *jobs_.emplace_back(std::make_unique<Job>());
}

void ThreadPool::parallel_for(std::size_t count, TaskRef task, unsigned most_threads) {
  const auto run_alone = [&] {
    for (std::size_t i = 0; i < count; ++i) task(i, 0);
  };
  // Without a claim: others may need the workers meanwhile.
  if (count <= 1 || num_threads() == 1 || most_threads == 1) return run_alone();
  const Claim claim(*this, Claim::kTry);
  if (!claim.is_held()) return run_alone();
  start_workers();
  Job* job;
  {
    const std::lock_guard<std::mutex> lock(job_mutex_);
    job = &free_job();
    job->task = &task;
    job->count = count;
    job->threads = std::min(num_threads(), most_threads);
    job->processor = current_processor();
    job->next.store(0, std::memory_order_relaxed);
    job->unfinished.store(count, std::memory_order_relaxed);
    job_ = job;
    generation_.fetch_add(1, std::memory_order_release);
  }
  job_ready_.notify_all();
  job->run(0);
  for (int spins = 0; job->unfinished.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < kSpins) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::work(unsigned thread, std::uint64_t seen) {
  WorkerPlace place;
  for (;;) {
    for (int spins = 0; spins < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spins) relax();
    Job* job;
    {
      std::unique_lock<std::mutex> lock(job_mutex_);
      job_ready_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
      if (stopping_) return;
      seen = generation_.load(std::memory_order_relaxed);
      job = job_;
      job->workers.fetch_add(1, std::memory_order_relaxed);
    }
    if (thread < job->threads) {
      place.leave(job->processor, job->threads);
      job->run(thread);
    }
    job->workers.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace tq_hb
