// The words in which kernels report the first row that held a value which cannot be used.
//
// For Objective-C++ files.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/error.h"
#include "metal/storage.h"

namespace tq_hb {

class BadRowWords {
 public:
  BadRowWords(const Device* _Nonnull device, std::shared_ptr<MetalContext> context)
      : device_(device), context_(std::move(context)) {}

  /// One word per field. Kernels count rows token by token, head by head inside a token, from `first_row` on.
  Buffer watch(const std::string& op, const std::vector<std::string>& fields, RowRule rule, std::uint64_t heads,
               std::uint64_t first_row);

  /// Throws for the first op that reported a row. The commands must be done.
  void check() const;

 private:
  struct Watch {
    Buffer word;
    std::string op, field;
    RowRule rule;
    std::uint64_t heads, first_row;
  };

  const Device* _Nonnull device_;
  std::shared_ptr<MetalContext> context_;
  Buffer block_;
  std::uint64_t used_ = 0;
  std::vector<Watch> watches_;
};

}  // namespace tq_hb
