#include "cpu/attend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "core/codec.h"
#include "core/kept_values.h"
#include "core/query_range.h"
#include "cpu/decisive_keys.h"
#include "cpu/int16_levels.h"
#include "cpu/isa.h"

namespace tq_hb {
namespace {

// Shorter ranges are over before another thread has begun, and each costs a partial result.
constexpr std::size_t kMinRange = 256;
constexpr std::size_t kMaxRange = 1024;
// Enough units of work for many threads to share evenly, few enough that merging them costs nothing.
constexpr std::size_t kTargetUnits = 32;
// What a long cache may have: every unit keeps partial results until they are merged.
constexpr std::size_t kMostUnits = 1024;
// Queries that share the decoding of a key. Scratch is kept for these alone, however many there are in all.
constexpr std::size_t kQueryBlock = 8;
// Keeps sums of 2^23 values whose norms are as large as float32 goes finite, also where weights have been corrected and
// are larger than 1; undone when they are divided.
constexpr float kHeadroom = 0x1p-24f;

/// Keys per range. Depends on the shape alone, so the bits do not depend on the number of threads.
std::size_t range_length(std::size_t visible, std::size_t num_kv_heads) {
  const auto share_of = [&](std::size_t units) { return (visible * num_kv_heads + units - 1) / units; };
  const std::size_t longest = std::max(kMaxRange, share_of(kMostUnits));
  const std::size_t clamped = std::min(std::max(share_of(kTargetUnits), kMinRange), longest);
  return (clamped + kAttendTile - 1) / kAttendTile * kAttendTile;
}

bool is_in_int16(const AttendOp& op, const IsaKernel& kernel) {
  return attend_precision(op, kernel) == Precision::kDefault;
}

LevelTable make_level_table(const Codebook& codebook) {
  LevelTable table;
  for (unsigned code = 0; code < 256; ++code) {
    table.levels[code] = codebook.levels[code & (codebook.num_levels() - 1)];
    std::uint32_t bits;
    std::memcpy(&bits, &table.levels[code], sizeof(bits));
    for (unsigned i = 0; i < sizeof(bits); ++i) {
      table.bytes[i][code] = static_cast<std::uint8_t>(bits >> (8 * i) & 0xff);
    }
  }
  return table;
}

const LevelTable& level_table(const Codebook& codebook) {
  static KeptValues<const Codebook*, LevelTable> kept;
  return kept.get(&codebook, [&] { return make_level_table(codebook); });
}

/// K or V of all heads.
class Side {
 public:
  /// In fixed point, too, where the kernel takes that.
  Side(const Buffer& packed, const Buffer& norms, const Codebook& codebook, const AttendOp& op, const IsaKernel& kernel)
      : first_{packed.data<const std::uint8_t>(),
               norms.data<const float>(),
               &level_table(codebook),
               row_bytes(op.packing, codebook.cbits, op.args.head_dim),
               has_planes(op.packing, codebook.cbits) ? codebook.cbits - kNibbleBits : 0,
               codebook.cbits,
               is_in_int16(op, kernel) ? &int16_levels(codebook, kernel.int16_form) : nullptr},
        capacity_(op.args.kv_capacity),
        norms_per_row_(norms_per_row(op.args.head_dim)) {}

  HeadRows head(std::size_t kv_head) const {
    HeadRows rows = first_;
    rows.codes += kv_head * capacity_ * rows.row_bytes;
    rows.norms += kv_head * capacity_ * norms_per_row_;
    return rows;
  }
  const Int16Levels& int16() const { return *first_.int16; }

 private:
  HeadRows first_;
  std::size_t capacity_, norms_per_row_;
};

/// Memory that only ever grows, and is written before it is read, so that nobody has to clear it. It starts on a cache
/// line: the widest vectors would else lie across two each.
template <class T>
class Scratch {
 public:
  void reserve(std::size_t count) {
    if (count <= capacity_) return;
    memory_.reset(static_cast<T*>(::operator new(count * sizeof(T), kCacheLine)));
    capacity_ = count;
  }
  T* operator+(std::size_t i) const noexcept { return memory_.get() + i; }
  T& operator[](std::size_t i) const noexcept { return memory_.get()[i]; }

 private:
  static_assert(std::is_trivially_default_constructible_v<T> && std::is_trivially_destructible_v<T>);
  static constexpr std::align_val_t kCacheLine{64};
  struct Delete {
    void operator()(T* memory) const noexcept { ::operator delete(memory, kCacheLine); }
  };

