// What an instruction set implements: attention of the queries of one KV head over one range of keys.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/query_range.h"

namespace tq_hb {

/// Keys per softmax update; their decoded rows stay in the first cache levels.
constexpr std::size_t kAttendTile = 16;

/// K or V of one KV head.
struct HeadRows {
  const std::uint8_t* codes;  ///< [capacity][row_bytes]
  const float* norms;         ///< [capacity][norms per row]
  const float* levels;        ///< 256 entries: the codebook repeated, so a code needs no mask
  std::size_t row_bytes;
  unsigned high_bits;  ///< width of the high plane: 1 or 2, or 0 where a code is a byte
};

/// A range of keys, oldest first: slots first_slot, first_slot + 1, ... wrapping at capacity.
///
/// A row is one head of one query. All rows share the decoding of a key, also those that do not see it.
struct AttendTask {
  const float* q;          ///< [rows][head_dim], rotated; each row scaled by a power of two
  const double* q_scale;   ///< [rows]: what turns dot(q, levels) * norm into the scaled score
  const double* bias;      ///< [rows]: added to the scaled score
  const QueryRange* seen;  ///< [rows]: ages of the keys that a row sees
  HeadRows k, v;
  std::size_t rows;
  std::size_t head_dim;
  std::size_t first_age, first_slot, count, capacity;
  double softcap;          ///< 0 for none
  float v_scale;           ///< what a V norm is multiplied by
  double* scratch_scores;  ///< [rows][kAttendTile]
  // Partial softmax state over the range. A row that sees none of it gets -inf, 0 and zeros.
  double* max;
  double* sum;
  float* out;  ///< [rows][head_dim], not divided by sum
};

struct IsaKernel {
  const char* isa;
  void (*run)(const AttendTask& task) noexcept;
};

const IsaKernel& attend_kernel_portable() noexcept;
#if defined(TQ_HB_HAVE_X86_KERNELS)
const IsaKernel& attend_kernel_avx2() noexcept;
const IsaKernel& attend_kernel_avx512() noexcept;
#endif

}  // namespace tq_hb
