#include "metal/pipeline_key.h"

#include "core/layout.h"
#include "core/ops.h"
#include "core/params.h"
#include "metal/kernels/attend_layout.h"
#include "metal/kernels/row_shape.h"

namespace tq_hb {
namespace {

#define TQ_CHECK(head_dim) static_assert(norm_blocks(head_dim) == norms_per_row(head_dim), "one rule for norms");
TQ_HB_FOR_EACH_HEAD_DIM(TQ_CHECK)
#undef TQ_CHECK

const char* name_prefix(Kernel kernel) noexcept {
  switch (kernel) {
    case Kernel::kFwhtPremult:
      return kernel_prefix(Fwht::kPremult);
    case Kernel::kFwhtUndo:
      return kernel_prefix(Fwht::kUndo);
    case Kernel::kFwhtPlain:
      return kernel_prefix(Fwht::kPlain);
    case Kernel::kQuantize:
      return "hadamard_quantize_kv_hb_d";
    case Kernel::kQuantizeDual:
      return "hadamard_quantize_kv_hb_dual_d";
    case Kernel::kDequantize:
      return "tq_dequantize_hb_kv";
    case Kernel::kAttend:
      return "flash_attn_vec_tq_hb_dk";
    case Kernel::kReduce:
      return "flash_attn_vec_reduce_dk";
    case Kernel::kReduceUndo:
      return "flash_attn_vec_reduce_tq_hb_undo_dk";
    case Kernel::kGroup2:
      return "flash_attn_vec_tq_hb_gqa2_dk";
    case Kernel::kGroup4:
      return "flash_attn_vec_tq_hb_gqa4_dk";
    case Kernel::kGroup8:
      return "flash_attn_vec_tq_hb_gqa8_dk";
    case Kernel::kMerge:
      return "flash_attn_vec_merge_tq_hb_dk";
    case Kernel::kMergeUndo:
      break;
  }
  return "flash_attn_vec_merge_tq_hb_undo_dk";
}

}  // namespace

std::size_t PipelineKeyHash::operator()(const PipelineKey& key) const noexcept {
  std::size_t hash = static_cast<std::size_t>(key.kernel);
  hash = hash * 1024 + key.head_dim;
  hash = hash * 16 + key.k_cbits;
  hash = hash * 16 + key.v_cbits;
  hash = hash * 2 + (key.direct ? 1 : 0);
  return hash * 2 + (key.plane ? 1 : 0);
}

std::string kernel_name(const PipelineKey& key) {
  const std::string prefix = name_prefix(key.kernel);
  return key.head_dim == 0 ? prefix : prefix + std::to_string(key.head_dim);
}

unsigned max_threads(const PipelineKey& key) noexcept {
  switch (key.kernel) {
    case Kernel::kAttend:
      return 32 * kMaxNsg;
    case Kernel::kReduce:
    case Kernel::kReduceUndo:
      return 32 * kMaxNwg;
    case Kernel::kGroup2:
    case Kernel::kGroup4:
    case Kernel::kGroup8:
      return 32 * group_simdgroups(key.head_dim);
    case Kernel::kMerge:
    case Kernel::kMergeUndo:
      return 32 * kMergeSimdgroups;
    default:
      return 32;
  }
}

std::vector<PipelineKey> all_pipelines(const std::vector<unsigned>& cbits) {
  struct Format {
    unsigned k, v;
    bool plane;
  };
  std::vector<Format> formats;
  std::vector<PipelineKey> keys;
  for (const bool plane : {false, true}) {
    for (const unsigned k : cbits) {
      if (plane && k == 8) continue;
      keys.push_back({Kernel::kDequantize, 0, k, k, false, plane});
    }
    for (const unsigned k : cbits) {
      for (const unsigned v : cbits) {
        if (!plane || k < 8 || v < 8) formats.push_back({k, v, plane});
      }
    }
  }
#define TQ_ADD(head_dim)                                                                                    \
  for (const Kernel kernel : {Kernel::kFwhtPremult, Kernel::kFwhtUndo, Kernel::kFwhtPlain, Kernel::kReduce, \
                              Kernel::kReduceUndo, Kernel::kMerge, Kernel::kMergeUndo}) {                   \
    keys.push_back({kernel, head_dim});                                                                     \
  }                                                                                                         \
  for (const Format& format : formats) {                                                                    \
    const auto [k, v, plane] = format;                                                                      \
    if (k == v) keys.push_back({Kernel::kQuantize, head_dim, k, k, false, plane});                          \
    keys.push_back({Kernel::kAttend, head_dim, k, v, true, plane});                                         \
    for (const Kernel kernel :                                                                              \
         {Kernel::kQuantizeDual, Kernel::kAttend, Kernel::kGroup2, Kernel::kGroup4, Kernel::kGroup8}) {     \
      keys.push_back({kernel, head_dim, k, v, false, plane});                                               \
    }                                                                                                       \
  }
  TQ_HB_FOR_EACH_HEAD_DIM(TQ_ADD)
#undef TQ_ADD
  return keys;
}

}  // namespace tq_hb
