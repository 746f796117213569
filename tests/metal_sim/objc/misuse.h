// Misuse of the Metal interface: what Apple's validation layer would stop the program for.
#pragma once

#include <atomic>
#include <sstream>
#include <stdexcept>
#include <string>

namespace metal_sim {

/// A call broke a rule of Metal; what() is "-[Protocol method]: rule".
class Misuse : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

/// How often misuse() was called. What is left unfinished after a misuse is not complained of again.
inline std::atomic<unsigned> misuse_count{0};

/// Throws Misuse. The rule's parts are put together as a stream would.
template <class... Parts>
[[noreturn]] void misuse(const char* protocol, const char* method, const Parts&... rule) {
  std::ostringstream text;
  text << "-[" << protocol << ' ' << method << "]: ";
  (text << ... << rule);
  ++misuse_count;
  throw Misuse(text.str());
}

}  // namespace metal_sim
