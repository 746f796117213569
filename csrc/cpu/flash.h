// The flash-attention loop that every path shares: tiles of keys, and the softmax over them.
//
// A path is a class with kTile, score(tile), accumulate(tile) and finish(). It works in the rotated domain; a key
// or value is decoded once for all rows. What a row does not see of a tile stays out of its sums, whatever it
// holds. Scores are carried in double, so that any finite scale and norm keeps its order.
#pragma once

#include <math.h>

#include "core/layout.h"
#include "cpu/attend_kernel.h"
#include "cpu/simd.h"

namespace tq_hb {
namespace {

template <std::size_t kHeadDim>
constexpr std::size_t kNormBlocks = kHeadDim < kNormBlock ? 1 : kHeadDim / kNormBlock;
template <std::size_t kHeadDim>
constexpr std::size_t kBlockDim = kHeadDim / kNormBlocks<kHeadDim>;

/// Some consecutive keys. The slots beyond the last are its own, so that a path may work on more keys than there are.
struct Tile {
  std::size_t slots[kAttendTile];
  bool in_sequence;  ///< every slot follows the one before it
  std::size_t first_age;
  std::size_t count;
};

/// The codes of a tile's keys or values.
struct TileRows {
  const std::uint8_t* at[kAttendTile];
};

/// Codes whose lines are asked for at a time: they take up a line at most.
constexpr std::size_t kCodesPerRequest = 64;

/// Codes that are worked on next. They follow each other except where the ring wraps: what is asked for beyond its end
/// is not needed, and no error.
struct UpcomingCodes {
  /// Asks for the line of the next kCodesPerRequest. Into the second cache level: rows a power of two apart share
  /// places in the first. Lines are asked for one by one between other work: a processor has room for a dozen requests,
  /// and stops at what goes beyond.
  void prefetch() noexcept {
    __builtin_prefetch(next, 0, 2);
    next += request_bytes;
  }

  /// What is left once so many have been asked for.
  UpcomingCodes after(std::size_t codes) const noexcept {
    return {next + codes / kCodesPerRequest * request_bytes, request_bytes};
  }

