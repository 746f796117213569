#include "cuda/bad_rows.h"

#include <algorithm>

#include "core/abi.h"

namespace tq_hb {

BadRowWords::~BadRowWords() {
  if (blocks_.empty() || context_->is_forked()) return;
  try {
    const CurrentDevice current(*context_);
    if (!are_clean_) {
      for (std::uint32_t* block : blocks_) {
        const std::size_t bytes = kStatusWords * sizeof(std::uint32_t);
        check_cuda(cudaMemsetAsync(block, 0xFF, bytes, context_->stream()), "cuda: setting status words");
      }
      check_cuda(cudaStreamSynchronize(context_->stream()), "cuda: setting status words");
    }
    for (std::uint32_t* block : blocks_) context_->give_back_status(block);
  } catch (const Error&) {
    // Words that could not be set again are not given out again.
  }
}

std::uint32_t* BadRowWords::watch(const std::string& op, const std::string& field, RowRule rule, std::uint64_t heads) {
  const std::size_t index = watches_.size();
  if (index % kStatusWords == 0) blocks_.push_back(context_->take_status());
  watches_.push_back({op, field, rule, heads});
  return blocks_.back() + index % kStatusWords;
}

void BadRowWords::check(cudaStream_t stream) {
  std::vector<std::uint32_t> words(watches_.size(), TQ_STATUS_OK);
  for (std::size_t first = 0; first < words.size(); first += kStatusWords) {
    const std::size_t bytes = std::min(kStatusWords, words.size() - first) * sizeof(std::uint32_t);
    check_cuda(
        cudaMemcpyAsync(words.data() + first, blocks_[first / kStatusWords], bytes, cudaMemcpyDeviceToHost, stream),
        "cuda: reading status words");
  }
  check_cuda(cudaStreamSynchronize(stream), "cuda: waiting");
  for (std::size_t i = 0; i < words.size(); ++i) {
    if (words[i] == TQ_STATUS_OK) continue;
    const Watch& watch = watches_[i];
    throw Error(ErrorCode::kInvalidArgument,
                bad_row_message(watch.op, watch.field, watch.rule, words[i] / watch.heads, words[i] % watch.heads));
  }
  are_clean_ = !are_replayed_;
}

}  // namespace tq_hb
