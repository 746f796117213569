#include "cpu/codec_ops.h"

#include <algorithm>

#include "core/codec.h"

namespace tq_hb {
namespace {

// Rows per task: small enough to share, large enough to hide the cost of taking one.
constexpr std::size_t kRowsPerTask = 16;

template <class Row>
void for_each_row(ThreadPool& pool, std::size_t rows, const Row& row) {
  pool.parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, [&](std::size_t task) {
    const std::size_t end = std::min(rows, (task + 1) * kRowsPerTask);
    for (std::size_t i = task * kRowsPerTask; i < end; ++i) row(i);
  });
}

/// Slot of an absolute position; a linear cache has been checked to hold it.
std::uint64_t slot_of(std::uint64_t position, const TqHadamardQuantizeArgs& args) {
  return args.is_sliding == 1 ? position % args.cache_capacity : position;
}

}  // namespace

void quantize(const TqHadamardQuantizeArgs& args, const QuantizeTarget& target, Packing packing, ThreadPool& pool,
              BadRows& bad_rows) {
  const std::size_t head_dim = args.head_dim;
  const std::size_t heads = args.num_kv_heads;
  const std::size_t norms = norms_per_row(head_dim);
  const unsigned cbits = target.codebook->cbits;
  const std::size_t bytes = row_bytes(packing, cbits, head_dim);
  const std::size_t tokens = target.src.shape().size() == 3 ? target.src.shape()[0] : 1;
  // Of a run longer than the ring only the newest tokens survive, and two tokens must not race for a slot.
  const std::size_t skipped = tokens > args.cache_capacity ? tokens - args.cache_capacity : 0;
  for_each_row(pool, (tokens - skipped) * heads, [&](std::size_t i) {
    const std::size_t row = i + skipped * heads;
    const std::size_t head = row % heads;
    const std::size_t at = head * args.cache_capacity + slot_of(std::uint64_t{args.write_pos} + row / heads, args);
    const float* src = target.src.data<const float>() + row * head_dim;
    std::uint8_t* packed = target.packed.data<std::uint8_t>() + at * bytes;
    std::uint8_t codes[kMaxHeadDim];
    const bool cut = has_planes(packing, cbits);
    const bool written = encode_row(src, head_dim, args.scale_factor_d512, *target.codebook, cut ? codes : packed,
                                    target.norms.data<float>() + at * norms);
    if (!written) {
      bad_rows.report(row);
    } else if (cut) {
      pack_row(codes, head_dim, cbits, packed);
    }
  });
}

void dequantize(const DequantizeOp& op, ThreadPool& pool) {
  const TqHadamardQuantizeArgs& args = op.args;
  const std::size_t head_dim = args.head_dim;
  const std::size_t heads = args.num_kv_heads;
  for_each_row(pool, op.output.size() / head_dim, [&](std::size_t row) {
    const std::size_t at = row % heads * args.cache_capacity + slot_of(op.first_position + row / heads, args);
    const std::uint8_t* packed =
        op.packed.data<const std::uint8_t>() + at * row_bytes(op.packing, op.codebook->cbits, head_dim);
    std::uint8_t codes[kMaxHeadDim];
    const bool cut = has_planes(op.packing, op.codebook->cbits);
    if (cut) unpack_row(packed, head_dim, op.codebook->cbits, codes);
    decode_row(cut ? codes : packed, op.norms.data<const float>() + at * norms_per_row(head_dim), head_dim,
               args.scale_factor_d512, *op.codebook, op.output.data<float>() + row * head_dim);
  });
}

void fwht(const FwhtOp& op, ThreadPool& pool) {
  const std::size_t head_dim = op.data.shape().back();
  const auto transform = op.kind == Fwht::kPremult ? rotate_row : op.kind == Fwht::kUndo ? unrotate_row : transform_row;
  for_each_row(pool, op.data.size() / head_dim,
               [&](std::size_t row) { transform(op.data.data<float>() + row * head_dim, head_dim); });
}

}  // namespace tq_hb
