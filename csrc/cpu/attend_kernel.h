// What an instruction set implements: attention of the queries of one KV head over one range of keys.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/query_range.h"
#include "cpu/decisive_keys.h"

namespace tq_hb {

/// Keys per softmax update, at most.
constexpr std::size_t kAttendTile = 32;
/// Queries in fixed point that may be read at a time: memory for them ends on a whole group of a KV head's rows.
constexpr std::size_t kQueryRows = 8;
/// Sums of two blocks of coordinates, each with its own norm, at most.
constexpr std::size_t kMaxNormBlocks = 2;

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

/// What a row needs while a tile is attended to.
struct RowScratch {
  alignas(64) double scores[kAttendTile];
  alignas(64) float weights[kAttendTile];  ///< exp(score - max), 0 for a key that is not seen
  alignas(64) float factors[kAttendTile];  ///< what values are multiplied by: weights and norms
  alignas(64) std::int16_t fixed_weights[kMaxNormBlocks][kAttendTile];
  float fixed_units[kMaxNormBlocks];  ///< what turns sums of fixed weights and fixed levels into output
  std::int32_t halves[kMaxNormBlocks];
  float correction;  ///< what earlier sums are multiplied by
};

/// A range of keys, oldest first: slots first_slot, first_slot + 1, ... wrapping at capacity.
///
/// A row is one head of one query. All rows share the decoding of a key, also those that do not see it.
struct AttendTask {
  const float* q;          ///< [rows][head_dim], rotated; each row scaled by a power of two; see place_query
  Int16Query q_int16;      ///< the same, read by attend_int16 alone
  const double* q_scale;   ///< [rows]: what turns dot(q, levels) * norm into the scaled score
  const double* bias;      ///< [rows]: added to the scaled score
  const QueryRange* seen;  ///< [rows]: ages of the keys that a row sees
  HeadRows k, v;
  std::size_t rows;
  std::size_t head_dim;
  std::size_t first_age, first_slot, count, capacity;
  std::size_t end_age;  ///< of all ranges of the KV head: keys before it are worth fetching
  double softcap;       ///< 0 for none
  float v_scale;        ///< what a V norm is multiplied by
  RowScratch* scratch;  ///< [rows]
  NotedKeys* notes;     ///< [rows]: what attend_int16 notes
  // Partial softmax state over the range. A row that sees none of it gets -inf, 0 and zeros.
  double* max;
  double* sum;
  float* out;  ///< [rows][head_dim], not divided by sum
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
  float* out;  ///< [head_dim], not divided by sum
};

struct IsaKernel {
  const char* isa;
  /// Copies a row of q, scaled by a power of two so that no product of it can overflow. Returns what undoes that, or
  /// NaN if the row is not finite.
  double (*scale_query)(const float* q, std::size_t head_dim, float* scaled) noexcept;
  /// The codec's rotation of one row and its inverse, in place.
  void (*rotate)(float* row, std::size_t head_dim) noexcept;
  void (*unrotate)(float* row, std::size_t head_dim) noexcept;
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
