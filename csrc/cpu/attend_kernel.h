// What an instruction set implements: attention of the queries of one KV head over one range of keys.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/query_range.h"
#include "cpu/decisive_keys.h"

namespace tq_hb {

/// Keys per softmax update.
constexpr std::size_t kAttendTile = 64;
/// Keys whose weights have a fixed point in common.
constexpr std::size_t kWeightGroup = 32;
constexpr std::size_t kWeightGroups = kAttendTile / kWeightGroup;
/// Blocks of coordinates, each with its own norm, at most.
constexpr std::size_t kMaxNormBlocks = 2;

/// Rows that go through the softmax together, at most, and the lanes that they take up.
constexpr std::size_t kMostBlockRows = 8;
constexpr std::size_t kBlockLanes = 2 * kMostBlockRows;

/// Rows of a block, of so many rows in all: a power of two. The last block may have some without a meaning.
constexpr std::size_t block_rows(std::size_t rows) noexcept {
  return rows > 4 ? kMostBlockRows : rows > 2 ? 4 : rows;
}

constexpr std::size_t num_blocks(std::size_t rows) noexcept {
  return (rows + block_rows(rows) - 1) / block_rows(rows);
}

/// How an instruction set comes by the levels of a codebook of 8 bits.
enum class Int16Form { kTable, kSegments };

/// The negative half of 256 levels by segments, each made of two shapes: with i = r + 8 * family_of(s), value 8 * s + r
/// is
///
///   starts[s] + round((shares[0][s] * shapes[0][i] + shares[1][s] * shapes[1][i]) / kFraction).
///
/// The first segment, where levels are far apart, has shapes of its own.
struct Int16Segments {
  static constexpr std::size_t kSegments = 16, kSteps = 8, kFamilies = 2;
  static constexpr int kFraction = 8;  ///< of a unit, which sums of shapes are in
  static constexpr std::size_t family_of(std::size_t segment) noexcept { return segment == 0; }

  alignas(32) std::int16_t starts[kSegments];
  alignas(16) std::uint8_t shares[2][kSegments];
  alignas(16) std::int8_t shapes[2][kFamilies * kSteps];
};

/// A codebook in fixed point: level i is near (value + 1/2) * unit, so that ~value stands for its negative, which every
/// codebook has as well. The unit is such that levels are neither too long nor too short: the errors of a vector's
/// levels then average away in its product with any vector, one that it is aligned with included.
struct Int16Levels {
  /// Largest magnitude of a value.
  static constexpr std::int32_t kLimit = 24000;
  /// The sum of magnitudes of integers whose products with values can be summed without overflow, rounding included.
  static constexpr float kBudget = 89400.0f;

  alignas(64) std::int16_t values[256];  ///< of every code; repeated beyond the last
  double unit;
  Int16Segments segments;  ///< that the values are from, in that form
};

/// A codebook in float32, repeated over all values of a byte: indices above its width wrap.
struct LevelTable {
  alignas(64) float levels[256];
  alignas(64) std::uint8_t bytes[sizeof(float)][256];  ///< of the levels, the lowest first
};

/// K or V of one KV head.
struct HeadRows {
  const std::uint8_t* codes;  ///< [capacity][row_bytes]
  const float* norms;         ///< [capacity][norms per row]
  const LevelTable* levels;   ///< in float32
  std::size_t row_bytes;
  unsigned high_bits;        ///< width of the high plane: 1 or 2, or 0 where a code is a byte
  unsigned cbits;            ///< width of a code
  const Int16Levels* int16;  ///< read by attend_int16 alone
};

/// Queries in fixed point, in the order in which an instruction set looks levels up.
struct Int16Query {
  const std::int16_t* values;    ///< [rows][head_dim]
  const double* units;           ///< [rows][kMaxNormBlocks]: what turns a block's sum into its share of dot(q, values)
  const std::int32_t* halves;    ///< [rows][kMaxNormBlocks]: added to a block's sum for the half in every level
  const double* reach_per_norm;  ///< [rows]: times a key's norm, the standard deviation of a score over random codes
};

/// What the rows of a block need while a tile is attended to.
///
/// What belongs to a key and a row is at place_of(): that of two neighbouring keys side by side, as the products of
/// their values need it, then that of the next row. So what is found over all keys is found for all rows at once. What
/// belongs to a row alone is there for every one of kBlockLanes places that is the row's.
struct RowBlock {
  static constexpr std::size_t kMostPlaces = kAttendTile * kMostBlockRows;

  static constexpr std::size_t place_of(std::size_t key, std::size_t row, std::size_t rows) noexcept {
    return (key / 2 * rows + row) * 2 + key % 2;
  }
  static constexpr std::size_t key_of(std::size_t place, std::size_t rows) noexcept {
    return place / (2 * rows) * 2 + place % 2;
  }
  static constexpr std::size_t first_lane(std::size_t row) noexcept { return 2 * row; }
  static constexpr std::size_t row_of_lane(std::size_t lane, std::size_t rows) noexcept { return lane / 2 % rows; }

