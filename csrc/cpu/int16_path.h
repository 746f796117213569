// Attention in sums of 16-bit products: the path of default precision.
//
// Levels, queries and weights are fixed-point numbers, scaled so that no 32-bit sum of their products can overflow,
// whatever the codes and norms are. A file that includes this one defines before:
//
//   Sums                        a vector of 32-bit sums
//   kChunk                      codes that are looked up at a time: 2 * kSumLanes of each of two vectors of levels
//   kSumShift                   by how many bits sums are cut so that those of all lanes can be added: log2(lanes)
//   kScoreRows, kAddRows        rows that share the loads of levels
//   Lookup<bits, plane, dim>    Lookup(levels), .at(row, chunk) -> Levels{Sums first, second}: of every 16 codes, first
//                               has the first 8 and second the others, 128 bits after 128 bits
//   interleave(a, b, low, high) the pairs (a_i, b_i) of 16-bit values, of every 8 the first 4 in low
//   add_products(sums, a, b)    sums + a_2i * b_2i + a_2i+1 * b_2i+1, for 32-bit lane i
//   add_across(sums[4])         the sums over all lanes, as Int4
//   broadcast_pair(p)           the 16-bit values at p and p + 1 in every 32-bit lane
#pragma once

#include "cpu/flash.h"

