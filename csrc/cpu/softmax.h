// The softmax over a tile of keys, of all rows of a block at once.
//
// Lanes are those of RowBlock: as many vectors as hold kBlockLanes values are worked on together. Only where a row's
// lanes, each with keys of its own, have to agree do values cross lanes.
#pragma once

#include <math.h>

#include "cpu/tile.h"

namespace tq_hb {
namespace {

/// Vectors of floats and of doubles that kBlockLanes values take up.
constexpr std::size_t kVecs = kBlockLanes / kLanes;
constexpr std::size_t kDoubleVecs = kBlockLanes / kDoubles;

/// Joins lanes i and i ^ kStep, so that both have the result.
template <std::size_t kStep, class V, std::size_t kCount, class Join>
inline void join_lanes(V (&lanes)[kCount], const Join& join) noexcept {
  constexpr std::size_t kEach = kBlockLanes / kCount;
  if constexpr (kStep < kEach) {
    for (std::size_t v = 0; v < kCount; ++v) lanes[v] = join(lanes[v], exchanged<kStep>(lanes[v]));
  } else {
    constexpr std::size_t kApart = kStep / kEach;
    for (std::size_t v = 0; v < kCount; ++v) {
      if (v & kApart) continue;
      lanes[v] = lanes[v + kApart] = join(lanes[v], lanes[v + kApart]);
    }
  }
}

/// Joins all lanes of each of kRows rows, those of keys far apart first.
template <std::size_t kRows, std::size_t kStep = kBlockLanes / 2, class V, std::size_t kCount, class Join>
inline void join_rows(V (&lanes)[kCount], const Join& join) noexcept {
  if constexpr (kStep >= 2 * kRows) {
    join_lanes<kStep>(lanes, join);
    join_rows<kRows, kStep / 2>(lanes, join);
  } else {
    join_lanes<1>(lanes, join);
  }
}

constexpr auto kAdd = [](auto a, auto b) { return a + b; };
constexpr auto kLarger = [](auto a, auto b) { return max(a, b); };

/// Pairs of values in the places of one vector of V with kRows rows: each of them kRows times.
template <std::size_t kRows, class V>
inline V spread_pairs(const float* values) noexcept {
  constexpr std::size_t kPairs = sizeof(V) / sizeof(double);
  if constexpr (kRows == 1) {
    return load_as<V>(values);
  } else if constexpr (kRows >= kPairs) {
    using Wide = typename VectorOf<std::int64_t, kPairs>::type;
    const Wide pairs = Wide{} + load_as<std::int64_t>(values);
    return reinterpret_cast<V>(pairs);
#if defined(__AVX__)
  } else if constexpr (kPairs == 4) {
    const __m128d two = load_as<__m128d>(values);
    return reinterpret_cast<V>(
        _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_unpacklo_pd(two, two)), _mm_unpackhi_pd(two, two), 1));
#endif
#if defined(__AVX512F__)
  } else if constexpr (kRows == 2) {
    return reinterpret_cast<V>(_mm512_permutexvar_pd(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3),
                                                     _mm512_castpd256_pd512(load_as<__m256d>(values))));
  } else {
    return reinterpret_cast<V>(_mm512_permutexvar_pd(_mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1),
                                                     _mm512_castpd128_pd512(load_as<__m128d>(values))));
#endif
  }
}

/// What belongs to keys, in one vector's places from `place` on.
template <std::size_t kRows, class V>
inline V of_keys(const float* values, std::size_t place) noexcept {
  return spread_pairs<kRows, V>(values + place / (2 * kRows) * 2);
}

inline double capped(double score, double softcap) noexcept {
  return softcap * tanh(score / softcap);
}

/// Softcaps scores and leaves those of keys that a row does not see at -inf.
template <std::size_t kTile, std::size_t kRows>
void mask_scores(const AttendTask& task, const Tile& tile, Rows<kRows> rows, RowBlock& block) noexcept {
  for (std::size_t r = 0; r < rows.count; ++r) {
    const Span seen = seen_of(task.seen[rows.first + r], tile);
    if (task.softcap > 0.0) {
      for (std::size_t t = seen.begin; t < seen.end; ++t) {
        double& score = block.scores[RowBlock::place_of(t, r, kRows)];
        score = capped(score, task.softcap);
      }
    }
    fill_outside<kTile>(block.scores, r, kRows, seen, -static_cast<double>(INFINITY));
  }
}

