// The error every layer throws, and the one form of its message: "op: field rule, got value".
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace tq_hb {

enum class ErrorCode { kInvalidArgument, kUnsupported, kDevice, kOutOfMemory };

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

/// "op: field rule, got value".
template <class Value>
Error invalid(const std::string& op, const std::string& field, const std::string& rule, const Value& value) {
  std::ostringstream message;
  message << op << ": " << field << ' ' << rule << ", got " << value;
  return Error(ErrorCode::kInvalidArgument, message.str());
}

/// "op: what is not supported".
inline Error unsupported(const std::string& op, const std::string& what) {
  return Error(ErrorCode::kUnsupported, op + ": " + what + " is not supported");
}

/// What a row is checked for: all that is asked of a query is that it is finite.
enum class RowRule { kFinite, kEncodable };

/// The message for a row of `field` that breaks its rule.
inline std::string bad_row_message(const std::string& op, const std::string& field, RowRule rule,
                                   unsigned long long token, unsigned long long head) {
  std::ostringstream message;
  message << op << ": " << field << " must be finite"
          << (rule == RowRule::kEncodable ? " with a squared norm that fits in float32" : "")
          << ", got a bad row at token " << token << ", head " << head;
  return message.str();
}

}  // namespace tq_hb
