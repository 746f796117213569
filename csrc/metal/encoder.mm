// Turns ops into launches. What can fail happens before an op's first launch, so that none is half encoded.

#include "metal/encoder.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "core/device.h"
#include "core/layout.h"
#include "core/params.h"
#include "metal/bad_rows.h"
#include "metal/command_stream.h"
#include "metal/kernels/attend_layout.h"
#include "metal/kernels/slots.h"
#include "metal/scratch.h"
#include "metal/storage.h"

namespace tq_hb {
namespace {

void check_aligned(const std::string& op, const std::string& field, const Buffer& rows,
                   std::uint64_t alignment = kRowAlignment) {
  if (rows.offset() % alignment == 0) return;
  throw invalid(op, field, "must start at a multiple of " + std::to_string(alignment) + " bytes in its storage",
                rows.offset());
}

/// Whether the pipeline is one for planes.
bool uses_planes(Packing packing, unsigned k_cbits, unsigned v_cbits) {
  return has_planes(packing, k_cbits) || has_planes(packing, v_cbits);
}

/// Kernels count rows in 32 bits, and one value is taken.
TqU32 checked_rows(const std::string& op, std::uint64_t rows) {
  if (rows >= std::numeric_limits<TqU32>::max()) throw unsupported(op, std::to_string(rows) + " rows in one call");
  return static_cast<TqU32>(rows);
}

Kernel group_kernel(unsigned head_tile) noexcept {
  return head_tile == 2 ? Kernel::kGroup2 : head_tile == 4 ? Kernel::kGroup4 : Kernel::kGroup8;
}

Kernel merge_kernel(const AttendOp& op) noexcept {
  if (op.kernel == AttendKernel::kGroup) return op.fused_undo ? Kernel::kMergeUndo : Kernel::kMerge;
  return op.fused_undo ? Kernel::kReduceUndo : Kernel::kReduce;
}

Kernel fwht_kernel(Fwht kind) noexcept {
  switch (kind) {
    case Fwht::kPremult:
      return Kernel::kFwhtPremult;
    case Fwht::kUndo:
      return Kernel::kFwhtUndo;
    case Fwht::kPlain:
      break;
  }
  return Kernel::kFwhtPlain;
}

class MetalEncoder final : public CommandEncoder {
 public:
  MetalEncoder(const Device* device, const std::shared_ptr<MetalContext>& context, bool auto_barrier)
      : CommandEncoder(device, auto_barrier),
        context_(context),
        stream_(context),
        scratch_(device, context),
        bad_rows_(device, context) {}

 private:
  struct Pipeline {
    std::string name;
    id<MTLComputePipelineState> state;
  };

  Pipeline pipeline(const PipelineKey& key) { return {kernel_name(key), context_->pipelines().get(key)}; }

  void launch(const Pipeline& pipeline, NodeKind kind, const Size3& threadgroups, const Size3& threads,
              std::uint64_t threadgroup_bytes = 0) {
    stream_.dispatch(threadgroups, threads, threadgroup_bytes);
    note({kind, pipeline.name, threadgroups, threads, threadgroup_bytes});
  }

  void encode(QuantizeOp op) override {
    for (const QuantizeTarget& target : op.targets) {
      check_aligned(op.name, target.src_name(), target.src);
      check_aligned(op.name, target.packed_name(), target.packed, kCodesAlignment);
    }
    TqHadamardQuantizeArgs args = op.args;
    const std::uint64_t tokens = op.num_tokens();
    const std::uint64_t skipped = op.num_skipped();
    checked_rows(op.name, (tokens - skipped) * args.num_kv_heads);
    if (tokens == 0) return;
    if (args.is_sliding == 1) {
      args.write_pos = static_cast<TqU32>((std::uint64_t{args.write_pos} + skipped) % args.cache_capacity);
    }
    if (skipped > 0) {
      for (QuantizeTarget& target : op.targets) target.src = target.src.slice(skipped, tokens);
    }
    if (op.targets.size() == 1) {
      encode_single(op, args, tokens - skipped, skipped);
    } else {
      encode_dual(op, args, tokens - skipped, skipped);
    }
  }