/// The sum of vectors kStep apart: those that are far apart are added first. join_rows goes on in that way, so a row's
/// sum has the same bits in every block.
template <std::size_t kPlaces, std::size_t kStep = kBlockLanes>
inline Vec sum_over_keys(const float* values) noexcept {
  if constexpr (kStep == kPlaces) {
    return load(values);
  } else {
    return sum_over_keys<kPlaces, 2 * kStep>(values) + sum_over_keys<kPlaces, 2 * kStep>(values + kStep);
  }
}

/// Turns scores into weights, and the rows' maxima and sums into those that include them.
template <std::size_t kTile, std::size_t kRows>
void update_softmax(const AttendTask& task, const Tile& tile, Rows<kRows> rows, RowBlock& block) noexcept {
  constexpr std::size_t kPlaces = kTile * kRows;
  if (task.has_bias) {
    for (std::size_t i = 0; i < kPlaces; i += kDoubles) {
      store(block.scores + i, load_as<Doubles>(block.scores + i) + load_as<Doubles>(block.bias + i % kBlockLanes));
    }
  }
  if (task.softcap > 0.0 || !tile.is_seen_by_all) mask_scores<kTile>(task, tile, rows, block);

  Doubles before[kDoubleVecs], max[kDoubleVecs];
  for (std::size_t v = 0; v < kDoubleVecs; ++v) before[v] = max[v] = load_as<Doubles>(block.max + v * kDoubles);
  for (std::size_t i = 0; i < kPlaces; i += kBlockLanes) {
    for (std::size_t v = 0; v < kDoubleVecs; ++v) {
      max[v] = kLarger(load_as<Doubles>(block.scores + i + v * kDoubles), max[v]);
    }
  }
  join_rows<kRows>(max, kLarger);
  for (std::size_t v = 0; v < kDoubleVecs; ++v) {
    store(block.max + v * kDoubles, max[v]);
    // Equal where no key has been seen, too: a difference of infinities would be NaN.
    before[v] = before[v] < max[v] ? before[v] - max[v] : Doubles{};
    // Of -inf nothing can be subtracted, either.
    max[v] = max[v] > -static_cast<double>(INFINITY) ? max[v] : Doubles{};
  }
  Vec corrections[kVecs];
  for (std::size_t v = 0; v < kVecs; ++v) {
    corrections[v] = exp_of_negative(to_floats(before + v * kVecDoubles));
    store(block.corrections + v * kLanes, corrections[v]);
  }
  for (std::size_t i = 0; i < kPlaces; i += kBlockLanes) {
    for (std::size_t v = 0; v < kVecs; ++v) {
      Doubles scores[kVecDoubles];
      for (std::size_t p = 0; p < kVecDoubles; ++p) {
        scores[p] = load_as<Doubles>(block.scores + i + v * kLanes + p * kDoubles) - max[v * kVecDoubles + p];
      }
      store(block.weights + i + v * kLanes, exp_of_negative(to_floats(scores)));
    }
  }
  Vec sums[kVecs];
  for (std::size_t v = 0; v < kVecs; ++v) sums[v] = sum_over_keys<kPlaces>(block.weights + v * kLanes);
  join_rows<kRows>(sums, kAdd);
  for (std::size_t v = 0; v < kVecs; ++v) {
    Doubles correction[kVecDoubles], added[kVecDoubles];
    to_doubles(corrections[v], correction);
    to_doubles(sums[v], added);
    for (std::size_t p = 0; p < kVecDoubles; ++p) {
      double* sum = block.sum + v * kLanes + p * kDoubles;
      store(sum, load_as<Doubles>(sum) * correction[p] + added[p]);
    }
  }
}

}  // namespace
}  // namespace tq_hb
