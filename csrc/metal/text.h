// Strings between C++ and Objective-C.
#pragma once

#include <string>

#import <Foundation/Foundation.h>

namespace tq_hb {

inline std::string to_string(NSString* _Nullable text) {
  const char* bytes = text.UTF8String;
  return bytes == nullptr ? std::string() : std::string(bytes);
}

inline NSString* _Nullable to_ns_string(const std::string& text) {
  return [NSString stringWithUTF8String:text.c_str()];
}

/// What an NSError says; some methods fail without one.
inline std::string describe(NSError* _Nullable error) {
  return error == nil ? "no reason was given" : to_string(error.localizedDescription);
}

}  // namespace tq_hb
