// The Foundation subset: strings, errors, arrays.
#include <stdexcept>
#include <string>

#import <Foundation/Foundation.h>
#include <gtest/gtest.h>

#import "Foundation/private.h"

TEST(Foundation, StringsCompareByText) {
  @autoreleasepool {
    NSString* made = [NSString stringWithUTF8String:"name"];
    EXPECT_TRUE([made isEqualToString:@"name"]);
    EXPECT_TRUE([@"name" isEqual:made]);
    EXPECT_FALSE([@"other" isEqual:made]);
    EXPECT_EQ(made.hash, @"name".hash);
    EXPECT_EQ([made copy], made);
  }
}

TEST(Foundation, LengthCountsUtf16Units) {
  @autoreleasepool {
    EXPECT_EQ(@"four".length, 4u);
    EXPECT_EQ([NSString stringWithUTF8String:"\xC3\xA9"].length, 1u);          // e with acute
    EXPECT_EQ([NSString stringWithUTF8String:"\xF0\x9F\x98\x80"].length, 2u);  // outside the basic plane
  }
}

TEST(Foundation, LiteralsOutsideAsciiAreRefused) {
  EXPECT_THROW((void)@"\u00e9".UTF8String, std::logic_error);
}

TEST(Foundation, ErrorsCarryDomainCodeAndText) {
  @autoreleasepool {
    NSError* error = nil;
    report(&error, @"Domain", 7, "what happened");
    EXPECT_STREQ(error.domain.UTF8String, "Domain");
    EXPECT_EQ(error.code, 7);
    EXPECT_STREQ(error.localizedDescription.UTF8String, "what happened");
    report(nullptr, @"Domain", 7, "nobody asks");
  }
}

TEST(Foundation, ArraysIndexAndEnumerate) {
  @autoreleasepool {
    NSArray<NSString*>* array = @[ @"a", @"b", @"c" ];
    std::string joined;
    for (NSString* text in array) joined += text.UTF8String;
    EXPECT_EQ(joined, "abc");
    EXPECT_EQ(array.count, 3u);
    EXPECT_STREQ([array objectAtIndex:1].UTF8String, "b");
    EXPECT_STREQ(array[2].UTF8String, "c");
    EXPECT_THROW([array objectAtIndex:3], std::out_of_range);
  }
}
