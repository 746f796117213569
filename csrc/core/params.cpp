#include "core/params.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "core/checked.h"
#include "core/layout.h"

namespace tq_hb {
namespace {

void check_scale_factor(const std::string& op, float value) {
  if (!std::isfinite(value) || value <= 0.0f || !std::isfinite(1.0f / value)) {
    throw invalid(op, "scale_factor_d512", "must be finite and > 0, and so must its reciprocal", value);
  }
}

void check_codebook_bits(const std::string& op, TqU32 cbits) {
  find_codebook(op, CodebookName::kLloydMax, cbits);
}

void check_codebook(const std::string& op, const Codebook* codebook) {
  if (codebook == nullptr) throw invalid(op, "codebook", "must be given", "none");
}

void check_buffer(const std::string& op, const std::string& field, const Buffer& buffer, DType dtype,
                  const Device* device) {
  if (buffer.storage() == nullptr) throw invalid(op, field, "must be given", "no buffer");
  if (buffer.device() != device) throw invalid(op, field, "must be a buffer of this device", "one of another device");
  if (buffer.dtype() != dtype) {
    throw invalid(op, field, std::string("must have dtype ") + name_of(dtype), name_of(buffer.dtype()));
  }
}

void check_buffer(const std::string& op, const std::string& field, const Buffer& buffer, DType dtype,
                  const Shape& shape, const Device* device) {
  check_buffer(op, field, buffer, dtype, device);
  if (buffer.shape() != shape) {
    throw invalid(op, field, "must have shape " + to_string(shape), to_string(buffer.shape()));
  }
}

Shape norms_shape(std::uint64_t num_kv_heads, std::uint64_t capacity, std::uint64_t head_dim) {
  Shape shape{num_kv_heads, capacity};
  if (norms_per_row(head_dim) > 1) shape.push_back(norms_per_row(head_dim));
  return shape;
}

Shape packed_shape(std::uint64_t num_kv_heads, std::uint64_t capacity, std::uint64_t head_dim, Packing packing,
                   const Codebook& codebook) {
  return {num_kv_heads, capacity, row_bytes(packing, codebook.cbits, head_dim)};
}

struct Named {
  std::string field;
  const Buffer* buffer;
};

/// The buffers that an attention call may have: their fields, and whether there is one value per head and query.
std::vector<std::pair<Named, bool>> optional_inputs(const AttendOp& op) {
  std::vector<std::pair<Named, bool>> inputs;
  if (op.sinks) inputs.push_back({{"sinks", &*op.sinks}, false});
  if (op.score_bias) inputs.push_back({{"score_bias", &*op.score_bias}, true});
  return inputs;
}

/// How many queries there are and where they stand.
void check_queries(const AttendOp& op) {
  const std::uint64_t queries = op.num_queries();
  if (queries == 0) throw invalid(op.name, "q", "must hold at least one query", 0);
  const std::uint64_t position = op.query_position ? *op.query_position : std::uint64_t{op.args.kv_seq_len} - 1;
  if (queries - 1 > position) {
    throw invalid(op.name, "q", "must hold at most " + std::to_string(position + 1) + " queries, one per position",
                  queries);
  }
}

/// How the work is shared out: the kernel, its tile and the number of splits.
void check_split(const AttendOp& op, const Device* device) {
  if (!device->offers(op.kernel, op.args.head_dim, op.packing, op.k_codebook->cbits, op.v_codebook->cbits)) {
    throw unsupported(op.name, "the group kernel on " + device->backend() + " for rows of this size and packing");
  }
  const bool is_group = op.kernel == AttendKernel::kGroup;
  const unsigned max_nwg = is_group ? TQ_GQA_MAX_SPLITS : kMaxNwg;
  if (op.args.nwg == 0 || op.args.nwg > max_nwg) {
    throw invalid(op.name, "nwg", "must be from 1 to " + std::to_string(max_nwg), op.args.nwg);
  }
  if (is_group && op.head_tile != 2 && op.head_tile != 4 && op.head_tile != 8) {
    throw invalid(op.name, "head_tile", "must be 2, 4 or 8", op.head_tile);
  }
}

void check_disjoint(const std::string& op, const Named& a, const Named& b) {
  if (a.buffer->overlaps(*b.buffer)) {
    throw invalid(op, a.field, "must not overlap " + b.field, "shared memory");
  }
}

}  // namespace

void check_head_dim(const std::string& op, std::uint64_t head_dim) {
#define TQ_ACCEPT(size) \
  if (head_dim == size) return;
  TQ_HB_FOR_EACH_HEAD_DIM(TQ_ACCEPT)
#undef TQ_ACCEPT
  throw invalid(op, "head_dim", "must be 64, 128, 256 or 512", head_dim);
}

void validate(const std::string& op, const TqFlashAttnVecArgs& args) {
  check_head_dim(op, args.head_dim);
  if (args.num_heads == 0) throw invalid(op, "num_heads", "must be > 0", args.num_heads);
  if (args.num_kv_heads == 0) throw invalid(op, "num_kv_heads", "must be > 0", args.num_kv_heads);
  if (args.num_heads % args.num_kv_heads != 0) {
    throw invalid(op, "num_heads", "must be a multiple of num_kv_heads (num_heads % num_kv_heads != 0)",
                  std::to_string(args.num_heads) + " and " + std::to_string(args.num_kv_heads));
  }
  if (args.kv_seq_len == 0) throw invalid(op, "kv_seq_len", "must be > 0", args.kv_seq_len);
  if (args.kv_capacity < args.kv_seq_len) {
    throw invalid(op, "kv_capacity", "must be >= kv_seq_len " + std::to_string(args.kv_seq_len), args.kv_capacity);
  }
  check_codebook_bits(op, args.codebook_bits);
  if (args.nsg == 0 || (args.nsg & (args.nsg - 1)) != 0) throw invalid(op, "nsg", "must be a power of two", args.nsg);
  if (args.nsg > kMaxNsg) throw invalid(op, "nsg", "must be 1, 2 or 4 (kernel reduce cap)", args.nsg);
  if (args.mask_type > 2) throw invalid(op, "mask_type", "must be 0, 1 or 2", args.mask_type);
  if (args.mask_type == 2 && args.sliding_window == 0) {
    throw invalid(op, "sliding_window", "must be >= 1 when mask_type is 2", args.sliding_window);
  }
  if (args.ring_start >= args.kv_capacity) {
    throw invalid(op, "ring_start", "must be < kv_capacity " + std::to_string(args.kv_capacity), args.ring_start);
  }
  if (args.ring_start != 0 && args.kv_seq_len != args.kv_capacity) {
    throw invalid(op, "ring_start", "must be 0 unless the ring is full (kv_seq_len == kv_capacity)", args.ring_start);
  }
  if (!std::isfinite(args.scale)) throw invalid(op, "scale", "must be finite", args.scale);
  if (!std::isfinite(args.softcap) || args.softcap < 0.0f) {
    throw invalid(op, "softcap", "must be finite and >= 0", args.softcap);
  }
  // A GPU may take what is smaller for 0, which is no cap.
  if (args.softcap != 0.0f && args.softcap < std::numeric_limits<float>::min()) {
    throw invalid(op, "softcap", "must be 0 or at least 1.2e-38, a normal float32", args.softcap);
  }
  check_scale_factor(op, args.scale_factor_d512);
  if (args.fuse_fwht_pre > 1) throw invalid(op, "fuse_fwht_pre", "must be 0 or 1", args.fuse_fwht_pre);
}

void validate(const std::string& op, const TqHadamardQuantizeArgs& args) {
  check_head_dim(op, args.head_dim);
  if (args.num_kv_heads == 0) throw invalid(op, "num_kv_heads", "must be > 0", args.num_kv_heads);
  if (args.cache_capacity == 0) throw invalid(op, "cache_capacity", "must be > 0", args.cache_capacity);
  if (args.is_sliding > 1) throw invalid(op, "is_sliding", "must be 0 or 1", args.is_sliding);
  check_scale_factor(op, args.scale_factor_d512);
  check_codebook_bits(op, args.codebook_bits);
}

void validate(const AttendOp& op, const Device* device) {
  const TqFlashAttnVecArgs& args = op.args;
  validate(op.name, args);
  check_codebook(op.name, op.k_codebook);
  check_codebook(op.name, op.v_codebook);
  check_split(op, device);
  if (op.k_codebook->name != op.v_codebook->name) {
    throw invalid(op.name, "codebook", "must be the same for K and V", "two");
  }

  const Shape& q_shape = op.q.shape();
  check_queries(op);
  Shape per_head{args.num_heads};
  if (q_shape.size() == 3) per_head.insert(per_head.begin(), q_shape[0]);
  Shape wanted = per_head;
  wanted.push_back(args.head_dim);
  check_buffer(op.name, "q", op.q, DType::kFloat32, wanted, device);

  const Shape k_packed = packed_shape(args.num_kv_heads, args.kv_capacity, args.head_dim, op.packing, *op.k_codebook);
  const Shape v_packed = packed_shape(args.num_kv_heads, args.kv_capacity, args.head_dim, op.packing, *op.v_codebook);
  const Shape norms = norms_shape(args.num_kv_heads, args.kv_capacity, args.head_dim);
  check_buffer(op.name, "k_packed", op.k_packed, DType::kUint8, k_packed, device);
  check_buffer(op.name, "k_norms", op.k_norms, DType::kFloat32, norms, device);
  check_buffer(op.name, "v_packed", op.v_packed, DType::kUint8, v_packed, device);
  check_buffer(op.name, "v_norms", op.v_norms, DType::kFloat32, norms, device);
  check_buffer(op.name, "output", op.output, DType::kFloat32, wanted, device);

  std::vector<Named> inputs{{"q", &op.q},
                            {"k_packed", &op.k_packed},
                            {"k_norms", &op.k_norms},
                            {"v_packed", &op.v_packed},
                            {"v_norms", &op.v_norms}};
  for (const auto& [input, is_per_query] : optional_inputs(op)) {
    check_buffer(op.name, input.field, *input.buffer, DType::kFloat32, is_per_query ? per_head : Shape{args.num_heads},
                 device);
    inputs.push_back(input);
  }
  const Named output{"output", &op.output};
  for (const Named& input : inputs) check_disjoint(op.name, output, input);
  if (op.lse) {
    check_buffer(op.name, "lse", *op.lse, DType::kFloat32, per_head, device);
    const Named lse{"lse", &*op.lse};
    for (const Named& input : inputs) check_disjoint(op.name, lse, input);
    check_disjoint(op.name, lse, output);
    inputs.push_back(lse);
  }
  if (op.tmp) {
    check_buffer(op.name, "tmp", *op.tmp, DType::kFloat32, device);
    const std::uint64_t splits = std::max(args.nwg, kMaxNwg);
    const std::uint64_t needed = tmp_buffer_bytes(args.num_heads, args.head_dim, op.num_queries(), splits);
    if (op.tmp->nbytes() < needed) {
      throw invalid(op.name, "tmp", "must hold at least " + std::to_string(needed) + " bytes", op.tmp->nbytes());
    }
    const Named tmp{"tmp", &*op.tmp};
    for (const Named& input : inputs) check_disjoint(op.name, tmp, input);
    check_disjoint(op.name, tmp, output);
  }
}

void validate(const QuantizeOp& op, const Device* device) {
  const TqHadamardQuantizeArgs& args = op.args;
  validate(op.name, args);
  if (op.targets.empty()) throw invalid(op.name, "targets", "must be at least one", 0);
  const Shape norms = norms_shape(args.num_kv_heads, args.cache_capacity, args.head_dim);
  for (const QuantizeTarget& target : op.targets) {
    check_codebook(op.name, target.codebook);
    const Shape packed =
        packed_shape(args.num_kv_heads, args.cache_capacity, args.head_dim, op.packing, *target.codebook);
    const Shape& src = target.src.shape();
    Shape wanted{args.num_kv_heads, args.head_dim};
    if (src.size() == 3) wanted.insert(wanted.begin(), src.front());
    check_buffer(op.name, target.src_name(), target.src, DType::kFloat32, wanted, device);
    check_buffer(op.name, target.packed_name(), target.packed, DType::kUint8, packed, device);
    check_buffer(op.name, target.norms_name(), target.norms, DType::kFloat32, norms, device);
    if (src.size() != op.targets.front().src.shape().size() || src.front() != op.targets.front().src.shape().front()) {
      throw invalid(op.name, target.src_name(), "must have the shape of " + op.targets.front().src_name(),
                    to_string(src));
    }
    if (args.is_sliding == 0 && args.write_pos + op.num_tokens() > args.cache_capacity) {
      throw invalid(op.name, "write_pos",
                    "plus the " + std::to_string(op.num_tokens()) + " token(s) written must be <= cache_capacity " +
                        std::to_string(args.cache_capacity) + " unless is_sliding is 1",
                    args.write_pos);
    }
  }
  std::vector<Named> written;
  for (const QuantizeTarget& target : op.targets) {
    written.push_back({target.packed_name(), &target.packed});
    written.push_back({target.norms_name(), &target.norms});
  }
  for (std::size_t i = 0; i < written.size(); ++i) {
    for (const QuantizeTarget& target : op.targets)
      check_disjoint(op.name, written[i], {target.src_name(), &target.src});
    for (std::size_t j = i + 1; j < written.size(); ++j) check_disjoint(op.name, written[i], written[j]);
  }
}

void validate(const DequantizeOp& op, const Device* device) {
  const TqHadamardQuantizeArgs& args = op.args;
  validate(op.name, args);
  check_codebook(op.name, op.codebook);
  check_buffer(op.name, "packed", op.packed, DType::kUint8,
               packed_shape(args.num_kv_heads, args.cache_capacity, args.head_dim, op.packing, *op.codebook), device);
  check_buffer(op.name, "norms", op.norms, DType::kFloat32,
               norms_shape(args.num_kv_heads, args.cache_capacity, args.head_dim), device);
  const std::uint64_t tokens = op.num_tokens();
  Shape wanted{args.num_kv_heads, args.head_dim};
  if (op.output.shape().size() == 3) wanted.insert(wanted.begin(), tokens);
  check_buffer(op.name, "output", op.output, DType::kFloat32, wanted, device);
  const std::uint64_t capacity = args.cache_capacity;
  if (tokens > capacity) {
    throw invalid(op.name, "output", "must hold at most cache_capacity " + std::to_string(capacity) + " tokens",
                  tokens);
  }
  if (args.is_sliding == 0 && op.first_position > capacity - tokens) {
    throw invalid(op.name, "pos",
                  "plus the " + std::to_string(tokens) + " token(s) read must be <= cache_capacity " +
                      std::to_string(capacity) + " unless is_sliding is 1",
                  op.first_position);
  }
  check_disjoint(op.name, {"output", &op.output}, {"packed", &op.packed});
  check_disjoint(op.name, {"output", &op.output}, {"norms", &op.norms});
}

void validate(const FwhtOp& op, const Device* device) {
  check_buffer(op.name, "x", op.data, DType::kFloat32, device);
  if (op.data.shape().empty()) throw invalid(op.name, "x", "must have head_dim as its last axis", "a scalar");
  check_head_dim(op.name, op.data.shape().back());
}

std::uint64_t tmp_buffer_bytes(std::uint64_t num_heads, std::uint64_t head_dim, std::uint64_t num_queries,
                               std::uint64_t splits) {
  const std::string op = "tmp_buffer_bytes";
  check_head_dim(op, head_dim);
  if (num_heads == 0) throw invalid(op, "num_heads", "must be > 0", num_heads);
  if (num_queries == 0) throw invalid(op, "num_queries", "must be > 0", num_queries);
  if (splits == 0) throw invalid(op, "splits", "must be > 0", splits);
  return checked_product(op, "size", {num_queries, num_heads, splits, head_dim + 2, sizeof(float)});
}

}  // namespace tq_hb
