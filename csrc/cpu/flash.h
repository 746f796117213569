// The flash-attention loop that every path shares: tiles of keys, and the softmax over them.
//
// A path is a class with kTile, score(tile) and accumulate(tile). It works in the rotated domain; a key
// or value is decoded once for all rows. What a row does not see of a tile stays out of its sums, whatever it
// holds. Scores are carried in double, so that any finite scale and norm keeps its order.
#pragma once

#include "cpu/softmax.h"
#include "cpu/tile.h"

namespace tq_hb {
namespace {

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

/// What the values of a tile are multiplied by: weights and norms.
template <std::size_t kTile, std::size_t kRows>
inline void fill_factors(const AttendTask& task, const Tile& tile, std::size_t first_row, const float* norms,
                         RowBlock& block) noexcept {
  for (std::size_t i = 0; i < kTile * kRows; i += kLanes) {
    store(block.factors + i, load(block.weights + i) * (of_keys<kRows, Vec>(norms, i) * task.v_scale));
  }
  if (tile.is_seen_by_all) return;
  // 0 times a norm that is not finite is no 0.
  for (std::size_t r = 0; r < kRows && first_row + r < task.rows; ++r) {
    fill_outside<kTile>(block.factors, r, kRows, seen_of(task.seen[first_row + r], tile), 0.0f);
  }
}

/// Calls visit(Count<rows>, block, first_row) for every block, with its number of rows.
template <class Visit>
inline void for_each_block(const AttendTask& task, const Visit& visit) noexcept {
  const std::size_t rows = block_rows(task.rows);
  RowBlock* block = task.blocks;
  for (std::size_t first = 0; first < task.rows; first += rows, ++block) {
    if (rows == 1) visit(Count<1>{}, *block, first);
    if (rows == 2) visit(Count<2>{}, *block, first);
    if (rows == 4) visit(Count<4>{}, *block, first);
    if (rows == 8) visit(Count<8>{}, *block, first);
  }
}

/// The keys that every row sees.
inline QueryRange seen_by_all(const AttendTask& task) noexcept {
  QueryRange range = task.seen[0];
  for (std::size_t r = 1; r < task.rows; ++r) {
    if (task.seen[r].begin > range.begin) range.begin = task.seen[r].begin;
    if (task.seen[r].end < range.end) range.end = task.seen[r].end;
  }
  return range;
}

/// What belongs to the rows of a block, for all its lanes: values[0], values[kStride], ... of `count` rows, or as many
/// as there are, and 0 of those without a meaning.
template <std::size_t kRows, std::size_t kStride = 1, class T>
inline void spread_rows(const T* values, std::size_t count, T* lanes) noexcept {
  for (std::size_t i = 0; i < kBlockLanes; ++i) {
    const std::size_t row = RowBlock::row_of_lane(i, kRows);
    lanes[i] = row < count ? values[row * kStride] : T{};
  }
}

inline void begin_blocks(const AttendTask& task) noexcept {
  for_each_block(task, [&](auto rows, RowBlock& block, std::size_t first) {
    spread_rows<decltype(rows)::value>(task.bias + first, task.rows - first, block.bias);
    for (std::size_t i = 0; i < kBlockLanes; ++i) {
      block.max[i] = -static_cast<double>(INFINITY);
      block.sum[i] = 0.0;
    }
  });
}

inline void end_blocks(const AttendTask& task) noexcept {
  for_each_block(task, [&](auto rows, const RowBlock& block, std::size_t first) {
    for (std::size_t r = 0; r < decltype(rows)::value && first + r < task.rows; ++r) {
      task.max[first + r] = block.max[RowBlock::first_lane(r)];
      task.sum[first + r] = block.sum[RowBlock::first_lane(r)];
    }
  });
}

template <class Path>
void attend_range(const AttendTask& task) noexcept {
  constexpr std::size_t kTile = Path::kTile;
  for (std::size_t j = 0; j < task.rows * task.head_dim; ++j) task.out[j] = 0.0f;
  begin_blocks(task);
  const QueryRange by_all = seen_by_all(task);

  Path path(task);
  Tile tile;
  std::size_t slot = task.first_slot;
  for (std::size_t done = 0; done < task.count; done += kTile) {
    tile.first_age = task.first_age + done;
    tile.count = task.count - done < kTile ? task.count - done : kTile;
    tile.is_seen_by_all = tile.count == kTile && tile.first_age >= by_all.begin && tile.first_age + kTile <= by_all.end;
    // Those that end before the ring does follow each other.
    const std::size_t before_wrap = task.capacity - slot;
    tile.in_sequence = tile.count == kTile && before_wrap >= kTile;
    if (tile.in_sequence) {
      for (std::size_t t = 0; t < kTile; ++t) tile.slots[t] = slot + t;
    } else {
      for (std::size_t t = 0; t < kTile; ++t) {
        const std::size_t key = t < tile.count ? t : tile.count - 1;
        tile.slots[t] = key < before_wrap ? slot + key : key - before_wrap;
      }
    }
    slot = tile.count < before_wrap ? slot + tile.count : tile.count - before_wrap;
    prefetch_norms<kTile>(task, task.v, tile.slots[0]);
    path.score(tile);
    prefetch_norms<kTile>(task, task.k, slot);
    for_each_block(task, [&](auto rows, RowBlock& block, std::size_t first) {
      update_softmax<kTile, decltype(rows)::value>(task, tile, first, block);
    });
    path.accumulate(tile);
  }
  end_blocks(task);
}

}  // namespace
}  // namespace tq_hb