  std::unique_ptr<T, Delete> memory_;
  std::size_t capacity_ = 0;
};

/// What a thread keeps from call to call, so that only its first of a size allocates.
struct Workspace {
  Scratch<QueryRange> seen;      // [rows of one KV head]
  Scratch<float> q;              // [kv head][rows][head_dim]
  Scratch<double> scale, bias;   // [kv head][rows]; a scale of NaN marks a row that cannot be used
  Scratch<std::int16_t> values;  // of rows in fixed point: see Int16Query
  Scratch<double> units, reach_per_norm;
  Scratch<std::int32_t> halves;
  Scratch<double> max, sum;  // [kv head][range][rows]: partial states
  Scratch<float> out;
  Scratch<RowBlock> blocks;  // [thread][num_blocks(rows)]
  Scratch<NotedKeys> notes;  // where the kernel is in 16 bits
};

/// Up to kQueryBlock consecutive queries. A row is one head of one of them: the rows of a KV head follow each other,
/// query by query, so that they can share its keys.
class QueryBlock {
 public:
  QueryBlock(const AttendOp& op, const Side& k, const Side& v, const IsaKernel& kernel, float row_scale,
             std::size_t first, std::size_t queries, Workspace& memory);

  /// Makes room for so many threads to attend to units.
  void reserve_for(unsigned threads) { memory_.blocks.reserve(threads * num_blocks(rows_)); }
  /// Attends all rows to one range of one KV head's keys, into the partial states.
  void attend_unit(std::size_t unit, unsigned thread);
  std::size_t num_units() const { return kv_heads_ * ranges_; }
  std::size_t num_rows() const { return kv_heads_ * rows_; }

  /// Merges the ranges of one head of one query and writes its results, or reports the query.
  void finish(std::size_t query, std::size_t head, BadRows& bad_rows) const;

 private:
  /// What every row sees of the cache, and the ranges of what any of them sees.
  void set_ranges();
  /// Scales the rows, rotates them if the op asks for it, and puts them into the kernel's order.
  void place_rows();
  /// Puts the rows into fixed point.
  void quantize_rows();
  void reserve_partials();

  /// The first partial state of a row; those of its further ranges follow at distances of rows_.
  std::size_t first_partial(std::size_t row) const { return row / rows_ * ranges_ * rows_ + row % rows_; }
  void merge(std::size_t row, std::size_t head, float* out, float* lse) const;
  /// Corrects a row's sums over all its ranges: see rescore.h. Returns by how much all of its scores are to be raised.
  double rescore(std::size_t row, double max, double* sum, float* out) const;

