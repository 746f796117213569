#include <atomic>
#include <functional>
#include <future>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "core/spec_cache.h"

namespace tq_hb {
namespace {

void run_in_threads(int count, const std::function<void(int)>& work) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
}

TEST(SpecCache, BuildsEachKeyOnceUnderContention) {
  SpecCache<int, std::string> cache;
  std::atomic<int> builds{0};
  run_in_threads(16, [&](int thread) {
    for (int i = 0; i < 200; ++i) {
      const int key = (i + thread) % 8;
      const std::string& value = cache.get(key, [&] {
        ++builds;
        return std::to_string(key);
      });
      EXPECT_EQ(value, std::to_string(key));
    }
  });
  EXPECT_EQ(builds.load(), 8);
  EXPECT_EQ(cache.builds(), 8u);
}

TEST(SpecCache, ABuildDoesNotBlockOtherKeys) {
  SpecCache<int, int> cache;
  std::promise<void> entered, leave;
  std::thread slow([&] {
    cache.get(1, [&] {
      entered.set_value();
      leave.get_future().wait();
      return 10;
    });
  });
  entered.get_future().wait();
  EXPECT_EQ(cache.get(2, [] { return 20; }), 20);
  EXPECT_EQ(cache.get(2, [] { return -1; }), 20);
  leave.set_value();
  slow.join();
  EXPECT_EQ(cache.get(1, [] { return -1; }), 10);
}

TEST(SpecCache, AFailedBuildIsTriedAgain) {
  SpecCache<int, int> cache;
  const auto fail = []() -> int { throw std::runtime_error("no"); };
  EXPECT_THROW(cache.get(1, fail), std::runtime_error);
  EXPECT_EQ(cache.builds(), 0u);
  EXPECT_EQ(cache.get(1, [] { return 5; }), 5);
}

TEST(SpecCache, ReferencesStayValid) {
  SpecCache<int, int> cache;
  const int& first = cache.get(0, [] { return 42; });
  for (int key = 1; key < 1000; ++key) cache.get(key, [&] { return key; });
  EXPECT_EQ(first, 42);
}

}  // namespace
}  // namespace tq_hb