  alignas(64) double scores[kMostPlaces];
  alignas(64) float weights[kMostPlaces];  ///< exp(score - max), 0 for a key that is not seen
  alignas(64) float factors[kMostPlaces];  ///< what values are multiplied by: weights and norms
  alignas(64) std::int16_t fixed_weights[kMaxNormBlocks][kMostPlaces];
  // Lanes.
  alignas(64) double bias[kBlockLanes];
  alignas(64) double score_units[kMaxNormBlocks][kBlockLanes];                ///< of products of queries and levels
  alignas(64) std::int32_t score_halves[kMaxNormBlocks][kBlockLanes];         ///< as in Int16Query
  alignas(64) double max[kBlockLanes];                                        ///< of a row's scores so far
  alignas(64) double sum[kBlockLanes];                                        ///< of a row's weights so far
  alignas(64) float corrections[kBlockLanes];                                 ///< what earlier sums are multiplied by
  alignas(64) float fixed_units[kMaxNormBlocks][kWeightGroups][kBlockLanes];  ///< of fixed weights times fixed levels
  alignas(64) std::int32_t halves[kMaxNormBlocks][kWeightGroups][kBlockLanes];
};

/// A range of keys, oldest first: slots first_slot, first_slot + 1, ... wrapping at capacity.
///
/// A row is one head of one query. All rows share the decoding of a key, also those that do not see it.
struct AttendTask {
  const float* q;          ///< [rows][head_dim], rotated; each row scaled by a power of two; see place_query
  Int16Query q_int16;      ///< the same, read by attend_int16 alone
  const double* q_scale;   ///< [rows]: what turns dot(q, levels) * norm into the scaled score
  const double* bias;      ///< [rows]: added to the scaled score
  bool has_bias;           ///< if not, they are all 0
  const QueryRange* seen;  ///< [rows]: ages of the keys that a row sees
  HeadRows k, v;
  std::size_t rows;
  std::size_t head_dim;
  std::size_t first_age, first_slot, count, capacity;
  std::size_t end_age;  ///< of all ranges of the KV head: keys before it are worth fetching
  bool fetches_near;    ///< into the first cache level, where a kernel does for so few rows
  double softcap;       ///< 0 for none
  float v_scale;        ///< what a V norm is multiplied by
  RowBlock* blocks;     ///< [num_blocks(rows)], of the thread alone
  NotedKeys* notes;     ///< [rows]: what attend_int16 notes
  // Partial softmax state over the range. A row that sees none of it gets -inf, 0 and zeros.
  double* max;
  double* sum;
  float* out;  ///< [rows][head_dim], not divided by sum, in an order of the kernel's
};

/// The sums of a row over all ranges, which errors of scores are taken out of.
struct RescoreTask {
  const float* q;  ///< [head_dim]; this and what follows as in AttendTask
  double q_scale, bias, softcap;
  HeadRows k, v;
  std::size_t head_dim;
  float v_scale;
  const ChosenKeys& chosen;
  double max;  ///< of the scores
  double* sum;
  float* out;  ///< [head_dim], not divided by sum, in the order in which attending leaves it
};

struct IsaKernel {
  const char* isa;
  /// Copies a row of q, scaled by a power of two so that no product of it can overflow. Returns what undoes that, or
  /// NaN if the row is not finite.
  double (*scale_query)(const float* q, std::size_t head_dim, float* scaled) noexcept;
  /// The codec's rotation of one row and its inverse, in place.
  void (*rotate)(float* row, std::size_t head_dim) noexcept;
  void (*unrotate)(float* row, std::size_t head_dim) noexcept;
  /// Puts one row of `out` from the order in which attending leaves it into that of coordinates; null where that is so.
  void (*order_columns)(float* out, std::size_t head_dim) noexcept;
  /// Adds weights[i] * partials[i * stride ...], for `count` of them, to the head_dim values of `out`.
  void (*add_partials)(const float* partials, std::size_t stride, const float* weights, std::size_t count,
                       std::size_t head_dim, float* out) noexcept;
  /// In float32: strict.
  void (*attend)(const AttendTask& task) noexcept;
  /// Puts one row of q into the order in which `attend` takes it; null where that is the order of coordinates.
  void (*place_query)(const float* q, std::size_t head_dim, float* placed) noexcept;
  /// In sums of 16-bit products; null where that is not faster.
  void (*attend_int16)(const AttendTask& task) noexcept;
  /// Puts one row of q into fixed point: `values` [head_dim], `units` and `halves` [kMaxNormBlocks]. The units are
  /// those of q alone. Returns the row's length.
  double (*quantize_query)(const float* q, std::size_t head_dim, std::int16_t* values, double* units,
                           std::int32_t* halves) noexcept;
  /// Scores keys in float32 and corrects sums that attend_int16 made. Returns by how much the scores of all keys are to
  /// be raised. Null where attend_int16 is.
  double (*rescore)(const RescoreTask& task) noexcept;
  Int16Form int16_form;
};

const IsaKernel& attend_kernel_portable() noexcept;
#if defined(TQ_HB_HAVE_X86_KERNELS)
const IsaKernel& attend_kernel_avx2() noexcept;
#if defined(TQ_HB_HAVE_AVXVNNI_KERNELS)
/// AVX2 and AVX-VNNI, which multiplies and adds at once: its results are those of AVX2.
const IsaKernel& attend_kernel_avxvnni() noexcept;
#endif
/// With VBMI and VNNI.
const IsaKernel& attend_kernel_avx512() noexcept;
#elif defined(TQ_HB_HAVE_NEON_KERNELS)
const IsaKernel& attend_kernel_neon() noexcept;
#endif

}  // namespace tq_hb