  const AttendOp& op_;
  const Side &k_, &v_;
  const IsaKernel& kernel_;
  bool in_int16_;
  std::size_t head_dim_, kv_heads_, group_;
  float row_scale_;                 // turns a norm into what a level is multiplied by
  std::size_t first_query_, rows_;  // rows_ of one KV head
  QueryRange keys_;                 // that any of the queries sees
  std::size_t range_, ranges_;      // keys in one, and how many there are
  Workspace& memory_;
};

QueryBlock::QueryBlock(const AttendOp& op, const Side& k, const Side& v, const IsaKernel& kernel, float row_scale,
                       std::size_t first, std::size_t queries, Workspace& memory)
    : op_(op),
      k_(k),
      v_(v),
      kernel_(kernel),
      in_int16_(is_in_int16(op, kernel)),
      head_dim_(op.args.head_dim),
      kv_heads_(op.args.num_kv_heads),
      group_(op.args.num_heads / op.args.num_kv_heads),
      row_scale_(row_scale),
      first_query_(first),
      rows_(queries * group_),
      memory_(memory) {
  set_ranges();
  place_rows();
  if (in_int16_) quantize_rows();
  reserve_partials();
}

void QueryBlock::set_ranges() {
  const TqFlashAttnVecArgs& args = op_.args;
  const TqU32 window = args.mask_type == 2 ? args.sliding_window : 0;
  memory_.seen.reserve(rows_);
  for (std::size_t row = 0; row < rows_; ++row) {
    const std::size_t later = args.num_queries - 1 - (first_query_ + row / group_);
    const TqU32 position = args.query_position - static_cast<TqU32>(later);
    memory_.seen[row] = query_range(position, args.kv_seq_len, window);
  }
  keys_ = {memory_.seen[0].begin, memory_.seen[rows_ - 1].end};
  range_ = range_length(keys_.end - keys_.begin, kv_heads_);
  ranges_ = (keys_.end - keys_.begin + range_ - 1) / range_;
}

void QueryBlock::place_rows() {
  const TqFlashAttnVecArgs& args = op_.args;
  memory_.q.reserve(num_rows() * head_dim_);
  memory_.scale.reserve(num_rows());
  memory_.bias.reserve(num_rows());
  for (std::size_t row = 0; row < num_rows(); ++row) {
    const std::size_t query = first_query_ + row % rows_ / group_;
    const std::size_t at = query * args.num_heads + row / rows_ * group_ + row % group_;
    memory_.bias[row] = op_.score_bias ? static_cast<double>(op_.score_bias->data<const float>()[at]) : 0.0;
    float* placed = memory_.q + row * head_dim_;
    const double undo = kernel_.scale_query(op_.q.data<const float>() + at * head_dim_, head_dim_, placed);
    if (args.fuse_fwht_pre == 1) kernel_.rotate(placed, head_dim_);
    if (!in_int16_ && kernel_.place_query != nullptr) {
      float natural[kMaxHeadDim];
      std::copy_n(placed, head_dim_, natural);
      kernel_.place_query(natural, head_dim_, placed);
    }
    memory_.scale[row] = std::isfinite(memory_.bias[row])
                             ? undo * static_cast<double>(args.scale) * static_cast<double>(row_scale_)
                             : std::numeric_limits<double>::quiet_NaN();
  }
}

void QueryBlock::quantize_rows() {
  // All rows of a block are read, also of those without a meaning.
  memory_.values.reserve((num_rows() + kMostBlockRows - 1) * head_dim_);
  memory_.units.reserve(num_rows() * kMaxNormBlocks);
  memory_.halves.reserve(num_rows() * kMaxNormBlocks);
  memory_.reach_per_norm.reserve(num_rows());
  for (std::size_t row = 0; row < num_rows(); ++row) {
    double* units = memory_.units + row * kMaxNormBlocks;
    const double length =
        kernel_.quantize_query(memory_.q + row * head_dim_, head_dim_, memory_.values + row * head_dim_, units,
                               memory_.halves + row * kMaxNormBlocks);
    memory_.reach_per_norm[row] = length * std::abs(memory_.scale[row]);
    for (std::size_t b = 0; b < norms_per_row(head_dim_); ++b) units[b] *= k_.int16().unit * memory_.scale[row];
  }
}

void QueryBlock::reserve_partials() {
  const std::size_t partials = kv_heads_ * ranges_ * rows_;
  memory_.max.reserve(partials);
  memory_.sum.reserve(partials);
  memory_.out.reserve(partials * head_dim_);
  if (in_int16_) memory_.notes.reserve(partials);
}

void QueryBlock::attend_unit(std::size_t unit, unsigned thread) {
  const std::size_t kv_head = unit / ranges_;
  const std::size_t first = unit % ranges_ * range_;
  const std::size_t capacity = op_.args.kv_capacity;
  AttendTask task;
  task.q = memory_.q + kv_head * rows_ * head_dim_;
  task.q_scale = memory_.scale + kv_head * rows_;
  task.bias = memory_.bias + kv_head * rows_;
  task.has_bias = op_.score_bias.has_value();
  task.seen = memory_.seen + 0;
  task.k = k_.head(kv_head);
  task.v = v_.head(kv_head);
  task.rows = rows_;
  task.head_dim = head_dim_;
  task.first_age = keys_.begin + first;
  task.first_slot = (op_.args.ring_start + task.first_age) % capacity;
  task.count = std::min(range_, keys_.end - task.first_age);
  task.capacity = capacity;
  task.end_age = keys_.end;
  task.fetches_near = prefers_first_level();
  task.softcap = static_cast<double>(op_.args.softcap);
  task.v_scale = row_scale_ * kHeadroom;
  task.blocks = memory_.blocks + thread * num_blocks(rows_);
  task.max = memory_.max + unit * rows_;
  task.sum = memory_.sum + unit * rows_;
  task.out = memory_.out + unit * rows_ * head_dim_;
  if (!in_int16_) return kernel_.attend(task);
  const std::size_t row = kv_head * rows_;
  task.q_int16 = {memory_.values + row * head_dim_, memory_.units + row * kMaxNormBlocks,
                  memory_.halves + row * kMaxNormBlocks, memory_.reach_per_norm + row};
  task.notes = memory_.notes + unit * rows_;
  kernel_.attend_int16(task);
}

void QueryBlock::finish(std::size_t query, std::size_t head, BadRows& bad_rows) const {
  const std::size_t at = (first_query_ + query) * op_.args.num_heads + head;
  const std::size_t row = head / group_ * rows_ + query * group_ + head % group_;
  if (std::isnan(memory_.scale[row])) {
    bad_rows.report(at);
    return;
  }
  merge(row, head, op_.output.data<float>() + at * head_dim_, op_.lse ? op_.lse->data<float>() + at : nullptr);
}

void QueryBlock::merge(std::size_t row, std::size_t head, float* out, float* lse) const {
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  const double sink = op_.sinks ? static_cast<double>(op_.sinks->data<const float>()[head]) : kNone;
  const QueryRange& seen = memory_.seen[row % rows_];
  std::memset(out, 0, head_dim_ * sizeof(float));
  if (seen.begin == seen.end) {
    if (lse != nullptr) *lse = static_cast<float>(sink);
    return;
  }
  const std::size_t first = first_partial(row);
  double max = kNone;
  for (std::size_t r = 0; r < ranges_; ++r) max = std::max(max, memory_.max[first + r * rows_]);
  double sum = 0.0;
  constexpr std::size_t kBlock = 64;
  float weights[kBlock];
  for (std::size_t r = 0; r < ranges_; r += kBlock) {
    const std::size_t count = std::min(kBlock, ranges_ - r), begin = first + r * rows_;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t at = begin + i * rows_;
      // Equal where every score is -infinity, too: a difference of infinities would be NaN.
      weights[i] = memory_.max[at] < max ? std::exp(static_cast<float>(memory_.max[at] - max)) : 1.0f;
      sum += memory_.sum[at] * static_cast<double>(weights[i]);
    }
    kernel_.add_partials(memory_.out + begin * head_dim_, rows_ * head_dim_, weights, count, head_dim_, out);
  }
  if (in_int16_) max += rescore(row, max, &sum, out);
  if (kernel_.order_columns != nullptr) kernel_.order_columns(out, head_dim_);
  // Of the larger of the keys' maximum and the sink, weights are at most 1.
  const double top = std::max(max, sink);
  const double share = std::exp(max - top);
  sum = sum * share + (sink == kNone ? 0.0 : std::exp(sink - top));
  const float factor = static_cast<float>(share / (sum * static_cast<double>(kHeadroom)));
  for (std::size_t j = 0; j < head_dim_; ++j) out[j] *= factor;
  if (op_.fused_undo) kernel_.unrotate(out, head_dim_);
  if (lse != nullptr) *lse = static_cast<float>(top + std::log(sum));
}

double QueryBlock::rescore(std::size_t row, double max, double* sum, float* out) const {
  const ChosenKeys chosen = choose_keys(memory_.notes + first_partial(row), rows_, ranges_, max, *sum);
  // What all scores are raised by matters to a sink and lse alone.
  if (chosen.num_keys == 0 && (chosen.num_references == 0 || !(op_.sinks || op_.lse))) return 0.0;
  const std::size_t kv_head = row / rows_;
  return kernel_.rescore({memory_.q + row * head_dim_, memory_.scale[row], memory_.bias[row],
                          static_cast<double>(op_.args.softcap), k_.head(kv_head), v_.head(kv_head), head_dim_,
                          row_scale_ * kHeadroom, chosen, max, sum, out});
}

}  // namespace

