// The loop behind every attend_<isa>.cpp, each compiled with its own instruction-set flags.
//
// Works in the rotated domain. A K or V row is decoded once for all query heads of its group, a tile
// of rows at a time. Scores are carried in double, so that any finite scale and norm keeps its order.
//
// Everything sits in an unnamed namespace and calls nothing inline from elsewhere: a function shared
// between files with different flags could be linked from the wrong one.

#include <math.h>

#include "core/layout.h"
#include "cpu/attend_kernel.h"

namespace tq_hb {
namespace {

constexpr std::size_t kTile = kAttendTile;

#if defined(__AVX512F__)
constexpr std::size_t kLanes = 16;
#elif defined(__AVX__)
constexpr std::size_t kLanes = 8;
#else
constexpr std::size_t kLanes = 4;
#endif

/// One vector register, by the extension that g++ and clang share.
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

inline Vec load(const float* source) noexcept {
  Vec vec;
  __builtin_memcpy(&vec, source, sizeof(vec));
  return vec;
}

inline void store(float* target, Vec vec) noexcept {
  __builtin_memcpy(target, &vec, sizeof(vec));
}

inline float sum_of_lanes(Vec vec) noexcept {
  float lanes[kLanes];
  store(lanes, vec);
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::size_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

/// Slots of a tile's keys, and its K or V rows as levels.
struct Tile {
  alignas(64) float rows[kTile * kMaxHeadDim];
  std::size_t slots[kTile];
};

template <std::size_t kHeadDim>
void decode_tile(const HeadRows& side, std::size_t count, Tile& tile) noexcept {
  for (std::size_t t = 0; t < count; ++t) {
    const std::uint8_t* codes = side.codes + tile.slots[t] * kHeadDim;
    float* row = tile.rows + t * kHeadDim;
    for (std::size_t j = 0; j < kHeadDim; ++j) row[j] = side.levels[codes[j]];
  }
}

/// Adds norm * dot(query, row) over one norm block to the scores of kHeads heads and kRows rows.
///
/// Each pair has one accumulator, so its bits do not depend on what it shares a block with.
template <std::size_t kHeadDim, std::size_t kHeads, std::size_t kRows>
inline void score_block(const float* q, const float* rows, const float* const* norms, double* scores) noexcept {
  Vec sums[kHeads][kRows] = {};
  for (std::size_t i = 0; i < kNormBlock; i += kLanes) {
    Vec row[kRows];
    for (std::size_t r = 0; r < kRows; ++r) row[r] = load(rows + r * kHeadDim + i);
    for (std::size_t h = 0; h < kHeads; ++h) {
      const Vec query = load(q + h * kHeadDim + i);
      for (std::size_t r = 0; r < kRows; ++r) sums[h][r] += query * row[r];
    }
  }
  for (std::size_t h = 0; h < kHeads; ++h) {
    for (std::size_t r = 0; r < kRows; ++r) {
      scores[h * kTile + r] += static_cast<double>(sum_of_lanes(sums[h][r])) * static_cast<double>(*norms[r]);
    }
  }
}

template <std::size_t kHeadDim, std::size_t kHeads>
void score_heads(const AttendTask& task, const Tile& tile, std::size_t count, std::size_t g) noexcept {
  constexpr std::size_t kRows = 4;
  constexpr std::size_t kBlocks = kHeadDim / kNormBlock;
  double* scores = task.scratch_scores + g * kTile;
  for (std::size_t i = 0; i < kHeads * kTile; ++i) scores[i] = 0.0;
  for (std::size_t b = 0; b < kBlocks; ++b) {
    const float* norms[kTile];
    for (std::size_t t = 0; t < count; ++t) norms[t] = task.k.norms + tile.slots[t] * kBlocks + b;
    const float* q = task.q + g * kHeadDim + b * kNormBlock;
    const float* rows = tile.rows + b * kNormBlock;
    std::size_t t = 0;
    for (; t + kRows <= count; t += kRows) {
      score_block<kHeadDim, kHeads, kRows>(q, rows + t * kHeadDim, norms + t, scores + t);
    }
    for (; t < count; ++t) score_block<kHeadDim, kHeads, 1>(q, rows + t * kHeadDim, norms + t, scores + t);
  }
  for (std::size_t h = 0; h < kHeads; ++h) {
    for (std::size_t t = 0; t < count; ++t) {
      double& score = scores[h * kTile + t];
      score *= task.q_scale[g + h];
      if (task.softcap > 0.0) score = task.softcap * tanh(score / task.softcap);
    }
  }
}

/// Turns a head's scores into weights, and rescales its state to the new maximum.
template <std::size_t kHeadDim>
void update_softmax(const AttendTask& task, std::size_t g, std::size_t count, float* weights) noexcept {
  const double* scores = task.scratch_scores + g * kTile;
  double max = task.max[g];
  for (std::size_t t = 0; t < count; ++t) max = scores[t] > max ? scores[t] : max;
  const float correction = expf(static_cast<float>(task.max[g] - max));
  double sum = task.sum[g] * static_cast<double>(correction);
  for (std::size_t t = 0; t < count; ++t) {
    weights[t] = expf(static_cast<float>(scores[t] - max));
    sum += static_cast<double>(weights[t]);
  }
  task.max[g] = max;
  task.sum[g] = sum;
  float* out = task.out + g * kHeadDim;
  if (correction != 1.0f) {
    for (std::size_t j = 0; j < kHeadDim; ++j) out[j] *= correction;
  }
}

/// out += weights * V rows for kHeads heads, some columns in registers at a time.
template <std::size_t kHeadDim, std::size_t kHeads>
void accumulate_heads(const AttendTask& task, const Tile& tile, std::size_t count, const float* weights,
                      float* out) noexcept {
  constexpr std::size_t kColumns = 4;  // vectors
  constexpr std::size_t kBlocks = kHeadDim / kNormBlock;
  for (std::size_t b = 0; b < kBlocks; ++b) {
    float factors[kHeads][kTile];
    for (std::size_t h = 0; h < kHeads; ++h) {
      for (std::size_t t = 0; t < count; ++t) {
        factors[h][t] = weights[h * kTile + t] * (task.v.norms[tile.slots[t] * kBlocks + b] * task.v_scale);
      }
    }
    for (std::size_t i = b * kNormBlock; i < (b + 1) * kNormBlock; i += kColumns * kLanes) {
      Vec sums[kHeads][kColumns];
      for (std::size_t h = 0; h < kHeads; ++h) {
        for (std::size_t c = 0; c < kColumns; ++c) sums[h][c] = load(out + h * kHeadDim + i + c * kLanes);
      }
      for (std::size_t t = 0; t < count; ++t) {
        for (std::size_t c = 0; c < kColumns; ++c) {
          const Vec row = load(tile.rows + t * kHeadDim + i + c * kLanes);
          for (std::size_t h = 0; h < kHeads; ++h) sums[h][c] += factors[h][t] * row;
        }
      }
      for (std::size_t h = 0; h < kHeads; ++h) {
        for (std::size_t c = 0; c < kColumns; ++c) store(out + h * kHeadDim + i + c * kLanes, sums[h][c]);
      }
    }
  }
}

template <std::size_t kValue>
struct Count {
  static constexpr std::size_t value = kValue;
};

/// Calls visit(Count<2>, g) for pairs of heads, which share the loads of a row, and visit(Count<1>, g) for an odd one.
template <class Visit>
void for_each_pair(std::size_t group, const Visit& visit) noexcept {
  std::size_t g = 0;
  for (; g + 2 <= group; g += 2) visit(Count<2>{}, g);
  if (g < group) visit(Count<1>{}, g);
}

template <std::size_t kHeadDim>
void attend_range(const AttendTask& task) noexcept {
  Tile tile;
  for (std::size_t g = 0; g < task.group; ++g) {
    task.max[g] = -INFINITY;
    task.sum[g] = 0.0;
  }
  for (std::size_t j = 0; j < task.group * kHeadDim; ++j) task.out[j] = 0.0f;

  std::size_t slot = task.first_slot;
  for (std::size_t done = 0; done < task.count; done += kTile) {
    const std::size_t count = task.count - done < kTile ? task.count - done : kTile;
    for (std::size_t t = 0; t < count; ++t) {
      tile.slots[t] = slot;
      slot = slot + 1 == task.capacity ? 0 : slot + 1;
    }
    decode_tile<kHeadDim>(task.k, count, tile);
    for_each_pair(task.group, [&](auto heads, std::size_t g) {
      score_heads<kHeadDim, decltype(heads)::value>(task, tile, count, g);
    });
    decode_tile<kHeadDim>(task.v, count, tile);
    for_each_pair(task.group, [&](auto heads, std::size_t g) {
      constexpr std::size_t kHeads = decltype(heads)::value;
      float weights[kHeads * kTile];
      for (std::size_t h = 0; h < kHeads; ++h) update_softmax<kHeadDim>(task, g + h, count, weights + h * kTile);
      accumulate_heads<kHeadDim, kHeads>(task, tile, count, weights, task.out + g * kHeadDim);
    });
  }
}

void run(const AttendTask& task) noexcept {
  if (task.head_dim == 256) {
    attend_range<256>(task);
  } else {
    attend_range<512>(task);
  }
}

}  // namespace
}  // namespace tq_hb