namespace tq_hb {
namespace {

constexpr std::size_t kSumLanes = sizeof(Sums) / sizeof(std::int32_t);
/// Coordinates whose products are summed in one vector of sums: 16 to a lane, since more would cost accuracy.
constexpr std::size_t kDotPart = 16 * kSumLanes;

template <std::size_t kHeadDim>
constexpr std::size_t kDotDim = kHeadDim < kDotPart ? kHeadDim : kDotPart;

/// Where the lookup leaves coordinate i of every 16: its place among vectors of levels.
inline std::size_t place_of(std::size_t j) noexcept {
  constexpr std::size_t kHalf = kChunk / 2;
  const std::size_t within = j % kChunk;
  return j - within + (within % 16 / 8) * kHalf + within / 16 * 8 + within % 8;
}

void quantize_query(const float* q, std::size_t head_dim, std::int16_t* values, double* units,
                    std::int32_t* halves) noexcept {
  const std::size_t dim = head_dim < kDotPart ? head_dim : kDotPart;
  for (std::size_t first = 0; first < head_dim; first += dim) {
    float placed[kDotPart];
    for (std::size_t j = 0; j < dim; ++j) placed[place_of(j)] = q[first + j];
    float lanes[kSumLanes] = {};
    float largest = 0.0f;
    for (std::size_t j = 0; j < dim; ++j) {
      const float magnitude = fabsf(placed[j]);
      lanes[j / 2 % kSumLanes] += magnitude;
      largest = magnitude > largest ? magnitude : largest;
    }
    float unit = largest / 32766.0f;
    for (const float lane : lanes) unit = lane / Int16Levels::kBudget > unit ? lane / Int16Levels::kBudget : unit;
    unit = unit > 1e-30f ? unit : 1e-30f;
    std::int32_t sum = 0;
    for (std::size_t j = 0; j < dim; ++j) {
      const std::int32_t value = static_cast<std::int32_t>(rintf(placed[j] / unit));
      values[first + j] = static_cast<std::int16_t>(value);
      sum += value;
    }
    units[first / dim] = static_cast<double>(unit) * (1 << kSumShift);
    halves[first / dim] = sum / (2 << kSumShift);
  }
}

/// The levels of some rows' codes, looked up and kept as 16-bit values.
template <std::size_t kHeadDim>
struct Decoder {
  void (*keys)(const HeadRows& side, const std::size_t* slots, std::int16_t* levels) noexcept;
  void (*values)(const HeadRows& side, const std::size_t* slots, std::size_t pairs, std::size_t chunk,
                 Sums* levels) noexcept;
};

constexpr std::size_t kKeyGroup = 8;

template <unsigned kBits, bool kPlane, std::size_t kHeadDim>
void decode_keys(const HeadRows& side, const std::size_t* slots, std::int16_t* levels) noexcept {
  const Lookup<kBits, kPlane, kHeadDim> lookup(side.int16->values);
  for (std::size_t t = 0; t < kKeyGroup; ++t) {
    const std::uint8_t* row = side.codes + slots[t] * side.row_bytes;
#pragma GCC unroll 16
    for (std::size_t chunk = 0; chunk < kHeadDim / kChunk; ++chunk) {
      const Levels looked_up = lookup.at(row, chunk);
      store(levels + t * kHeadDim + chunk * kChunk, looked_up.first);
      store(levels + t * kHeadDim + chunk * kChunk + kChunk / 2, looked_up.second);
    }
  }
}

/// One chunk of pairs of rows: of every 16 columns, vector i has those from 4 * i on, as pairs.
template <unsigned kBits, bool kPlane, std::size_t kHeadDim>
void decode_values(const HeadRows& side, const std::size_t* slots, std::size_t pairs, std::size_t chunk,
                   Sums* levels) noexcept {
  const Lookup<kBits, kPlane, kHeadDim> lookup(side.int16->values);
  for (std::size_t p = 0; p < pairs; ++p, levels += 4) {
    const Levels even = lookup.at(side.codes + slots[2 * p] * side.row_bytes, chunk);
    const Levels odd = lookup.at(side.codes + slots[2 * p + 1] * side.row_bytes, chunk);
    interleave(even.first, odd.first, levels[0], levels[1]);
    interleave(even.second, odd.second, levels[2], levels[3]);
  }
}

template <std::size_t kHeadDim>
Decoder<kHeadDim> decoder_of(const HeadRows& side) noexcept {
  switch (side.high_bits == 0 ? side.cbits : 10 * side.cbits) {
    case 5:
      return {decode_keys<5, false, kHeadDim>, decode_values<5, false, kHeadDim>};
    case 6:
      return {decode_keys<6, false, kHeadDim>, decode_values<6, false, kHeadDim>};
    case 50:
      return {decode_keys<5, true, kHeadDim>, decode_values<5, true, kHeadDim>};
    case 60:
      return {decode_keys<6, true, kHeadDim>, decode_values<6, true, kHeadDim>};
    default:
      return {decode_keys<8, false, kHeadDim>, decode_values<8, false, kHeadDim>};
  }
}

/// Asks for a row ahead of its use. Into the second cache level: rows a power of two apart share places in the first.
inline void prefetch_row(const HeadRows& side, std::size_t slot) noexcept {
  const std::uint8_t* row = side.codes + slot * side.row_bytes;
  for (std::size_t i = 0; i < side.row_bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
}

template <std::size_t kHeadDim>
class Int16Path {
 public:
  static constexpr std::size_t kTile = kAttendTile;

  explicit Int16Path(const AttendTask& task) noexcept
      : task_(task), k_(decoder_of<kHeadDim>(task.k)), v_(decoder_of<kHeadDim>(task.v)) {}

  void score(const Tile& tile) noexcept {
    alignas(64) std::int16_t levels[kKeyGroup * kHeadDim];
    for (std::size_t first = 0; first < tile.count; first += kKeyGroup) {
      for (std::size_t t = first; t < first + kKeyGroup; ++t) prefetch_row(task_.v, tile.slots[t]);
      k_.keys(task_.k, tile.slots + first, levels);
      double norms[kBlocks][kKeyGroup];
      for (std::size_t t = 0; t < kKeyGroup; ++t) {
        for (std::size_t b = 0; b < kBlocks; ++b) {
          norms[b][t] = static_cast<double>(task_.k.norms[tile.slots[first + t] * kBlocks + b]);
        }
      }
      for (std::size_t part = 0; part < kHeadDim / kDim; ++part) {
        for_each_group<kScoreRows>(task_.rows, [&](auto rows, std::size_t r) {
          constexpr std::size_t kKeys = decltype(rows)::value == 1 ? kKeyGroup : 4;
          for (std::size_t t = 0; t < kKeyGroup; t += kKeys) {
            score_rows<decltype(rows)::value, kKeys>(part, r, first + t, levels + t * kHeadDim,
                                                     norms[part * kDim / kBlockDim<kHeadDim>] + t);
          }
        });
      }
    }
  }

  void accumulate(const Tile& tile) noexcept {
    // An odd tile's last key is its own pair, with a weight of 0.
    const std::size_t pairs = (tile.count + 1) / 2;
    fix_weights(tile);
    alignas(64) Sums levels[kTile / 2 * 4];
    for (std::size_t chunk = 0; chunk < kHeadDim / kChunk; ++chunk) {
      v_.values(task_.v, tile.slots, pairs, chunk, levels);
      const std::size_t block = chunk * kChunk / kBlockDim<kHeadDim>;
      for_each_group<kAddRows>(task_.rows, [&](auto rows, std::size_t r) {
        add_rows<decltype(rows)::value>(block, chunk, r, pairs, levels);
      });
      prefetch_keys(tile, chunk);
    }
  }

  /// Puts the columns of the outputs in order.
  void finish() noexcept {
    for (std::size_t i = 0; i < task_.rows * kHeadDim; i += kChunk) {
      float* columns = task_.out + i;
      float sums[kChunk];
      store(sums, load_as<ChunkOfFloats>(columns));
      for (std::size_t j = 0; j < kChunk; j += 4) {
        const std::size_t vector = j % 16 / 4;
        store(columns + j, load_as<Float4>(sums + vector * kSumLanes + j / 16 * 4));
      }
    }
  }

 private:
  static constexpr std::size_t kBlocks = kNormBlocks<kHeadDim>;
  static constexpr std::size_t kDim = kDotDim<kHeadDim>;
  struct ChunkOfFloats {
    float values[kChunk];
  };

  template <std::size_t kRows, std::size_t kKeys>
  void score_rows(std::size_t part, std::size_t r, std::size_t first, const std::int16_t* keys,
                  const double* norms) noexcept {
    Sums sums[kRows][kKeys] = {};
    const std::int16_t* q = task_.q_int16.values + r * kHeadDim + part * kDim;
    keys += part * kDim;
    for (std::size_t i = 0; i < kDim; i += 2 * kSumLanes) {
      Sums query[kRows];
      for (std::size_t k = 0; k < kRows; ++k) query[k] = load_as<Sums>(q + k * kHeadDim + i);
#pragma GCC unroll 8
      for (std::size_t t = 0; t < kKeys; ++t) {
        const Sums key = load_as<Sums>(keys + t * kHeadDim + i);
#pragma GCC unroll 8
        for (std::size_t k = 0; k < kRows; ++k) sums[k][t] = add_products(sums[k][t], key, query[k]);
      }
    }
#pragma GCC unroll 8
    for (std::size_t k = 0; k < kRows; ++k) {
      const std::size_t at = (r + k) * kMaxDotParts + part;
#pragma GCC unroll 8
      for (std::size_t t = 0; t < kKeys; t += 4) {
        const Int4 dots = add_across(sums[k] + t) + task_.q_int16.halves[at];
        double* scores = task_.scratch[r + k].scores + first + t;
        const Double4 share =
            __builtin_convertvector(dots, Double4) * task_.q_int16.units[at] * load_as<Double4>(norms + t);
        store(scores, part == 0 ? share : load_as<Double4>(scores) + share);
      }
    }
  }

  /// Puts weight * norm of every row into fixed point, block by block.
  void fix_weights(const Tile& tile) noexcept {
    for (std::size_t b = 0; b < kBlocks; ++b) {
      alignas(64) float norms[kTile];
      for (std::size_t t = 0; t < kTile; ++t) norms[t] = task_.v.norms[tile.slots[t] * kBlocks + b] * task_.v_scale;
      for (std::size_t r = 0; r < task_.rows; ++r) {
        RowScratch& row = task_.scratch[r];
        alignas(64) float weights[kTile];
        for (std::size_t t = 0; t < kTile; t += kLanes) store(weights + t, load(row.weights + t) * load(norms + t));
        // 0 times a norm that is not finite is no 0.
        const Span seen = seen_of(task_.seen[r], tile);
        fill_outside<kTile>(weights, seen.begin < seen.end ? seen : Span{kTile, kTile}, 0.0f);
        fix_row(weights, b, row);
      }
    }
  }

  void fix_row(const float* weights, std::size_t b, RowScratch& row) noexcept {
    Vec sums{}, largest{};
    for (std::size_t t = 0; t < kTile; t += kLanes) {
      const Vec weight = load(weights + t);
      const Vec magnitude = weight < 0.0f ? -weight : weight;
      sums += magnitude;
      largest = magnitude > largest ? magnitude : largest;
    }
    const float total = sum_of_lanes(sums);
    if (!(total < INFINITY)) {  // must show in the output, and has no fixed point
      for (std::int16_t& weight : row.fixed_weights[b]) weight = 0;
      row.halves[b] = 0;
      row.fixed_units[b] = NAN;
      return;
    }
    float unit = 1e-37f;
    for (std::size_t i = 0; i < kLanes; ++i) unit = largest[i] / 32766.0f > unit ? largest[i] / 32766.0f : unit;
    unit = total / Int16Levels::kBudget > unit ? total / Int16Levels::kBudget : unit;
    const float inverse = 1.0f / unit;
    IntVec sum{};
    for (std::size_t t = 0; t < kTile; t += kLanes) {
      const IntVec fixed = nearest(load(weights + t) * inverse);
      store(row.fixed_weights[b] + t, __builtin_convertvector(fixed, ShortVec));
      sum += fixed;
    }
    std::int32_t half = 0;
    for (std::size_t i = 0; i < kLanes; ++i) half += sum[i] / 2;
    row.halves[b] = half;
    row.fixed_units[b] = unit * static_cast<float>(task_.v.int16->unit);
  }

  /// Adds weights * values of one chunk of columns to kRows rows from `r` on.
  template <std::size_t kRows>
  void add_rows(std::size_t block, std::size_t chunk, std::size_t r, std::size_t pairs, const Sums* levels) noexcept {
    Sums sums[kRows][4];
    for (std::size_t k = 0; k < kRows; ++k) {
      for (std::size_t i = 0; i < 4; ++i) sums[k][i] = fill(task_.scratch[r + k].halves[block]);
    }
    for (std::size_t p = 0; p < pairs; ++p, levels += 4) {
#pragma GCC unroll 8
      for (std::size_t k = 0; k < kRows; ++k) {
        const Sums weights = broadcast_pair(task_.scratch[r + k].fixed_weights[block] + 2 * p);
#pragma GCC unroll 4
        for (std::size_t i = 0; i < 4; ++i) sums[k][i] = add_products(sums[k][i], levels[i], weights);
      }
    }
    for (std::size_t k = 0; k < kRows; ++k) {
      const RowScratch& row = task_.scratch[r + k];
      float* out = task_.out + (r + k) * kHeadDim + chunk * kChunk;
      for (std::size_t i = 0; i < 4; ++i, out += kSumLanes) {
        const Vec added = __builtin_convertvector(load_as<IntVec>(&sums[k][i]), Vec);
        store(out, load(out) * row.correction + added * row.fixed_units[block]);
      }
    }
  }

  /// Asks for a share of the next tile's keys.
  void prefetch_keys(const Tile& tile, std::size_t chunk) noexcept {
    constexpr std::size_t kShare = (kTile * kChunk + kHeadDim - 1) / kHeadDim;
    for (std::size_t t = chunk * kShare; t < (chunk + 1) * kShare && t < kTile; ++t) {
      const std::size_t slot = tile.slots[t] + kTile;
      prefetch_row(task_.k, slot < task_.capacity ? slot : slot - task_.capacity);
    }
  }

  const AttendTask& task_;
  Decoder<kHeadDim> k_, v_;
};

void attend_int16(const AttendTask& task) noexcept {
#define TQ_ATTEND(size) \
  if (task.head_dim == size) return attend_range<Int16Path<size>>(task);
  TQ_HB_FOR_EACH_HEAD_DIM(TQ_ATTEND)
#undef TQ_ATTEND
}

}  // namespace
}  // namespace tq_hb
