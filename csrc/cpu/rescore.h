// Exact scores of the keys that a row's output hangs on: see decisive_keys.h. They are noted, and when a row's ranges
// have been merged, scored again in float32.
//
// Keys that have much in common share an error, too, which divides out. Were it taken out of some scores alone, it
// would become a difference between them and the rest. References, which are keys of any weight, tell how large it is,
// and it is taken out of all scores.
#pragma once

#include "cpu/float32_lookup.h"

namespace tq_hb {
namespace {

/// Notes keys of a range, tile by tile.
template <std::size_t kHeadDim>
class NoteTaker {
 public:
  explicit NoteTaker(const AttendTask& task) noexcept : task_(task) {
    for (std::size_t r = 0; r < task.rows; ++r) {
      task.notes[r].reach = 0.0;
      task.notes[r].num_decisive = task.notes[r].num_references = 0;
    }
  }

  /// A tile with these norms is to be scored.
  void expect(const TileNorms<kAttendTile, kNormBlocks<kHeadDim>>& norms) noexcept {
    Vec largest{};
    for (std::size_t b = 0; b < kNormBlocks<kHeadDim>; ++b) {
      for (std::size_t t = 0; t < kAttendTile; t += kLanes) {
        largest = max(magnitude(load(norms.of_block[b] + t)), largest);
      }
    }
    largest_norm_ = max_of_lanes(largest);
  }

  /// That tile has its weights.
  void take(const Tile& tile) noexcept {
    for_each_block(task_, [&](auto rows, const RowBlock& block) { take_block(tile, rows, block); });
  }

 private:
  template <std::size_t kRows>
  void take_block(const Tile& tile, Rows<kRows> rows, const RowBlock& block) noexcept {
    alignas(64) float least[kBlockLanes];
    std::uint32_t noted_lanes = 0;
    for (std::size_t r = 0; r < rows.count; ++r) {
      const double per_norm = task_.q_int16.reach_per_norm[rows.first + r];
      if (!is_noted(per_norm * static_cast<double>(largest_norm_), block, r)) continue;
      // What a row does not see is not to touch it, not even by its norm.
      const Span seen = seen_of(task_.seen[rows.first + r], tile);
      const bool sees_all = seen.begin == 0 && seen.end == tile.count;
      const double reach = per_norm * static_cast<double>(sees_all ? largest_norm_ : largest_norm_of(tile, seen));
      if (!is_noted(reach, block, r)) continue;
      NotedKeys& noted = task_.notes[rows.first + r];
      if (reach > noted.reach) noted.reach = reach;
      const float share = static_cast<float>(1.0 / reach);
      for_each_lane<kRows>(r, [&](std::size_t i) {
        least[i] = share > kLeastWeight ? share : kLeastWeight;
        noted_lanes |= std::uint32_t{1} << i;
      });
      if (reach > kFarReach && noted.num_references == 0) note_references(noted, block, r, kRows, tile, seen);
    }
    if (noted_lanes == 0) return;
    for (std::size_t i = 0; i < kBlockLanes; ++i) {
      if (!(noted_lanes >> i & 1)) least[i] = INFINITY;
    }
    for (std::size_t group = 0; group < kWeightGroups; ++group) note_decisive(block, least, tile, rows, group);
  }

  template <std::size_t kRows, class Visit>
  static void for_each_lane(std::size_t row, const Visit& visit) noexcept {
    for (std::size_t i = RowBlock::first_lane(row); i < kBlockLanes; i += 2 * kRows) {
      visit(i);
      visit(i + 1);
    }
  }

  /// Whether a tile of this reach may have keys to note: beyond kReach any, up to there one that has much of the weight
  /// of all that has been seen.
  static bool is_noted(double reach, const RowBlock& block, std::size_t r) noexcept {
    if (!(reach > kSmallReach)) return false;
    return reach > kReach || (block.corrections[RowBlock::first_lane(r)] < 1.0f &&
                              block.sum[RowBlock::first_lane(r)] < 1.0 / kOutstandingShare);
  }