  void encode_single(const QuantizeOp& op, const TqHadamardQuantizeArgs& args, std::uint64_t tokens,
                     std::uint64_t skipped) {
    const QuantizeTarget& target = op.targets[0];
    const unsigned cbits = target.codebook->cbits;
    const Pipeline quantize =
        pipeline({Kernel::kQuantize, args.head_dim, cbits, cbits, false, uses_planes(op.packing, cbits, cbits)});
    const Buffer status = bad_rows_.watch(op.name, {target.src_name()}, RowRule::kEncodable, args.num_kv_heads,
                                          skipped * args.num_kv_heads);
    stream_.set_pipeline(quantize.state);
    stream_.bind(TQ_QUANTIZE_SRC, target.src);
    stream_.bind(TQ_QUANTIZE_PACKED, target.packed);
    stream_.bind(TQ_QUANTIZE_NORMS, target.norms);
    stream_.bind_bytes(TQ_QUANTIZE_ARGS, args);
    stream_.bind(TQ_QUANTIZE_STATUS, status);
    launch(quantize, NodeKind::kOther, {args.num_kv_heads, tokens, 1}, {32, 1, 1});
  }

  void encode_dual(const QuantizeOp& op, const TqHadamardQuantizeArgs& args, std::uint64_t tokens,
                   std::uint64_t skipped) {
    const QuantizeTarget& k = op.targets[0];
    const QuantizeTarget& v = op.targets[1];
    const unsigned k_cbits = k.codebook->cbits;
    const unsigned v_cbits = v.codebook->cbits;
    const Pipeline quantize = pipeline(
        {Kernel::kQuantizeDual, args.head_dim, k_cbits, v_cbits, false, uses_planes(op.packing, k_cbits, v_cbits)});
    const Buffer status = bad_rows_.watch(op.name, {k.src_name(), v.src_name()}, RowRule::kEncodable, args.num_kv_heads,
                                          skipped * args.num_kv_heads);
    stream_.set_pipeline(quantize.state);
    stream_.bind(TQ_QUANTIZE_DUAL_SRC_K, k.src);
    stream_.bind(TQ_QUANTIZE_DUAL_SRC_V, v.src);
    stream_.bind(TQ_QUANTIZE_DUAL_K_PACKED, k.packed);
    stream_.bind(TQ_QUANTIZE_DUAL_V_PACKED, v.packed);
    stream_.bind(TQ_QUANTIZE_DUAL_K_NORMS, k.norms);
    stream_.bind(TQ_QUANTIZE_DUAL_V_NORMS, v.norms);
    stream_.bind_bytes(TQ_QUANTIZE_DUAL_ARGS, args);
    stream_.bind(TQ_QUANTIZE_DUAL_STATUS, status);
    launch(quantize, NodeKind::kOther, {args.num_kv_heads, tokens, 2}, {32, 1, 1});
  }

  void encode(DequantizeOp op) override {
    check_aligned(op.name, "packed", op.packed, kCodesAlignment);
    check_aligned(op.name, "output", op.output);
    TqHadamardQuantizeArgs args = op.args;
    const std::uint64_t tokens = op.num_tokens();
    checked_rows(op.name, tokens * args.num_kv_heads);
    if (tokens == 0) return;
    args.write_pos = static_cast<TqU32>(op.first_position % args.cache_capacity);
    const unsigned cbits = op.codebook->cbits;
    const Pipeline dequantize =
        pipeline({Kernel::kDequantize, 0, cbits, cbits, false, uses_planes(op.packing, cbits, cbits)});
    stream_.set_pipeline(dequantize.state);
    stream_.bind(TQ_DEQUANTIZE_PACKED, op.packed);
    stream_.bind(TQ_DEQUANTIZE_NORMS, op.norms);
    stream_.bind(TQ_DEQUANTIZE_OUTPUT, op.output);
    stream_.bind_bytes(TQ_DEQUANTIZE_ARGS, args);
    launch(dequantize, NodeKind::kOther, {args.num_kv_heads, tokens, 1}, {32, 1, 1});
  }

