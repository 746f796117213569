#include <future>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/kept_values.h"

namespace tq_hb {
namespace {

TEST(KeptValues, ThreadsGetTheSameValueOfAKey) {
  static KeptValues<int, std::string> kept;
  const std::string* found[8][4] = {};
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 4; ++i) {
        const int key = (i + t) % 4;
        found[t][key] = &kept.get(key, [&] { return std::to_string(key); });
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int key = 0; key < 4; ++key) {
    EXPECT_EQ(*found[0][key], std::to_string(key));
    for (int t = 1; t < 8; ++t) EXPECT_EQ(found[t][key], found[0][key]);
  }
}

TEST(KeptValues, AFailedAttemptIsMadeAgain) {
  static KeptValues<int, int> kept;
  EXPECT_THROW(kept.get(1, []() -> int { throw 1; }), int);
  EXPECT_EQ(kept.get(1, [] { return 2; }), 2);
  EXPECT_EQ(kept.get(1, [] { return 3; }), 2);
}

TEST(KeptValues, AChildForkedWhileAValueIsMadeMakesItsOwn) {
  static KeptValues<int, int> kept;
  std::promise<void> entered, leave;
  std::thread slow([&] {
    kept.get(1, [&] {
      entered.set_value();
      leave.get_future().wait();
      return 10;
    });
  });
  entered.get_future().wait();
  const pid_t child = fork();
  if (child == 0) {
    alarm(10);  // ends a child that waits for a thread which it has not
    _exit(kept.get(1, [] { return 20; }) == 20 ? 0 : 1);
  }
  leave.set_value();
  slow.join();
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_EQ(kept.get(1, [] { return 30; }), 10);
}

}  // namespace
}  // namespace tq_hb
