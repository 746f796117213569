#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cpu/thread_pool.h"

namespace tq_hb {
namespace {

TEST(ThreadPool, RunsEveryTaskOnce) {
  for (const unsigned threads : {1u, 2u, 3u, 7u}) {
    ThreadPool pool;
    pool.set_num_threads(threads);
    for (const std::size_t count : {0u, 1u, 2u, 31u, 1000u}) {
      std::vector<std::atomic<int>> runs(count);
      pool.parallel_for(count, [&](std::size_t i) { ++runs[i]; });
      for (const auto& run : runs) EXPECT_EQ(run.load(), 1);
    }
  }
}

TEST(ThreadPool, NoTwoTasksHaveTheSameThreadAtATimeAndNoneHasMoreThanAllowed) {
  ThreadPool pool;
  pool.set_num_threads(4);
  std::set<unsigned> seen;
  for (const unsigned most : {1u, 2u, 3u, 4u, 9u}) {
    std::array<std::atomic<int>, 4> busy{};
    std::mutex mutex;
    for (int call = 0; call < 50; ++call) {
      pool.parallel_for(
          40,
          [&](std::size_t, unsigned thread) {
            ASSERT_LT(thread, std::min(most, 4u));
            EXPECT_EQ(busy[thread]++, 0);
            std::this_thread::yield();
            --busy[thread];
            const std::lock_guard<std::mutex> lock(mutex);
            seen.insert(thread);
          },
          most);
    }
  }
  EXPECT_GT(seen.size(), 1u);
}

TEST(ThreadPool, ManySmallCallsInARowDoNotMixUp) {
  ThreadPool pool;
  pool.set_num_threads(3);
  for (int call = 0; call < 2000; ++call) {
    std::atomic<std::size_t> sum{0};
    pool.parallel_for(5, [&](std::size_t i) { sum += i; });
    ASSERT_EQ(sum.load(), 10u);
  }
}

TEST(ThreadPool, ServesSeveralCallersAtOnceAndACallFromInsideACall) {
  ThreadPool pool;
  pool.set_num_threads(2);
  std::atomic<int> runs{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int call = 0; call < 100; ++call) {
        pool.parallel_for(4, [&](std::size_t) { pool.parallel_for(3, [&](std::size_t) { ++runs; }); });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(runs.load(), 4 * 100 * 4 * 3);
}

#if defined(__linux__)
/// While it is true something may be waited for that takes a moment, or seconds where other programs keep all
/// processors busy.
class Patience {
 public:
  explicit operator bool() const { return std::chrono::steady_clock::now() < end_; }

 private:
  std::chrono::steady_clock::time_point end_ = std::chrono::steady_clock::now() + std::chrono::seconds(20);
};

TEST(ThreadPool, WorkersDoNotStayOnTheCallersProcessor) {
  cpu_set_t before;
  ASSERT_EQ(sched_getaffinity(0, sizeof(before), &before), 0);
  if (CPU_COUNT(&before) < 2) GTEST_SKIP() << "there is one processor";
  ThreadPool pool;
  pool.set_num_threads(2);
  pool.start();
  const Patience patience;
  for (int processor = 0; processor < CPU_SETSIZE; ++processor) {
    if (!CPU_ISSET(processor, &before)) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(processor, &one);
    ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
    const std::thread::id caller = std::this_thread::get_id();
    // A worker that the first call has put there moves away in the next ones.
    std::atomic<int> elsewhere{0}, here{0};
    for (int call = 0; call < 20 || (elsewhere == 0 && patience); ++call) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));  // for the worker to go to sleep
      pool.parallel_for(200, [&](std::size_t) {
        if (std::this_thread::get_id() != caller && call == 0) {
          // It stays there when it may go elsewhere.
          EXPECT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
          EXPECT_EQ(sched_setaffinity(0, sizeof(before), &before), 0);
        } else if (std::this_thread::get_id() != caller) {
          ++(sched_getcpu() == processor ? here : elsewhere);
        }
        const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(10);
        while (std::chrono::steady_clock::now() < end) {
        }
      });
    }
    EXPECT_EQ(here.load(), 0) << processor;
    EXPECT_GT(elsewhere.load(), 0) << processor;
  }
  ASSERT_EQ(sched_setaffinity(0, sizeof(before), &before), 0);
}

TEST(ThreadPool, WorkersStayWhereTheyAreTiedTo) {
  cpu_set_t before, one;
  ASSERT_EQ(sched_getaffinity(0, sizeof(before), &before), 0);
  if (CPU_COUNT(&before) < 2) GTEST_SKIP() << "there is one processor";
  ThreadPool pool;
  pool.set_num_threads(2);
  pool.start();
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  const std::thread::id caller = std::this_thread::get_id();
  ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  std::atomic<int> tied{0}, elsewhere{0};
  const Patience patience;
  for (int call = 0; call < tied + 40 || (tied == 0 && patience); ++call) {
    pool.parallel_for(200, [&](std::size_t) {
      if (std::this_thread::get_id() == caller) return std::this_thread::yield();
      if (tied == 0 && sched_setaffinity(0, sizeof(one), &one) == 0) tied = call + 1;
      cpu_set_t now;
      EXPECT_EQ(sched_getaffinity(0, sizeof(now), &now), 0);
      if (!CPU_EQUAL(&now, &one)) ++elsewhere;
    });
  }
  ASSERT_EQ(sched_setaffinity(0, sizeof(before), &before), 0);
  EXPECT_GT(tied.load(), 0);
  EXPECT_EQ(elsewhere.load(), 0);
}
#endif

TEST(ThreadPool, CanBeResizedBetweenCalls) {
  ThreadPool pool;
  for (const unsigned threads : {4u, 1u, 2u, 2u, 5u}) {
    pool.set_num_threads(threads);
    EXPECT_EQ(pool.num_threads(), threads);
    std::atomic<int> runs{0};
    pool.parallel_for(64, [&](std::size_t) { ++runs; });
    EXPECT_EQ(runs.load(), 64);
  }
}

// g++ says it in one way, clang in another, and some g++ know the other as well.
#if defined(__SANITIZE_THREAD__)
#define TQ_UNDER_THREAD_SANITIZER
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define TQ_UNDER_THREAD_SANITIZER
#endif
#endif

TEST(ThreadPool, AForkedChildGetsWorkersOfItsOwn) {
#if defined(TQ_UNDER_THREAD_SANITIZER)
  GTEST_SKIP() << "ThreadSanitizer ends a child that starts threads after a fork of several";
#endif
  ThreadPool::instance().set_num_threads(3);
  std::atomic<int> runs{0};
  ThreadPool::instance().parallel_for(8, [&](std::size_t) { ++runs; });
  const pid_t child = fork();
  if (child == 0) {
    std::atomic<int> mine{0};
    ThreadPool::instance().parallel_for(64, [&](std::size_t) { ++mine; });
    _exit(mine.load() == 64 && ThreadPool::instance().num_threads() == 3 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  ThreadPool::instance().parallel_for(8, [&](std::size_t) { ++runs; });
  EXPECT_EQ(runs.load(), 16);
}

}  // namespace
}  // namespace tq_hb