  /// Of the largest so far: keys with less are many, where they matter.
  static constexpr float kLeastWeight = 0.125f;
  /// Of one weight group: so many keys of such weight share it.
  static constexpr int kMany = 6;

  float largest_norm_of(const Tile& tile, const Span& seen) const noexcept {
    constexpr std::size_t kBlocks = kNormBlocks<kHeadDim>;
    float largest = 0.0f;
    for (std::size_t t = seen.begin; t < seen.end; ++t) {
      for (std::size_t b = 0; b < kBlocks; ++b) {
        const float norm = __builtin_fabsf(task_.k.norms[tile.slots[t] * kBlocks + b]);
        largest = norm > largest ? norm : largest;
      }
    }
    return largest;
  }

  /// Of the keys of a weight group those whose weight is above the least of their lane, unless a row has many.
  template <std::size_t kRows>
  void note_decisive(const RowBlock& block, const float* least, const Tile& tile, Rows<kRows> rows,
                     std::size_t group) noexcept {
    constexpr std::size_t kSteps = kWeightGroup * kRows / kBlockLanes;
    const std::size_t begin = group * kWeightGroup * kRows;
    std::uint32_t above[kSteps] = {}, any = 0;
    for (std::size_t i = 0; i < kSteps; ++i) {
      for (std::size_t v = 0; v < kBlockLanes; v += kLanes) {
        above[i] |= lanes_above(load(block.weights + begin + i * kBlockLanes + v), load(least + v)) << v;
      }
      any |= above[i];
    }
    if (any == 0) return;
    for (std::size_t r = 0; r < rows.count; ++r) {
      std::uint32_t lanes = 0;
      for_each_lane<kRows>(r, [&](std::size_t i) { lanes |= std::uint32_t{1} << i; });
      if ((any & lanes) == 0) continue;
      int count = 0;
      for (std::size_t i = 0; i < kSteps; ++i) count += __builtin_popcount(above[i] & lanes);
      if (count > kMany) continue;
      for (std::size_t i = 0; i < kSteps; ++i) {
        for (std::uint32_t left = above[i] & lanes; left != 0; left &= left - 1) {
          const std::size_t place = begin + i * kBlockLanes + static_cast<std::size_t>(__builtin_ctz(left));
          insert(task_.notes[rows.first + r], {block.scores[place], tile.slots[RowBlock::key_of(place, kRows)]});
        }
      }
    }
  }

  /// In the place of the lowest if there are as many as may be.
  static void insert(NotedKeys& noted, const ScoredKey& key) noexcept {
    constexpr std::size_t kMost = NotedKeys::kMostDecisive;
    if (noted.num_decisive < kMost) {
      noted.decisive[noted.num_decisive++] = key;
      if (noted.num_decisive < kMost) return;
    } else if (key.score > noted.decisive[noted.lowest].score) {
      noted.decisive[noted.lowest] = key;
    } else {
      return;
    }
    noted.lowest = 0;
    for (std::size_t i = 1; i < kMost; ++i) {
      if (noted.decisive[i].score < noted.decisive[noted.lowest].score) noted.lowest = i;
    }
  }

  static void note_references(NotedKeys& noted, const RowBlock& block, std::size_t row, std::size_t rows,
                              const Tile& tile, const Span& seen) noexcept {
    constexpr std::size_t kStep = kAttendTile / NotedKeys::kMostReferences;
    for (std::size_t t = seen.begin; t < seen.end; t += kStep) {
      noted.references[noted.num_references++] = {block.scores[RowBlock::place_of(t, row, rows)], tile.slots[t]};
    }
  }

  const AttendTask& task_;
  float largest_norm_ = 0.0f;
};

template <std::size_t kHeadDim>
class Rescoring {
 public:
  explicit Rescoring(const RescoreTask& task) noexcept : task_(task) { place_query(task.q, kHeadDim, q_); }

