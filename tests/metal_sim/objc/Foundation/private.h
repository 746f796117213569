// Makers of Foundation objects that Apple's interface would want a dictionary for.
#pragma once

#include <string>

#import <Foundation/Foundation.h>

NSString* to_nsstring(const std::string& text);
NSError* make_error(NSErrorDomain domain, NSInteger code, const std::string& description);

/// Stores the error where the caller asked for it.
inline void report(NSError* __autoreleasing* destination, NSErrorDomain domain, NSInteger code,
                   const std::string& description) {
  if (destination != nullptr) *destination = make_error(domain, code, description);
}
