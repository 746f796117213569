#include "metal/bad_rows.h"

#include "core/abi.h"

namespace tq_hb {
namespace {

constexpr std::uint64_t kWordsPerBlock = 256;

}  // namespace

Buffer BadRowWords::watch(const std::string& op, const std::vector<std::string>& fields, RowRule rule,
                          std::uint64_t heads, std::uint64_t first_row) {
  if (block_.storage() == nullptr || used_ + fields.size() > kWordsPerBlock) {
    const std::uint64_t bytes = kWordsPerBlock * sizeof(std::uint32_t);
    block_ = Buffer(allocate_metal_storage(device_, context_, bytes), DType::kUint32, {kWordsPerBlock});
    used_ = 0;
  }
  const Buffer words = block_.slice(used_, used_ + fields.size());
  used_ += fields.size();
  for (std::uint64_t i = 0; i < fields.size(); ++i) {
    words.data<std::uint32_t>()[i] = TQ_STATUS_OK;
    watches_.push_back({words.slice(i, i + 1), op, fields[i], rule, heads, first_row});
  }
  return words;
}

void BadRowWords::check() const {
  for (const Watch& watch : watches_) {
    const std::uint32_t word = *watch.word.data<const std::uint32_t>();
    if (word == TQ_STATUS_OK) continue;
    const std::uint64_t row = watch.first_row + word;
    throw Error(ErrorCode::kInvalidArgument,
                bad_row_message(watch.op, watch.field, watch.rule, row / watch.heads, row % watch.heads));
  }
}

}  // namespace tq_hb