  double run() noexcept {
    const ChosenKeys& chosen = task_.chosen;
    double changes[ChosenKeys::kMostKeys], shared = 0.0;
    for (std::size_t i = 0; i < chosen.num_keys; ++i) changes[i] = change_of(chosen.keys[i]);
    for (std::size_t i = 0; i < chosen.num_references; ++i) shared += change_of(chosen.references[i]);
    if (chosen.num_references > 0) shared /= static_cast<double>(chosen.num_references);
    for (std::size_t i = 0; i < chosen.num_keys; ++i) change_weight(chosen.keys[i], changes[i] - shared);
    for (std::size_t j = 0; j < kHeadDim; j += kLanes) store(task_.out + j, load(task_.out + j) + load(added_ + j));
    return shared;
  }

 private:
  static constexpr std::size_t kBlocks = kNormBlocks<kHeadDim>, kDim = kBlockDim<kHeadDim>;
  /// Of a score, so that sums keep their order of magnitude. Errors are that large at a reach of thousands.
  static constexpr double kMostChange = 1.0;

  const float* decode(const HeadRows& side, std::size_t slot, std::size_t block) noexcept {
    const std::uint8_t* row = row_of(side, slot);
    ByteTableDecoder<kHeadDim>::decode(side, &row, 1, block, UpcomingCodes{row, 0}, levels_);
    return levels_;
  }

  double change_of(const ScoredKey& key) noexcept {
    double score = 0.0;
    for (std::size_t b = 0; b < kBlocks; ++b) {
      const float *levels = decode(task_.k, key.slot, b), *q = q_ + b * kDim;
      Vec sums[2] = {};
      for (std::size_t j = 0; j < kDim; j += 2 * kLanes) {
        sums[0] += load(levels + j) * load(q + j);
        sums[1] += load(levels + j + kLanes) * load(q + j + kLanes);
      }
      const float norm = task_.k.norms[key.slot * kBlocks + b];
      score += static_cast<double>(sum_of_lanes(sums[0] + sums[1])) * static_cast<double>(norm);
    }
    score = score * task_.q_scale + task_.bias;
    if (task_.softcap > 0.0) score = capped(score, task_.softcap);
    const double change = score - key.score;
    if (change > kMostChange) return kMostChange;
    return change < -kMostChange ? -kMostChange : change;
  }

  void change_weight(const ScoredKey& key, double change) noexcept {
    const double before = key.score - task_.max;
    Vec exponents{};  // which may be a little above 0 here, where exp_of_negative is as good
    exponents[0] = static_cast<float>(before);
    exponents[1] = static_cast<float>(before + change);
    const Vec weights = exp_of_negative(exponents);
    const float added = weights[1] - weights[0];
    *task_.sum += static_cast<double>(added);
    for (std::size_t b = 0; b < kBlocks; ++b) {
      const float* levels = decode(task_.v, key.slot, b);
      const float factor = added * (task_.v.norms[key.slot * kBlocks + b] * task_.v_scale);
      for (std::size_t j = b * kDim; j < (b + 1) * kDim; j += kLanes, levels += kLanes) {
        store(added_ + j, load(added_ + j) + factor * load(levels));
      }
    }
  }

  const RescoreTask& task_;
  alignas(64) float levels_[kDim];  // of a norm block of K or V
  // In the order of those.
  alignas(64) float q_[kHeadDim];
  alignas(64) float added_[kHeadDim] = {};
};

double rescore(const RescoreTask& task) noexcept {
#define TQ_RESCORE(size) \
  if (task.head_dim == size) return Rescoring<size>(task).run();
  TQ_HB_FOR_EACH_HEAD_DIM(TQ_RESCORE)
#undef TQ_RESCORE
  return 0.0;
}

}  // namespace
}  // namespace tq_hb
