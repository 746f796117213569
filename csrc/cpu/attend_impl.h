// The loop behind every attend_<isa>.cpp, each compiled with its own instruction-set flags.
//
// Works in the rotated domain. A K or V row is decoded once for all query heads of its group, a tile
// of rows at a time. Scores are carried in double, so that any finite scale and norm keeps its order.
//
// Everything sits in an unnamed namespace and calls nothing inline from elsewhere: a function shared
// between files with different flags could be linked from the wrong one.

#include <math.h>

#include "cpu/attend_kernel.h"

namespace tq_hb {
namespace {

constexpr std::size_t kTile = kAttendTile;
// Partial sums of a dot product, and the columns of an output block: independent chains for the vector units.
constexpr std::size_t kLanes = 32;
constexpr std::size_t kNormBlock = 256;

struct Tile {
  alignas(64) float rows[kTile * 512];
  std::size_t slots[kTile];
};

void decode_row(const std::uint8_t* codes, const float* levels, std::size_t head_dim, float* row) noexcept {
  for (std::size_t j = 0; j < head_dim; ++j) row[j] = levels[codes[j]];
}

float dot_block(const float* a, const float* b) noexcept {
  float lanes[kLanes] = {};
  for (std::size_t i = 0; i < kNormBlock; i += kLanes) {
    for (std::size_t j = 0; j < kLanes; ++j) lanes[j] += a[i + j] * b[i + j];
  }
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::size_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

template <std::size_t kHeadDim>
void score_tile(const AttendTask& task, const Tile& tile, std::size_t count, float* row, double* scores) noexcept {
  constexpr std::size_t kBlocks = kHeadDim / kNormBlock;
  for (std::size_t t = 0; t < count; ++t) {
    const std::size_t slot = tile.slots[t];
    decode_row(task.k.codes + slot * kHeadDim, task.k.levels, kHeadDim, row);
    for (std::size_t g = 0; g < task.group; ++g) {
      const float* q = task.q + g * kHeadDim;
      double score = 0.0;
      for (std::size_t b = 0; b < kBlocks; ++b) {
        const double dot = static_cast<double>(dot_block(q + b * kNormBlock, row + b * kNormBlock));
        score += dot * static_cast<double>(task.k.norms[slot * kBlocks + b]);
      }
      score *= task.q_scale[g];
      if (task.softcap > 0.0) score = task.softcap * tanh(score / task.softcap);
      scores[g * kTile + t] = score;
    }
  }
}

/// Turns a head's scores into weights, and rescales its state to the new maximum.
template <std::size_t kHeadDim>
void update_softmax(const AttendTask& task, std::size_t g, std::size_t count, const double* scores,
                    float* weights) noexcept {
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

/// out += weights * decoded V rows, a block of columns in registers at a time.
template <std::size_t kHeadDim>
void accumulate_tile(const AttendTask& task, const Tile& tile, std::size_t count, const float* weights,
                     float* out) noexcept {
  constexpr std::size_t kBlocks = kHeadDim / kNormBlock;
  for (std::size_t b = 0; b < kBlocks; ++b) {
    float factors[kTile];
    for (std::size_t t = 0; t < count; ++t) {
      factors[t] = weights[t] * (task.v.norms[tile.slots[t] * kBlocks + b] * task.v_scale);
    }
    for (std::size_t i = b * kNormBlock; i < (b + 1) * kNormBlock; i += kLanes) {
      float lanes[kLanes];
      for (std::size_t j = 0; j < kLanes; ++j) lanes[j] = out[i + j];
      for (std::size_t t = 0; t < count; ++t) {
        const float* row = tile.rows + t * kHeadDim + i;
        for (std::size_t j = 0; j < kLanes; ++j) lanes[j] += factors[t] * row[j];
      }
      for (std::size_t j = 0; j < kLanes; ++j) out[i + j] = lanes[j];
    }
  }
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
    score_tile<kHeadDim>(task, tile, count, tile.rows, task.scratch_scores);
    for (std::size_t t = 0; t < count; ++t) {
      decode_row(task.v.codes + tile.slots[t] * kHeadDim, task.v.levels, kHeadDim, tile.rows + t * kHeadDim);
    }
    for (std::size_t g = 0; g < task.group; ++g) {
      float weights[kTile];
      update_softmax<kHeadDim>(task, g, count, task.scratch_scores + g * kTile, weights);
      accumulate_tile<kHeadDim>(task, tile, count, weights, task.out + g * kHeadDim);
    }
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
