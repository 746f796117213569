// The Objective-C runtime: reference counts, pools, properties, ivars, super, categories, exceptions.
#include "runtime.h"

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#import <Foundation/Foundation.h>
#include <gtest/gtest.h>

namespace {

int destroyed = 0;

struct Member {
  int value = 7;
  ~Member() { ++destroyed; }
};

struct Triple {
  unsigned long a, b, c;
};

struct Pair {
  double x, y;
};

}  // namespace

@protocol Shape <NSObject>
- (int)sides;
@optional
- (int)holes;
- (Triple)corners;
@end

@interface Base : NSObject <Shape> {
 @public
  Member member_;
}
@property(copy) NSString* name;
@property(nonatomic, copy) NSString* nickname;
@property(strong) Base* friend_object;
@property(nonatomic, strong) Base* neighbour;
@property(nonatomic) int number;
+ (int)answer;
- (Triple)tripleOf:(unsigned long)a;
- (Pair)pairOf:(double)x with:(double)y;
- (double)sumOf:(double)a
              b:(double)b
              c:(double)c
              d:(double)d
              e:(double)e
              f:(double)f
              g:(double)g
              h:(double)h
              i:(int)i
              j:(int)j;
- (void)raise:(int)value;
- (BOOL)failWith:(NSString* __autoreleasing*)message;
@end

@implementation Base
+ (int)answer {
  return 42;
}
- (int)sides {
  return 3;
}
- (Triple)tripleOf:(unsigned long)a {
  return {a, a + 1, a + 2};
}
- (Pair)pairOf:(double)x with:(double)y {
  return {y, x};
}
- (double)sumOf:(double)a
              b:(double)b
              c:(double)c
              d:(double)d
              e:(double)e
              f:(double)f
              g:(double)g
              h:(double)h
              i:(int)i
              j:(int)j {
  return a + 10 * b + 100 * c + 1e3 * d + 1e4 * e + 1e5 * f + 1e6 * g + 1e7 * h + 1e8 * i + 1e9 * j;
}
- (void)raise:(int)value {
  throw std::runtime_error(std::to_string(value));
}
- (BOOL)failWith:(NSString* __autoreleasing*)message {
  *message = [NSString stringWithUTF8String:"failed"];
  return NO;
}
@end

@interface Derived : Base {
  Member second_;
}
@end

@implementation Derived
+ (int)answer {
  return [super answer] + 1;
}
- (int)sides {
  return [super sides] + 1;
}
- (Triple)tripleOf:(unsigned long)a {
  Triple triple = [super tripleOf:a + 10];
  triple.c = 0;
  return triple;
}
- (void)raise:(int)value {
  [super raise:value + 1];
}
@end

@interface Base (Extra)
- (int)extra;
@end

@implementation Base (Extra)
- (int)extra {
  return self.number + 1;
}
@end

namespace {
bool could_retain_while_dying = true;
}

@interface Dying : NSObject
@end

@implementation Dying
- (void)dealloc {
  could_retain_while_dying = objc_try_retain(static_cast<objc::Object*>((__bridge void*)self)) != nullptr;
}
@end

/// Each test must leave as many objects as it found.
class Runtime : public testing::Test {
 protected:
  void SetUp() override {
    destroyed = 0;
    live_ = metal_sim_live_objects();
  }
  void TearDown() override { EXPECT_EQ(metal_sim_live_objects(), live_); }
  long alive() const { return metal_sim_live_objects() - live_; }

 private:
  long live_ = 0;
};

TEST_F(Runtime, ReleasesWhatGoesOutOfScope) {
  {
    Base* object = [Base new];
    Base* same = object;
    EXPECT_EQ(alive(), 1);
    object = nil;
    EXPECT_EQ(alive(), 1);
    EXPECT_EQ(same->member_.value, 7);
  }
  EXPECT_EQ(alive(), 0);
  EXPECT_EQ(destroyed, 1);
}

TEST_F(Runtime, DestroysCxxIvarsOfEveryClassOnce) {
  @autoreleasepool {
    (void)[Derived new];
  }
  EXPECT_EQ(destroyed, 2);
}

TEST_F(Runtime, PoolsKeepObjectsUntilTheyEnd) {
  @autoreleasepool {
    __unsafe_unretained NSString* text;
    @autoreleasepool {
      NSString* __autoreleasing inner = [NSString stringWithUTF8String:"text"];
      text = inner;
      EXPECT_STREQ(text.UTF8String, "text");
      EXPECT_GE(alive(), 1);
    }
    EXPECT_EQ(alive(), 0);
  }
}