  void encode(AttendOp op) override {
    check_aligned(op.name, "q", op.q);
    check_aligned(op.name, "k_packed", op.k_packed, kCodesAlignment);
    check_aligned(op.name, "v_packed", op.v_packed, kCodesAlignment);
    check_aligned(op.name, "output", op.output);
    if (op.tmp) check_aligned(op.name, "tmp", *op.tmp);
    const TqFlashAttnVecArgs& args = op.args;
    const bool is_group = op.kernel == AttendKernel::kGroup;
    checked_rows(op.name, std::uint64_t{args.num_queries} * args.num_heads);
    const bool direct = !is_group && args.nwg == 1 && !op.fused_undo && !op.sinks && !op.lse;
    const unsigned k_cbits = op.k_codebook->cbits;
    const unsigned v_cbits = op.v_codebook->cbits;
    const Pipeline attend = pipeline({is_group ? group_kernel(op.head_tile) : Kernel::kAttend, args.head_dim, k_cbits,
                                      v_cbits, direct, uses_planes(op.packing, k_cbits, v_cbits)});
    if (direct) {
      const Buffer status = bad_rows_.watch(op.name, {"q"}, RowRule::kFinite, args.num_heads, 0);
      bind_attend(attend, op, op.output);
      stream_.bind(TQ_ATTEND_STATUS, status);
      launch_attend(attend, op);
      return;
    }
    const Pipeline merge = pipeline({merge_kernel(op), args.head_dim});
    std::shared_ptr<Storage> own_tmp;
    if (!op.tmp) own_tmp = scratch_.take(tmp_buffer_bytes(args.num_heads, args.head_dim, args.num_queries, args.nwg));
    const Buffer tmp = op.tmp ? *op.tmp : Buffer(own_tmp, DType::kUint8, {own_tmp->size()});
    const Buffer status = bad_rows_.watch(op.name, {"q"}, RowRule::kFinite, args.num_heads, 0);
    bind_attend(attend, op, tmp);
    stream_.bind(TQ_ATTEND_STATUS, status);
    launch_attend(attend, op);
    barrier();
    merge_partials(merge, op, tmp, status);
    if (own_tmp != nullptr) scratch_.release(std::move(own_tmp));
  }

  void bind_attend(const Pipeline& attend, const AttendOp& op, const Buffer& dst) {
    stream_.set_pipeline(attend.state);
    stream_.bind_bytes(TQ_ATTEND_ARGS, op.args);
    stream_.bind(TQ_ATTEND_Q, op.q);
    stream_.bind(TQ_ATTEND_K_PACKED, op.k_packed);
    stream_.bind(TQ_ATTEND_K_NORMS, op.k_norms);
    stream_.bind(TQ_ATTEND_V_PACKED, op.v_packed);
    stream_.bind(TQ_ATTEND_V_NORMS, op.v_norms);
    stream_.bind(TQ_ATTEND_DST, dst);
    // Something has to be bound where there is no bias; it is not read.
    stream_.bind(TQ_ATTEND_SCORE_BIAS, op.score_bias ? *op.score_bias : op.q);
  }

  void launch_attend(const Pipeline& attend, const AttendOp& op) {
    const TqFlashAttnVecArgs& args = op.args;
    const unsigned k_cbits = op.k_codebook->cbits;
    const unsigned v_cbits = op.v_codebook->cbits;
    if (op.kernel == AttendKernel::kGroup) {
      const std::uint64_t rows = std::uint64_t{args.num_heads} / args.num_kv_heads * args.num_queries;
      const std::uint64_t tiles = rows / op.head_tile + (rows % op.head_tile != 0 ? 1 : 0);
      launch(attend, NodeKind::kSdpa, {tiles, args.num_kv_heads, args.nwg}, {32, group_simdgroups(args.head_dim), 1},
             group_threadgroup_bytes(args.head_dim, op.head_tile, k_cbits, v_cbits));
    } else {
      launch(attend, NodeKind::kSdpa, {args.num_queries, args.num_heads, args.nwg}, {32, args.nsg, 1},
             per_head_threadgroup_bytes(args.head_dim, args.nsg, k_cbits, v_cbits));
    }
  }