Precision attend_precision(const AttendOp& op, const IsaKernel& kernel) noexcept {
  return kernel.attend_int16 == nullptr ? Precision::kStrict : op.precision;
}

void attend(const AttendOp& op, ThreadPool& pool, BadRows& bad_rows) {
  const IsaKernel& kernel = attend_kernel();
  const Side k(op.k_packed, op.k_norms, *op.k_codebook, op, kernel);
  const Side v(op.v_packed, op.v_norms, *op.v_codebook, op, kernel);
  // A K row is levels * decode_factor(norm), so this is the norm's constant part.
  const float row_scale = decode_factor(1.0f, op.args.head_dim, op.args.scale_factor_d512);
  const std::size_t heads = op.args.num_heads;
  static thread_local Workspace memory;
  for (std::size_t first = 0; first < op.num_queries(); first += kQueryBlock) {
    const std::size_t queries = std::min<std::size_t>(kQueryBlock, op.num_queries() - first);
    QueryBlock block(op, k, v, kernel, row_scale, first, queries, memory);
    const auto threads = static_cast<unsigned>(std::min<std::size_t>(pool.num_threads(), block.num_units()));
    block.reserve_for(threads);
    pool.parallel_for(
        block.num_units(), [&](std::size_t unit, unsigned thread) { block.attend_unit(unit, thread); }, threads);
    pool.parallel_for(queries * heads, [&](std::size_t i) { block.finish(i / heads, i % heads, bad_rows); });
  }
}

}  // namespace tq_hb
