// The words in which kernels report the first row that held a value which cannot be used.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/error.h"
#include "cuda/context.h"

namespace tq_hb {

class BadRowWords {
 public:
  explicit BadRowWords(std::shared_ptr<CudaContext> context) : context_(std::move(context)) {}
  /// The launches that may write the words must be done.
  ~BadRowWords();
  BadRowWords(const BadRowWords&) = delete;
  BadRowWords& operator=(const BadRowWords&) = delete;

  /// A word in the GPU's memory. Kernels count rows token by token, head by head inside a token.
  std::uint32_t* watch(const std::string& op, const std::string& field, RowRule rule, std::uint64_t heads);

  /// Reads the words in the order of the stream, and waits for that. Throws for the first op that reported a row.
  void check(cudaStream_t stream);

  /// Notes that the launches may run again at any time.
  void expect_replays() noexcept { are_replayed_ = true; }

 private:
  struct Watch {
    std::string op, field;
    RowRule rule;
    std::uint64_t heads;
  };

  std::shared_ptr<CudaContext> context_;
  bool are_replayed_ = false;
  bool are_clean_ = false;  // nothing was reported, and nothing can be any more
  std::vector<std::uint32_t*> blocks_;
  std::vector<Watch> watches_;  // the word of number i is word i % kStatusWords of block i / kStatusWords
};

}  // namespace tq_hb
