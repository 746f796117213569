// A tile of consecutive keys: where its codes and norms are, which rows see it, and what to fetch after it.
#pragma once

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
  bool is_seen_by_all;  ///< every row sees all its keys, of which there are as many as may be
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
  /// Asks for the line of the next kCodesPerRequest. Into the second cache level unless it is to be near: rows a power
  /// of two apart share places in the first. Lines are asked for one by one between other work: a processor has room
  /// for a dozen requests, and stops at what goes beyond.
  template <bool kNear = false>
  void prefetch() noexcept {
    __builtin_prefetch(next, 0, kNear ? 3 : 2);
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

/// The rows of a block, `count` of which have a meaning: rows of the task from `first` on.
template <std::size_t kRows>
struct Rows {
  static constexpr std::size_t kSize = kRows;
  std::size_t first, count;
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

/// Sets what lies outside a span of keys, for row `row` of a block of `rows`.
template <std::size_t kTile, class T>
inline void fill_outside(T* values, std::size_t row, std::size_t rows, Span span, T value) noexcept {
  for (std::size_t t = 0; t < kTile; ++t) {
    if (t < span.begin || t >= span.end) values[RowBlock::place_of(t, row, rows)] = value;
  }
}

}  // namespace
}  // namespace tq_hb