TEST_F(Runtime, PoolsBelongToTheirThread) {
  std::thread([] { (void)[NSString stringWithUTF8String:"no pool here"]; }).join();
  EXPECT_EQ(alive(), 0);
}

TEST_F(Runtime, PropertiesRetainAndCopy) {
  @autoreleasepool {
    Base *object = [Base new], *other = [Base new];
    object.name = [NSString stringWithUTF8String:"first"];
    object.name = [NSString stringWithUTF8String:"second"];
    object.nickname = @"literal";
    object.friend_object = other;
    object.neighbour = other;
    object.number = 5;
    EXPECT_STREQ(object.name.UTF8String, "second");
    EXPECT_STREQ(object.nickname.UTF8String, "literal");
    EXPECT_EQ(object.friend_object, other);
    EXPECT_EQ(object.neighbour, other);
    EXPECT_EQ([object extra], 6);
    object.nickname = nil;
    EXPECT_EQ(object.nickname, nil);
  }
}

TEST_F(Runtime, AtomicPropertiesStandThreads) {
  Base* object = [Base new];
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([object] {
      for (int i = 0; i < 2000; ++i) {
        @autoreleasepool {
          object.name = [NSString stringWithUTF8String:std::to_string(i).c_str()];
          EXPECT_GE(object.name.length, 1u);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(Runtime, MessagesReachSuperAndCategories) {
  Derived* object = [Derived new];
  EXPECT_EQ([Derived answer], 43);
  EXPECT_EQ([object sides], 4);
  EXPECT_EQ([object extra], 1);
}

TEST_F(Runtime, StructsAndDoublesPassThrough) {
  Derived* object = [Derived new];
  const Triple triple = [object tripleOf:1];
  EXPECT_EQ(triple.a, 11u);
  EXPECT_EQ(triple.b, 12u);
  EXPECT_EQ(triple.c, 0u);
  const Pair pair = [object pairOf:1.5 with:2.5];
  EXPECT_EQ(pair.x, 2.5);
  EXPECT_EQ(pair.y, 1.5);
  EXPECT_EQ(([object sumOf:1 b:2 c:3 d:4 e:5 f:6 g:7 h:8 i:9 j:1]), 1987654321.0);
}

TEST_F(Runtime, MessagesToNilGiveZero) {
  Base* nothing = nil;
  EXPECT_EQ([nothing sides], 0);
  EXPECT_EQ(nothing.name, nil);
  EXPECT_EQ([nothing tripleOf:1].b, 0u);
  EXPECT_EQ([nothing pairOf:1 with:2].y, 0.0);
}

TEST_F(Runtime, ProtocolsAndClassesAnswerQuestions) {
  id<Shape> shape = [Derived new];
  EXPECT_TRUE([shape isKindOfClass:[Base class]]);
  EXPECT_FALSE([shape isKindOfClass:[NSString class]]);
  EXPECT_TRUE([shape respondsToSelector:@selector(sides)]);
  EXPECT_FALSE([shape respondsToSelector:@selector(holes)]);
  EXPECT_TRUE([shape isEqual:shape]);
  EXPECT_EQ([shape class], [Derived class]);
}

TEST_F(Runtime, ExceptionsReleaseTheFramesTheyPass) {
  try {
    Base* local = [Base new];
    EXPECT_NE(local, nil);
    Derived* object = [Derived new];
    [object raise:1];
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "2");
  }
  EXPECT_EQ(alive(), 0);
}

TEST_F(Runtime, UnknownSelectorsThrow) {
  id<Shape> shape = [Base new];
  EXPECT_THROW([shape holes], std::logic_error);
  EXPECT_THROW((void)[shape corners], std::logic_error);
}

TEST_F(Runtime, OutParametersAreAutoreleased) {
  @autoreleasepool {
    NSString* message = nil;
    EXPECT_FALSE([[Base new] failWith:&message]);
    EXPECT_STREQ(message.UTF8String, "failed");
  }
}

TEST_F(Runtime, CountsStayRightUnderThreads) {
  Base* shared = [Base new];
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([shared] {
      for (int i = 0; i < 5000; ++i) {
        Base* mine = shared;
        EXPECT_EQ([mine sides], 3);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(alive(), 1);
}

TEST_F(Runtime, TryRetainRefusesADyingObject) {
  could_retain_while_dying = true;
  @autoreleasepool {
    (void)[Dying new];
  }
  EXPECT_FALSE(could_retain_while_dying);
}

TEST_F(Runtime, NewSystemVersionsCountAsAvailable) {
  bool is_available = false;
  if (@available(macOS 15.0, *)) is_available = true;
  EXPECT_TRUE(is_available);
}
