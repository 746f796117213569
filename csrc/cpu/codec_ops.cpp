#include "cpu/codec_ops.h"

#include <algorithm>

#include "core/codec.h"
#include "cpu/isa.h"
#include "cpu/search_tree.h"

namespace tq_hb {
namespace {

// Rows per task: small enough to share, large enough to hide the cost of taking one.
constexpr std::size_t kRowsPerTask = kEncodeRows;

/// Calls run(begin, end) for parts of a range of rows.
template <class Run>
void for_each_run(ThreadPool& pool, std::size_t rows, const Run& run) {
  pool.parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask,
                    [&](std::size_t task) { run(task * kRowsPerTask, std::min(rows, (task + 1) * kRowsPerTask)); });
}

template <class Row>
void for_each_row(ThreadPool& pool, std::size_t rows, const Row& row) {
  for_each_run(pool, rows, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) row(i);
  });
}

/// Slot of an absolute position; a linear cache has been checked to hold it.
std::uint64_t slot_of(std::uint64_t position, const TqHadamardQuantizeArgs& args) {
  return args.is_sliding == 1 ? position % args.cache_capacity : position;
}

}  // namespace

void quantize(const QuantizeOp& op, const QuantizeTarget& target, ThreadPool& pool, BadRows& bad_rows) {
  const TqHadamardQuantizeArgs& args = op.args;
  const std::size_t head_dim = args.head_dim;
  const std::size_t heads = args.num_kv_heads;
  const std::size_t norms = norms_per_row(head_dim);
  const unsigned cbits = target.codebook->cbits;
  const std::size_t bytes = row_bytes(op.packing, cbits, head_dim);
  const std::size_t skipped = op.num_skipped();
  const bool cut = has_planes(op.packing, cbits);
  EncodeRows& encode = encode_kernel();
  EncodeTask same{};
  same.head_dim = head_dim;
  same.scale_factor_d512 = args.scale_factor_d512;
  same.codebook = target.codebook;
  same.tree = &search_tree(*target.codebook);
  same.cbits = cbits;
  for_each_run(pool, (op.num_tokens() - skipped) * heads, [&](std::size_t begin, std::size_t end) {
    const std::size_t first = begin + skipped * heads;
    std::uint8_t* packed[kRowsPerTask];
    std::uint8_t* codes[kRowsPerTask];
    float* row_norms[kRowsPerTask];
    std::uint8_t uncut[kRowsPerTask][kMaxHeadDim];
    EncodeTask task = same;
    task.src = target.src.data<const float>() + first * head_dim;
    task.rows = end - begin;
    task.codes = codes;
    task.norms = row_norms;
    for (std::size_t i = 0; i < task.rows; ++i) {
      const std::size_t row = first + i;
      const std::size_t slot = slot_of(std::uint64_t{args.write_pos} + row / heads, args);
      const std::size_t at = row % heads * args.cache_capacity + slot;
      packed[i] = target.packed.data<std::uint8_t>() + at * bytes;
      codes[i] = cut ? uncut[i] : packed[i];
      row_norms[i] = target.norms.data<float>() + at * norms;
    }
    const std::uint32_t refused = encode(task);
    for (std::size_t i = 0; i < task.rows; ++i) {
      if (refused >> i & 1) {
        bad_rows.report(first + i);
      } else if (cut) {
        pack_row(codes[i], head_dim, cbits, packed[i]);
      }
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
  const IsaKernel& kernel = attend_kernel();
  const auto transform = op.kind == Fwht::kPremult ? kernel.rotate
                         : op.kind == Fwht::kUndo  ? kernel.unrotate
                                                   : transform_row;
  for_each_row(pool, op.data.size() / head_dim,
               [&](std::size_t row) { transform(op.data.data<float>() + row * head_dim, head_dim); });
}

}  // namespace tq_hb