  const std::uint8_t* next;
  std::size_t request_bytes;  ///< what kCodesPerRequest take up; 0 if nothing is to come
};

inline const std::uint8_t* row_of(const HeadRows& side, std::size_t slot) noexcept {
  return side.codes + slot * side.row_bytes;
}

/// The rows of a tile of kTile.
template <std::size_t kTile>
inline TileRows rows_of(const HeadRows& side, const Tile& tile) noexcept {
  TileRows rows;
  if (tile.in_sequence) {
    const std::uint8_t* row = row_of(side, tile.slots[0]);
    for (std::size_t t = 0; t < kTile; ++t, row += side.row_bytes) rows.at[t] = row;
  } else {
    for (std::size_t t = 0; t < kTile; ++t) rows.at[t] = row_of(side, tile.slots[t]);
  }
  return rows;
}

inline UpcomingCodes codes_from(const HeadRows& side, std::size_t head_dim, std::size_t slot) noexcept {
  return {row_of(side, slot), side.row_bytes * kCodesPerRequest / head_dim};
}

/// The keys of the tile that follows, which may belong to the next range: a thread mostly takes that up, too.
template <std::size_t kTile>
inline UpcomingCodes keys_after(const AttendTask& task, const Tile& tile) noexcept {
  if (tile.first_age + kTile >= task.end_age) return {task.k.codes, 0};
  const std::size_t slot = tile.slots[0] + kTile;
  return codes_from(task.k, task.head_dim, slot < task.capacity ? slot : slot - task.capacity);
}

/// Asks for the norms of a tile of kTile from `slot` on. Scores and weights wait for them, so they go to the first
/// cache level.
template <std::size_t kTile>
inline void prefetch_norms(const AttendTask& task, const HeadRows& side, std::size_t slot) noexcept {
  constexpr std::size_t kLineNorms = 16;
  const std::size_t blocks = norms_per_row(task.head_dim), count = kTile * blocks;
  const float* norms = side.norms + slot * blocks;
  for (std::size_t i = 0; i < count; i += kLineNorms) __builtin_prefetch(norms + i, 0, 3);
  __builtin_prefetch(norms + count - 1, 0, 3);
}

/// The norms of a tile's keys or values.
template <std::size_t kTile, std::size_t kBlocks>
struct TileNorms {
  TileNorms(const HeadRows& side, const Tile& tile) noexcept {
    for (std::size_t b = 0; b < kBlocks; ++b) {
      const float* norms = side.norms + tile.slots[0] * kBlocks + b;
      if (tile.in_sequence) {
        for (std::size_t t = 0; t < kTile; ++t) of_block[b][t] = norms[t * kBlocks];
      } else {
        for (std::size_t t = 0; t < kTile; ++t) of_block[b][t] = side.norms[tile.slots[t] * kBlocks + b];
      }
    }
  }
  alignas(64) float of_block[kBlocks][kTile];
};

/// The keys of a tile that one row sees: end is not.
struct Span {
  std::size_t begin, end;
};

inline Span seen_of(const QueryRange& range, const Tile& tile) noexcept {
  const std::size_t begin = range.begin > tile.first_age ? range.begin - tile.first_age : 0;
  const std::size_t end = range.end > tile.first_age ? range.end - tile.first_age : 0;
  return Span{begin, end < tile.count ? end : tile.count};
}

/// Sets what lies outside the span.
template <std::size_t kTile, class T>
inline void fill_outside(T* values, Span span, T value) noexcept {
  for (std::size_t t = 0; t < span.begin; ++t) values[t] = value;
  for (std::size_t t = span.end; t < kTile; ++t) values[t] = value;
}

inline double capped(double score, double softcap) noexcept {
  return softcap * tanh(score / softcap);
}

/// Leaves the scores of keys that a row does not see at -inf, and finds the maximum that includes this tile.
template <std::size_t kTile>
inline double masked_maximum(const AttendTask& task, std::size_t r, const Tile& tile) noexcept {
  RowScratch& row = task.scratch[r];
  const Span seen = seen_of(task.seen[r], tile);
  const double bias = task.bias[r];
  if (bias != 0.0) {
    for (std::size_t t = 0; t < kTile; t += kDoubles) store(row.scores + t, load_as<Doubles>(row.scores + t) + bias);
  }
  if (task.softcap > 0.0) {
    for (std::size_t t = seen.begin; t < seen.end; ++t) row.scores[t] = capped(row.scores[t], task.softcap);
  }
  if (seen.begin > 0 || seen.end < kTile) {
    fill_outside<kTile>(row.scores, seen.begin < seen.end ? seen : Span{kTile, kTile}, -static_cast<double>(INFINITY));
  }
  Doubles maxima = Doubles{} + task.max[r];
  for (std::size_t t = 0; t < kTile; t += kDoubles) {
    const Doubles scores = load_as<Doubles>(row.scores + t);
    maxima = scores > maxima ? scores : maxima;
  }
  return max_of_lanes(maxima);
}

/// Turns scaled scores into weights, and every row's maximum and sum into those that include them.
///
/// Step by step over some rows at a time: what a row waits for in one step, another row fills.
template <std::size_t kTile>
void update_softmax(const AttendTask& task, const Tile& tile) noexcept {
  for (std::size_t first = 0; first < task.rows; first += kLanes) {
    const std::size_t rows = task.rows - first < kLanes ? task.rows - first : kLanes;
    float drops[kLanes] = {};
    for (std::size_t i = 0; i < rows; ++i) {
      const std::size_t r = first + i;
      const double max = masked_maximum<kTile>(task, r, tile);
      // Equal where neither has seen a key, too: a difference of infinities would be NaN.
      if (task.max[r] < max) drops[i] = static_cast<float>(task.max[r] - max);
      task.max[r] = max;
    }
    const Vec corrections = exp_of_negative(load(drops));
    Vec sums[kLanes];
    for (std::size_t i = 0; i < rows; ++i) {
      RowScratch& row = task.scratch[first + i];
      const double max = task.max[first + i] > -static_cast<double>(INFINITY) ? task.max[first + i] : 0.0;
      sums[i] = Vec{};
      for (std::size_t t = 0; t < kTile; t += kLanes) {
        const Vec weights = exp_of_negative(differences(row.scores + t, max));
        store(row.weights + t, weights);
        sums[i] += weights;
      }
    }
    for (std::size_t i = 0; i < rows; ++i) {
      task.scratch[first + i].correction = corrections[i];
      task.sum[first + i] =
          task.sum[first + i] * static_cast<double>(corrections[i]) + static_cast<double>(sum_of_lanes(sums[i]));
    }
  }
}

/// Puts outputs in the order of coordinates: of every 16 of a chunk, vector i has those from 4 * i on, 128 bits after
/// 128 bits.
template <std::size_t kChunk>
void order_columns(float* out, std::size_t count) noexcept {
  struct Chunk {
    float values[kChunk];
  };
  for (std::size_t i = 0; i < count; i += kChunk) {
    const Chunk sums = load_as<Chunk>(out + i);
    for (std::size_t j = 0; j < kChunk; j += 4) {
      store(out + i + j, load_as<Float4>(sums.values + j % 16 / 4 * (kChunk / 4) + j / 16 * 4));
    }
  }
}

/// What the values of a tile are multiplied by, for one row: weights and norms.
template <std::size_t kTile>
inline void fill_factors(const AttendTask& task, std::size_t r, const Tile& tile, const float* norms) noexcept {
  RowScratch& row = task.scratch[r];
  for (std::size_t t = 0; t < kTile; t += kLanes) {
    store(row.factors + t, load(row.weights + t) * (load(norms + t) * task.v_scale));
  }
  // 0 times a norm that is not finite is no 0.
  const Span seen = seen_of(task.seen[r], tile);
  if (seen.begin > 0 || seen.end < kTile) {
    fill_outside<kTile>(row.factors, seen.begin < seen.end ? seen : Span{kTile, kTile}, 0.0f);
  }
}

template <class Path>
void attend_range(const AttendTask& task) noexcept {
  for (std::size_t r = 0; r < task.rows; ++r) {
    task.max[r] = -static_cast<double>(INFINITY);
    task.sum[r] = 0.0;
  }
  for (std::size_t j = 0; j < task.rows * task.head_dim; ++j) task.out[j] = 0.0f;

  Path path(task);
  Tile tile;
  std::size_t slot = task.first_slot;
  for (std::size_t done = 0; done < task.count; done += Path::kTile) {
    tile.first_age = task.first_age + done;
    tile.count = task.count - done < Path::kTile ? task.count - done : Path::kTile;
    // Those that end before the ring does follow each other.
    const std::size_t before_wrap = task.capacity - slot;
    tile.in_sequence = tile.count == Path::kTile && before_wrap >= Path::kTile;
    if (tile.in_sequence) {
      for (std::size_t t = 0; t < Path::kTile; ++t) tile.slots[t] = slot + t;
    } else {
      for (std::size_t t = 0; t < Path::kTile; ++t) {
        const std::size_t key = t < tile.count ? t : tile.count - 1;
        tile.slots[t] = key < before_wrap ? slot + key : key - before_wrap;
      }
    }
    slot = tile.count < before_wrap ? slot + tile.count : tile.count - before_wrap;
    prefetch_norms<Path::kTile>(task, task.v, tile.slots[0]);
    path.score(tile);
    prefetch_norms<Path::kTile>(task, task.k, slot);
    update_softmax<Path::kTile>(task, tile);
    path.accumulate(tile);
  }
  path.finish();
}

template <std::size_t kValue>
struct Count {
  static constexpr std::size_t value = kValue;
};

/// Calls visit(Count<n>, r) for groups of n rows, which share the loads of a key: of kGroup while there are as many,
/// then of half as many, and so on.
template <std::size_t kGroup, class Visit>
void for_each_group(std::size_t rows, const Visit& visit, std::size_t r = 0) noexcept {
  for (; r + kGroup <= rows; r += kGroup) visit(Count<kGroup>{}, r);
  if constexpr (kGroup > 1) {
    if (r < rows) for_each_group<kGroup / 2>(rows, visit, r);
  }
}

}  // namespace
}  // namespace tq_hb
