#include "cpu/attend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/codec.h"
#include "cpu/isa.h"

namespace tq_hb {
namespace {

constexpr std::size_t kMinRange = 128;
constexpr std::size_t kMaxRange = 1024;
// Enough units of work for many threads to share evenly, few enough that merging them costs nothing.
constexpr std::size_t kTargetUnits = 64;

/// Keys per range. Depends on the shape alone, so the bits do not depend on the number of threads.
std::size_t range_length(std::size_t visible, std::size_t num_kv_heads) {
  const std::size_t wanted = (visible * num_kv_heads + kTargetUnits - 1) / kTargetUnits;
  const std::size_t clamped = std::min(std::max(wanted, kMinRange), kMaxRange);
  return (clamped + kAttendTile - 1) / kAttendTile * kAttendTile;
}

/// The codebook repeated over all 256 byte values: indices above its width wrap.
struct LevelTable {
  explicit LevelTable(const Codebook& codebook) {
    for (unsigned code = 0; code < 256; ++code) levels[code] = codebook.levels[code & (codebook.num_levels() - 1)];
  }
  alignas(64) float levels[256];
};

/// Visible keys, oldest first: `count` slots from `first_slot` on, wrapping at the capacity.
struct VisibleKeys {
  explicit VisibleKeys(const TqFlashAttnVecArgs& args) {
    const std::uint64_t held = args.kv_seq_len;
    const bool windowed = args.mask_type == 2 && args.sliding_window < held;
    count = windowed ? args.sliding_window : held;
    first_slot = (std::uint64_t{args.ring_start} + (held - count)) % args.kv_capacity;
  }
  std::size_t count;
  std::size_t first_slot;
};

/// Copies a query head, rotated if asked, scaled by a power of two so that nothing can overflow.
///
/// Returns what undoes that scaling, or NaN if the query is not finite.
double prepare_query(const float* q, std::size_t head_dim, bool rotate, float* out) noexcept {
  if (!is_finite_row(q, head_dim)) return std::numeric_limits<double>::quiet_NaN();
  float largest = 0.0f;
  for (std::size_t j = 0; j < head_dim; ++j) largest = std::max(largest, std::fabs(q[j]));
  // Clamped so that the factor itself is a normal float32.
  const int exponent = largest > 0.0f ? std::clamp(std::ilogb(largest), -126, 126) : 0;
  const float factor = std::ldexp(1.0f, -exponent);
  for (std::size_t j = 0; j < head_dim; ++j) out[j] = q[j] * factor;
  if (rotate) rotate_row(out, head_dim);
  return std::ldexp(1.0, exponent);
}

struct Partials {
  std::vector<double> max, sum;  // [kv head][range][group]
  std::vector<float> out;        // [kv head][range][group][head_dim]
};

/// Merges the ranges of query head `g` of KV head `kv_head` into `out`.
void merge_ranges(const Partials& partials, std::size_t kv_head, std::size_t ranges, std::size_t group, std::size_t g,
                  std::size_t head_dim, float* out) noexcept {
  const std::size_t first = kv_head * ranges * group + g;
  double max = partials.max[first];
  for (std::size_t r = 1; r < ranges; ++r) max = std::max(max, partials.max[first + r * group]);
  double sum = 0.0;
  std::memset(out, 0, head_dim * sizeof(float));
  for (std::size_t r = 0; r < ranges; ++r) {
    const std::size_t at = first + r * group;
    const float weight = std::exp(static_cast<float>(partials.max[at] - max));
    sum += partials.sum[at] * static_cast<double>(weight);
    const float* partial = partials.out.data() + at * head_dim;
    for (std::size_t j = 0; j < head_dim; ++j) out[j] += weight * partial[j];
  }
  const float inverse = static_cast<float>(1.0 / sum);
  for (std::size_t j = 0; j < head_dim; ++j) out[j] *= inverse;
}

}  // namespace

void attend(const AttendOp& op, ThreadPool& pool, BadRows& bad_rows) {
  const TqFlashAttnVecArgs& args = op.args;
  const std::size_t head_dim = args.head_dim;
  const std::size_t num_heads = args.num_heads;
  const std::size_t num_kv_heads = args.num_kv_heads;
  const std::size_t group = num_heads / num_kv_heads;
  const std::size_t capacity = args.kv_capacity;
  const std::size_t norms = norms_per_row(head_dim);
  const VisibleKeys visible(args);
  const std::size_t range = range_length(visible.count, num_kv_heads);
  const std::size_t ranges = (visible.count + range - 1) / range;

  // A K row is levels * decode_factor(norm), so this is the norm's constant part.
  const float row_scale = decode_factor(1.0f, head_dim, args.scale_factor_d512);
  std::vector<float> q(num_heads * head_dim);
  std::vector<double> q_scale(num_heads);
  for (std::size_t h = 0; h < num_heads; ++h) {
    const double undo = prepare_query(op.q.data<const float>() + h * head_dim, head_dim, args.fuse_fwht_pre == 1,
                                      q.data() + h * head_dim);
    q_scale[h] = undo * static_cast<double>(args.scale) * static_cast<double>(row_scale);
  }

  const LevelTable k_levels(*op.k_codebook);
  const LevelTable v_levels(*op.v_codebook);
  const std::size_t units = num_kv_heads * ranges;
  Partials partials;
  partials.max.resize(units * group);
  partials.sum.resize(units * group);
  partials.out.resize(units * group * head_dim);
  std::vector<double> scores(units * group * kAttendTile);
  const IsaKernel& kernel = attend_kernel();

  pool.parallel_for(units, [&](std::size_t unit) {
    const std::size_t kv_head = unit / ranges;
    const std::size_t first = unit % ranges * range;
    AttendTask task;
    task.q = q.data() + kv_head * group * head_dim;
    task.q_scale = q_scale.data() + kv_head * group;
    task.k = {op.k_packed.data<const std::uint8_t>() + kv_head * capacity * head_dim,
              op.k_norms.data<const float>() + kv_head * capacity * norms, k_levels.levels};
    task.v = {op.v_packed.data<const std::uint8_t>() + kv_head * capacity * head_dim,
              op.v_norms.data<const float>() + kv_head * capacity * norms, v_levels.levels};
    task.group = group;
    task.head_dim = head_dim;
    task.first_slot = (visible.first_slot + first) % capacity;
    task.count = std::min(range, visible.count - first);
    task.capacity = capacity;
    task.softcap = static_cast<double>(args.softcap);
    task.v_scale = row_scale;
    task.scratch_scores = scores.data() + unit * group * kAttendTile;
    task.max = partials.max.data() + unit * group;
    task.sum = partials.sum.data() + unit * group;
    task.out = partials.out.data() + unit * group * head_dim;
    kernel.run(task);
  });

  pool.parallel_for(num_heads, [&](std::size_t h) {
    if (std::isnan(q_scale[h])) {
      bad_rows.report(h);
      return;
    }
    float* out = op.output.data<float>() + h * head_dim;
    merge_ranges(partials, h / group, ranges, group, h % group, head_dim, out);
    if (op.fused_undo) unrotate_row(out, head_dim);
  });
}

}  // namespace tq_hb
