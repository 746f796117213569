// What an instruction set implements: attention of one KV head's query group over one range of keys.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tq_hb {

/// Keys per softmax update; their decoded rows stay in the first cache levels.
constexpr std::size_t kAttendTile = 16;

/// K or V of one KV head.
struct HeadRows {
  const std::uint8_t* codes;  ///< [capacity][head_dim]
  const float* norms;         ///< [capacity][norms per row]
  const float* levels;        ///< 256 entries: the codebook repeated, so a code needs no mask
};

/// A range of keys, oldest first: slots first_slot, first_slot + 1, ... wrapping at capacity.
struct AttendTask {
  const float* q;         ///< [group][head_dim], rotated; each row scaled by a power of two
  const double* q_scale;  ///< [group]: what turns dot(q, levels) * norm into the scaled score
  HeadRows k, v;
  std::size_t group;
  std::size_t head_dim;
  std::size_t first_slot, count, capacity;
  double softcap;          ///< 0 for none
  float v_scale;           ///< what a V norm is multiplied by
  double* scratch_scores;  ///< [group][kAttendTile]
  // Partial softmax state over the range, one entry or row per query head of the group.
  double* max;
  double* sum;
  float* out;  ///< [group][head_dim], not divided by sum
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
