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

/// Calls visit(Rows, block) for every block.
template <class Visit>
inline void for_each_block(const AttendTask& task, const Visit& visit) noexcept {
  const std::size_t size = block_rows(task.rows);
  RowBlock* block = task.blocks;
  for (std::size_t first = 0; first < task.rows; first += size, ++block) {
    const std::size_t count = task.rows - first < size ? task.rows - first : size;
    if (size == 1) visit(Rows<1>{first, count}, *block);
    if (size == 2) visit(Rows<2>{first, count}, *block);
    if (size == 4) visit(Rows<4>{first, count}, *block);
    if (size == 8) visit(Rows<8>{first, count}, *block);
  }
}

/// What the values of a tile are multiplied by: weights and norms.
template <std::size_t kTile, std::size_t kRows>
inline void fill_factors(const AttendTask& task, const Tile& tile, Rows<kRows> rows, const float* norms,
                         RowBlock& block) noexcept {
  for (std::size_t i = 0; i < kTile * kRows; i += kLanes) {
    store(block.factors + i, load(block.weights + i) * (of_keys<kRows, Vec>(norms, i) * task.v_scale));
  }
  if (tile.is_seen_by_all) return;
  // 0 times a norm that is not finite is no 0.
  for (std::size_t r = 0; r < rows.count; ++r) {
    fill_outside<kTile>(block.factors, r, kRows, seen_of(task.seen[rows.first + r], tile), 0.0f);
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

/// What belongs to rows, values[0], values[kStride], ..., for all lanes of their block; 0 for rows without a meaning.
template <std::size_t kStride = 1, std::size_t kRows, class T>
inline void spread_rows(Rows<kRows> rows, const T* values, T* lanes) noexcept {
  for (std::size_t i = 0; i < kBlockLanes; ++i) {
    const std::size_t row = RowBlock::row_of_lane(i, kRows);
    lanes[i] = row < rows.count ? values[row * kStride] : T{};
  }
}

inline void begin_blocks(const AttendTask& task) noexcept {
  for_each_block(task, [&](auto rows, RowBlock& block) {
    spread_rows(rows, task.bias + rows.first, block.bias);
    for (std::size_t i = 0; i < kBlockLanes; ++i) {
      block.max[i] = -static_cast<double>(INFINITY);
      block.sum[i] = 0.0;
    }
  });
}

inline void end_blocks(const AttendTask& task) noexcept {
  for_each_block(task, [&](auto rows, const RowBlock& block) {
    for (std::size_t r = 0; r < rows.count; ++r) {
      task.max[rows.first + r] = block.max[RowBlock::first_lane(r)];
      task.sum[rows.first + r] = block.sum[RowBlock::first_lane(r)];
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
    for_each_block(task, [&](auto rows, RowBlock& block) { update_softmax<kTile>(task, tile, rows, block); });
    path.accumulate(tile);
  }
  end_blocks(task);
}

}  // namespace
}  // namespace tq_hb