  void merge_partials(const Pipeline& merge, const AttendOp& op, const Buffer& tmp, const Buffer& status) {
    const TqFlashAttnVecArgs& args = op.args;
    stream_.set_pipeline(merge.state);
    stream_.bind_bytes(TQ_REDUCE_ARGS, args);
    stream_.bind(TQ_REDUCE_TMP, tmp);
    stream_.bind(TQ_REDUCE_OUTPUT, op.output);
    // Again, something has to be bound; nothing is read or written there.
    stream_.bind(TQ_REDUCE_SINKS, op.sinks ? *op.sinks : tmp);
    stream_.bind(TQ_REDUCE_SCORE_BIAS, op.score_bias ? *op.score_bias : tmp);
    stream_.bind(TQ_REDUCE_LSE, op.lse ? *op.lse : op.output);
    stream_.bind(TQ_REDUCE_STATUS, status);
    stream_.bind(TQ_REDUCE_Q, op.q);
    const std::uint64_t rows = std::uint64_t{args.num_queries} * args.num_heads;
    if (op.kernel == AttendKernel::kGroup) {
      launch(merge, NodeKind::kSdpa, {rows, 1, 1}, {32 * kMergeSimdgroups, 1, 1},
             merge_threadgroup_bytes(args.head_dim));
    } else {
      launch(merge, NodeKind::kSdpa, {rows, 1, 1}, {32 * args.nwg, 1, 1},
             op.fused_undo ? args.head_dim * sizeof(float) : 0);
    }
  }

  void encode(FwhtOp op) override {
    check_aligned(op.name, "x", op.data);
    const std::uint64_t head_dim = op.data.shape().back();
    const TqFwhtArgs args{static_cast<TqU32>(head_dim), checked_rows(op.name, op.data.size() / head_dim)};
    if (args.num_rows == 0) return;
    const Pipeline fwht = pipeline({fwht_kernel(op.kind), args.head_dim});
    stream_.set_pipeline(fwht.state);
    stream_.bind(TQ_FWHT_DATA, op.data);
    stream_.bind_bytes(TQ_FWHT_ARGS, args);
    launch(fwht, NodeKind::kOther, {args.num_rows, 1, 1}, {32, 1, 1});
  }

  void encode_barrier() override {
    stream_.barrier();
    scratch_.after_barrier();
  }

  void submit() override { stream_.commit(); }

  double finish() override {
    double seconds = 0.0;
    try {
      seconds = stream_.wait();
    } catch (const Error& error) {
      throw Error(error.code(), "metal: the GPU failed in one of " + kernel_list() + ": " + error.what());
    }
    bad_rows_.check();
    return seconds;
  }

  /// The names of the kernels launched, each once.
  std::string kernel_list() const {
    std::vector<std::string> names;
    std::string list;
    for (const Node& node : noted()) {
      if (node.kind == NodeKind::kBarrier) continue;
      if (std::find(names.begin(), names.end(), node.kernel) != names.end()) continue;
      names.push_back(node.kernel);
      list += (list.empty() ? "" : ", ") + node.kernel;
    }
    return list;
  }

  std::shared_ptr<MetalContext> context_;
  CommandStream stream_;
  Scratch scratch_;
  BadRowWords bad_rows_;
};

}  // namespace

std::unique_ptr<CommandEncoder> make_metal_encoder(const Device* device, std::shared_ptr<MetalContext> context,
                                                   bool auto_barrier) {
  return std::make_unique<MetalEncoder>(device, context, auto_barrier);
}

}  // namespace tq_hb
