// Attention in sums of 16-bit products: the path of default precision.
//
// Levels, queries and weights are fixed-point numbers, scaled so that no 32-bit sum of their products can overflow,
// whatever the codes and norms are. A file that includes this one defines before:
//
//   Sums                        a vector of 32-bit sums
//   kChunk                      codes that are looked up at a time: 2 * kSumLanes of each of two vectors of levels
//   kSumShift                   by how many bits sums are cut so that those of all lanes can be added: log2(lanes)
//   kDecodedKeys                keys that more rows than a block has share once they are decoded
//   kDots                       sums of products with keys that stay in registers, of some rows and some keys
//   kValueRows                  rows whose sums over a chunk of values stay in registers
//   kFusedRows                  rows at most that values are multiplied by as they are looked up
//   kFusedSums                  sums over columns of values that stay in registers meanwhile
//   kNearRows                   rows at most whose codes may be fetched into the first cache level
//   CodeReader<bits, plane, dim>
//                               ::at(row, chunk) -> codes of a chunk, of a type of its own; of planes also kBlock, the
//                               codes whose planes lie together, and kChunks, their chunks
//   Lookup<bits>                Lookup(levels), .of(codes) -> Levels{Sums first, second}: of every 16 codes, first has
//                               the first 8 and second the others, 128 bits after 128 bits
//   pairs_of<Reader>(lookup, even, odd, chunk)
//                               -> PairLevels{Sums vectors[4]} of two rows: of every 16 codes, vector i has those from
//                               4 * i on as pairs that share a lane
//   add_products(sums, a, b)    sums + two products of 16-bit values, for every 32-bit lane
//   kLaneStep                   a power of two: add_products adds the products of 16-bit values i and i ^ kLaneStep
//                               to the same lane
//   add(a, b), cut<bits>(a)     a + b, a / 2^bits, lane by lane
//   sums_across(sums)           the sums over all lanes of each of kSumLanes sums, cut by kSumShift
//   fill(value)                 the value in every lane
//   broadcast_pair(p)           the 16-bit values at p and p + 1, where pairs_of puts even and odd
//   pin(sums)                   keeps the compiler from adding in another order, which would take more registers
#pragma once

#include "cpu/flash.h"
#include "cpu/rescore.h"

namespace tq_hb {
namespace {

constexpr std::size_t kSumLanes = sizeof(Sums) / sizeof(std::int32_t);
/// Coordinates whose products are summed in one vector of sums: 16 to a lane, since more would cost accuracy.
constexpr std::size_t kDotPart = 16 * kSumLanes;

template <std::size_t kHeadDim>
constexpr std::size_t kPartDim = kBlockDim<kHeadDim> < kDotPart ? kBlockDim<kHeadDim> : kDotPart;
template <std::size_t kHeadDim>
constexpr std::size_t kParts = kBlockDim<kHeadDim> / kPartDim<kHeadDim>;
/// By how many bits sums of a part are cut so that those of all parts can be added.
template <std::size_t kHeadDim>
constexpr unsigned kPartShift = kParts<kHeadDim> == 4   ? 2
                                : kParts<kHeadDim> == 2 ? 1
                                                        : 0;

/// Where the lookup leaves coordinate j of a chunk: its place among vectors of levels.
constexpr std::size_t place_of(std::size_t j) noexcept {
  return j % 16 / 8 * (kChunk / 2) + j / 16 * 8 + j % 8;
}

double quantize_query(const float* q, std::size_t head_dim, std::int16_t* values, double* units,
                      std::int32_t* halves) noexcept {
  constexpr std::size_t kPairs = 2 * kLanes;  // coordinates whose products go to the lanes of one vector of sums
  static_assert(kLanes == kSumLanes, "a product of 32 bits for every float");
  const std::size_t block_dim = head_dim < kNormBlock ? head_dim : kNormBlock;
  Vec squares{};
  for (std::size_t first = 0; first < head_dim; first += block_dim) {
    float placed[kNormBlock];
    for (std::size_t chunk = 0; chunk < block_dim; chunk += kChunk) {
#pragma GCC unroll 8
      for (std::size_t j = 0; j < kChunk; j += 8) {
        __builtin_memcpy(placed + chunk + place_of(j), q + first + chunk + j, 8 * sizeof(*q));
      }
    }
    float unit = 1e-30f;
    for (std::size_t part = 0; part < block_dim; part += kDotPart) {
      const std::size_t end = part + kDotPart < block_dim ? part + kDotPart : block_dim;
      Vec sums[2] = {}, largest{};
      for (std::size_t j = part; j < end; j += kPairs) {
        for (std::size_t i = 0; i < 2; ++i) {
          const Vec value = magnitude(load(placed + j + i * kLanes));
          sums[i] += value;
          squares += value * value;
          largest = max(largest, value);
        }
      }
      float lanes[kPairs];
      __builtin_memcpy(lanes, sums, sizeof(lanes));
      Vec pairs{};
      for (std::size_t i = 0; i < kPairs; i += kLanes) {
        Vec partners;
        for (std::size_t lane = 0; lane < kLanes; ++lane) partners[lane] = lanes[(i + lane) ^ kLaneStep];
        pairs = max(pairs, load(lanes + i) + partners);
      }
      const float sum = max_of_lanes(pairs), single = max_of_lanes(largest);
      unit = single / 32766.0f > unit ? single / 32766.0f : unit;
      unit = sum / Int16Levels::kBudget > unit ? sum / Int16Levels::kBudget : unit;
    }
    const float inverse = 1.0f / unit;
    IntVec total{};
    for (std::size_t j = 0; j < block_dim; j += kLanes) {
      const IntVec value = nearest(load(placed + j) * inverse);
      store(values + first + j, __builtin_convertvector(value, ShortVec));
      total += value;
    }
    const std::int32_t sum = sum_of_lanes(total);
    const std::int32_t parts = static_cast<std::int32_t>(block_dim > kDotPart ? block_dim / kDotPart : 1);
    const std::int32_t divisor = parts << kSumShift;
    units[first / block_dim] = static_cast<double>(unit) * divisor;
    halves[first / block_dim] = sum / (2 * divisor);
  }
  return __builtin_sqrt(static_cast<double>(sum_of_lanes(squares)));
}

/// Keys whose codes are looked up when they are used.
template <class Reader, class CodesLookup>
struct CodedKeys {
  [[gnu::always_inline]] Levels at(std::size_t key, std::size_t chunk) const noexcept {
    return lookup.of(Reader::at(codes[key], chunk));
  }
  const CodesLookup& lookup;
  const std::uint8_t* const* codes;
};

/// Keys that have been looked up.
template <std::size_t kHeadDim>
struct DecodedKeys {
  Levels at(std::size_t key, std::size_t chunk) const noexcept {
    const std::int16_t* first = levels + key * kHeadDim + chunk * kChunk;
    return {load_as<Sums>(first), load_as<Sums>(first + kChunk / 2)};
  }
  const std::int16_t* levels;
};

/// The same pointer, of which the compiler does not know that: it would load what is there once for many keys, into
/// more registers than there are.
template <class T>
inline const T* not_hoisted(const T* pointer) noexcept {
  asm("" : "+r"(pointer));
  return pointer;
}

/// Keys that kRows rows of queries are multiplied by at a time. Several share the load of a query, and a product need
/// not wait for the one before it.
template <std::size_t kRows>
constexpr std::size_t kKeysAtOnce = kDots < 2 * kRows   ? 1
                                    : kDots < 4 * kRows ? 2
                                                        : 4;

constexpr std::size_t larger(std::size_t a, std::size_t b) noexcept {
  return a > b ? a : b;
}

/// Keys whose dot products with kRows rows of a block are finished together: pairs, and as many as fill a vector.
template <std::size_t kRows>
constexpr std::size_t kKeysTogether = larger(larger(2, kKeysAtOnce<kRows>), kSumLanes / kRows);

/// Those dot products, in their places, still apart in lanes.
template <std::size_t kHeadDim, std::size_t kRows>
struct DotSums {
  Sums sums[kNormBlocks<kHeadDim>][kRows * kKeysTogether<kRows>];
};

/// Multiplies some keys, of a group those from `t` on, by kRows queries.
template <std::size_t kHeadDim, std::size_t kRows, class Keys>
inline void multiply_keys(const Keys& keys, const std::int16_t* q, std::size_t t,
                          DotSums<kHeadDim, kRows>& dots) noexcept {
  constexpr std::size_t kPart = kPartDim<kHeadDim>, kKeys = kKeysAtOnce<kRows>;
  static_assert(kKeysTogether<kRows> % kKeys == 0);
  // place_of(t, 0, kRows): where t is even, which the compiler does not know, a product does.
  const std::size_t first_place = kKeys > 1 ? t * kRows : RowBlock::place_of(t, 0, kRows);
#pragma GCC unroll 1
  for (std::size_t b = 0; b < kNormBlocks<kHeadDim>; ++b) {
#pragma GCC unroll 1
    for (std::size_t part = 0; part < kParts<kHeadDim>; ++part) {
      Sums sums[kRows][kKeys] = {};
#pragma GCC unroll 8
      for (std::size_t i = 0; i < kPart; i += kChunk) {
        const std::size_t at = b * kBlockDim<kHeadDim> + part * kPart + i;
        Levels levels[kKeys];
#pragma GCC unroll 4
        for (std::size_t j = 0; j < kKeys; ++j) levels[j] = keys.at(t + j, at / kChunk);
#pragma GCC unroll 8
        for (std::size_t k = 0; k < kRows; ++k) {
          const std::int16_t* row = q + k * kHeadDim + at;
          Levels query{load_as<Sums>(row), load_as<Sums>(row + kChunk / 2)};
          if constexpr (kKeys > 1) {
            // Kept from being loaded once for every key.
            pin(query.first);
            pin(query.second);
          }
#pragma GCC unroll 4
          for (std::size_t j = 0; j < kKeys; ++j) {
            sums[k][j] = add_products(sums[k][j], levels[j].first, query.first);
            sums[k][j] = add_products(sums[k][j], levels[j].second, query.second);
            pin(sums[k][j]);
          }
        }
      }
#pragma GCC unroll 8
      for (std::size_t k = 0; k < kRows; ++k) {
#pragma GCC unroll 4
        for (std::size_t j = 0; j < kKeys; ++j) {
          Sums& whole = dots.sums[b][first_place + RowBlock::place_of(j, k, kRows)];
          const Sums share = cut<kPartShift<kHeadDim>>(sums[k][j]);
          whole = part == 0 ? share : add(whole, share);
        }
      }
    }
  }
}

template <std::size_t kHeadDim>
using KeyNorms = TileNorms<kAttendTile, kNormBlocks<kHeadDim>>;

/// Scores of a block and some keys of a tile from `first` on, out of their dot products.
template <std::size_t kHeadDim, std::size_t kRows>
inline void finish_scores(RowBlock& block, const KeyNorms<kHeadDim>& norms, std::size_t first,
                          const DotSums<kHeadDim, kRows>& dots) noexcept {
  for (std::size_t b = 0; b < kNormBlocks<kHeadDim>; ++b) {
#pragma GCC unroll 2
    for (std::size_t i = 0; i < kRows * kKeysTogether<kRows>; i += kLanes) {
      const std::size_t place = first * kRows + i, lane = place % kBlockLanes;
      Doubles sums[kVecDoubles];
      to_doubles(sums_across(dots.sums[b] + i) + load_as<IntVec>(block.score_halves[b] + lane), sums);
#pragma GCC unroll 2
      for (std::size_t p = 0; p < kVecDoubles; ++p) {
        const std::size_t at = p * kDoubles;
        const Doubles key_norms = to_doubles(of_keys<kRows, DoublesAsFloats>(norms.of_block[b], place + at));
        const Doubles share = sums[p] * load_as<Doubles>(block.score_units[b] + lane + at) * key_norms;
        double* score = block.scores + place + at;
        store(score, b == 0 ? share : load_as<Doubles>(score) + share);
      }
    }
  }
}

/// Pairs of values whose weights have a fixed point in common.
constexpr std::size_t kGroupPairs = kWeightGroup / 2;
/// Vectors of levels that a chunk of two values is looked up into.
constexpr std::size_t kPairVectors = 4;

/// Values whose codes are looked up when they are used, of a chunk kVectors vectors at a time. While all of them are
/// looked up, all upcoming codes are asked for.
template <class Reader, class CodesLookup, std::size_t kVectors, bool kNear>
struct CodedPairs {
  [[gnu::always_inline]] PairLevels at(std::size_t p, std::size_t chunk) const noexcept {
    constexpr std::size_t kCodes = 2 * kChunk * kVectors / kPairVectors;
    if (p * kCodes % kCodesPerRequest == 0) {
      for (std::size_t i = 0; i < kCodes; i += kCodesPerRequest) upcoming.template prefetch<kNear>();
    }
    return pairs_of<Reader>(lookup, rows.at[2 * p], rows.at[2 * p + 1], chunk - first_chunk);
  }
  const CodesLookup& lookup;
  const TileRows& rows;
  std::size_t first_chunk;  ///< that rows begin with
  UpcomingCodes& upcoming;
};

/// One chunk of values that have been looked up.
struct DecodedPairs {
  const PairLevels& at(std::size_t p, std::size_t) const noexcept { return levels[p]; }
  const PairLevels* levels;
};

/// Adds weights * values to the outputs of kRows rows from `r` on: in kChunks chunks of columns from `chunk` on, of
/// each kVectors vectors from kFirst on.
template <std::size_t kHeadDim, std::size_t kRows, std::size_t kChunks, std::size_t kFirst, std::size_t kVectors,
          class Pairs>
[[gnu::always_inline]] inline void add_columns(const AttendTask& task, std::size_t rows_of_block, std::size_t chunk,
                                               std::size_t r, std::size_t pairs, const Pairs& values) noexcept {
  const std::size_t b = chunk * kChunk / kBlockDim<kHeadDim>;
  const std::size_t row = r % rows_of_block;
  const RowBlock& block = task.blocks[r / rows_of_block];
  const std::int16_t* weights = block.fixed_weights[b] + RowBlock::place_of(0, row, rows_of_block);
  for (std::size_t group = 0; group < kWeightGroups && group * kGroupPairs < pairs; ++group) {
    const std::size_t first = group * kGroupPairs, end = pairs - first < kGroupPairs ? pairs : first + kGroupPairs;
    // Every loop over sums is unrolled: otherwise they would live in memory.
    Sums sums[kChunks][kRows][kVectors];
#pragma GCC unroll 8
    for (std::size_t k = 0; k < kRows; ++k) {
      const Sums half = fill(block.halves[b][group][RowBlock::first_lane(row + k)]);
#pragma GCC unroll 4
      for (std::size_t c = 0; c < kChunks; ++c) {
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kVectors; ++i) sums[c][k][i] = half;
      }
    }
    const auto add_pair = [&](std::size_t p) __attribute__((always_inline)) {
      Sums pair_weights[kRows];
#pragma GCC unroll 8
      for (std::size_t k = 0; k < kRows; ++k) pair_weights[k] = broadcast_pair(weights + 2 * (p * rows_of_block + k));
#pragma GCC unroll 4
      for (std::size_t c = 0; c < kChunks; ++c) {
        const PairLevels& pair = values.at(p, chunk + c);
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kVectors; ++i) {
#pragma GCC unroll 8
          for (std::size_t k = 0; k < kRows; ++k) {
            sums[c][k][i] = add_products(sums[c][k][i], pair.vectors[kFirst + i], pair_weights[k]);
            pin(sums[c][k][i]);
          }
        }
      }
    };
    for (std::size_t p = first; p < end; p += 2) {
      add_pair(p);
      add_pair(p + 1);
    }
#pragma GCC unroll 8
    for (std::size_t k = 0; k < kRows; ++k) {
      const std::size_t lane = RowBlock::first_lane(row + k);
      const float correction = group == 0 ? block.corrections[lane] : 1.0f, unit = block.fixed_units[b][group][lane];
#pragma GCC unroll 4
      for (std::size_t c = 0; c < kChunks; ++c) {
        float* out = task.out + (r + k) * kHeadDim + (chunk + c) * kChunk + kFirst * kSumLanes;
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kVectors; ++i, out += kSumLanes) {
          const Vec added = __builtin_convertvector(load_as<IntVec>(&sums[c][k][i]), Vec);
          store(out, load(out) * correction + added * unit);
        }
      }
    }
  }
}

/// What is done with the rows of one format.
template <unsigned kBits, bool kPlane, std::size_t kHeadDim>
struct Format {
  using Reader = CodeReader<kBits, kPlane, kHeadDim>;
  using CodesLookup = Lookup<kBits>;

  /// Scores of all rows and the first `count` keys of a tile, and of some beyond.
  static void score(const AttendTask& task, const KeyNorms<kHeadDim>& norms, const TileRows& keys, std::size_t count,
                    UpcomingCodes upcoming) noexcept {
    // Where a block has fewer rows, memory for the queries goes on: their products mean nothing.
    const auto fused = [&](auto rows, auto near) {
      score_fused<decltype(rows)::value, decltype(near)::value>(task, norms, keys, count, upcoming);
    };
    if (task.rows > kMostBlockRows) return score_decoded(task, norms, keys, count, upcoming);
    for_each_block(task, [&](auto rows, RowBlock&) { near_or_not<rows.kSize>(task, fused); });
  }

  /// Adds weights * values to all rows' outputs.
  static void add(const AttendTask& task, const TileRows& values, std::size_t pairs, UpcomingCodes upcoming) noexcept {
    const auto fused = [&](auto rows, auto near) {
      add_fused<decltype(rows)::value, decltype(near)::value>(task, values, pairs, upcoming);
    };
    if (task.rows == 1) return near_or_not<1>(task, fused);
    if (task.rows == 2) return near_or_not<2>(task, fused);
    if constexpr (kFusedRows >= 4) {
      if (task.rows == 4) return near_or_not<4>(task, fused);
    }
    if constexpr (kFusedRows >= 8) {
      if (task.rows == 8) return near_or_not<8>(task, fused);
    }
    add_decoded(task, values, pairs, upcoming);
  }

 private:
  /// Vectors of a chunk of columns that kRows rows add to at a time.
  template <std::size_t kRows>
  static constexpr std::size_t kVectorsAtOnce = kFusedSums / kRows < kPairVectors ? kFusedSums / kRows : kPairVectors;
  /// More rows have planes put together beforehand: beside their sums, registers would be too few, and half a chunk
  /// would do it twice.
  static constexpr std::size_t kJoiningRows = 2;

  /// Calls visit(Count<kRows>, near): near::value says whether to fetch codes into the first cache level.
  template <std::size_t kRows, class Visit>
  static void near_or_not(const AttendTask& task, const Visit& visit) noexcept {
    if constexpr (kRows <= kNearRows) {
      if (task.fetches_near) return visit(Count<kRows>{}, std::true_type{});
    }
    visit(Count<kRows>{}, std::false_type{});
  }

  /// While all keys are scored, all upcoming codes are asked for.
  template <bool kNear = false>
  static void prefetch_beside_key(UpcomingCodes& upcoming) noexcept {
    for (std::size_t i = 0; i < kHeadDim; i += kCodesPerRequest) upcoming.template prefetch<kNear>();
  }

  template <std::size_t kRows, bool kNear>
  static void score_fused(const AttendTask& task, const KeyNorms<kHeadDim>& norms, const TileRows& keys,
                          std::size_t count, UpcomingCodes upcoming) noexcept {
    const CodesLookup lookup(*task.k.int16);
    for (std::size_t first = 0; first < count; first += kKeysTogether<kRows>) {
      const CodedKeys<Reader, CodesLookup> coded{lookup, keys.at + first};
      DotSums<kHeadDim, kRows> dots;
      for (std::size_t t = 0; t < kKeysTogether<kRows>; t += kKeysAtOnce<kRows>) {
        for (std::size_t j = 0; j < kKeysAtOnce<kRows>; ++j) prefetch_beside_key<kNear>(upcoming);
        multiply_keys<kHeadDim, kRows>(coded, not_hoisted(task.q_int16.values), t, dots);
      }
      finish_scores<kHeadDim, kRows>(*task.blocks, norms, first, dots);
    }
  }

  static void score_decoded(const AttendTask& task, const KeyNorms<kHeadDim>& norms, const TileRows& keys,
                            std::size_t count, UpcomingCodes upcoming) noexcept {
    const CodesLookup lookup(*task.k.int16);
    for (std::size_t first = 0; first < count; first += kDecodedKeys) {
      alignas(64) std::int16_t levels[kDecodedKeys][kHeadDim];
      for (std::size_t t = 0; t < kDecodedKeys; ++t) {
        prefetch_beside_key(upcoming);
#pragma GCC unroll 1
        for (std::size_t part = 0; part < kHeadDim; part += kPartDim<kHeadDim>) {
#pragma GCC unroll 8
          for (std::size_t j = part; j < part + kPartDim<kHeadDim>; j += kChunk) {
            const Levels looked_up = lookup.of(Reader::at(keys.at[first + t], j / kChunk));
            store(levels[t] + j, looked_up.first);
            store(levels[t] + j + kChunk / 2, looked_up.second);
          }
        }
      }
      constexpr std::size_t kRows = kMostBlockRows;
      for (std::size_t r = 0; r < task.rows; r += kRows) {
        const std::int16_t* q = task.q_int16.values + r * kHeadDim;
        for (std::size_t i = 0; i < kDecodedKeys; i += kKeysTogether<kRows>) {
          DotSums<kHeadDim, kRows> dots;
          for (std::size_t t = 0; t < kKeysTogether<kRows>; t += kKeysAtOnce<kRows>) {
            multiply_keys<kHeadDim, kRows>(DecodedKeys<kHeadDim>{levels[i]}, not_hoisted(q), t, dots);
          }
          finish_scores<kHeadDim, kRows>(task.blocks[r / kRows], norms, first + i, dots);
        }
      }
    }
  }

  template <std::size_t kRows, bool kNear>
  static void add_fused(const AttendTask& task, const TileRows& values, std::size_t pairs,
                        UpcomingCodes upcoming) noexcept {
    constexpr std::size_t kAll = kHeadDim / kChunk;
    const CodesLookup lookup(*task.v.int16);
    if constexpr (kPlane && kRows > kJoiningRows) {
      alignas(64) std::uint8_t joined[kAttendTile][Reader::kBlock];
      TileRows rows;
      for (std::size_t t = 0; t < kAttendTile; ++t) rows.at[t] = joined[t];
      for (std::size_t first = 0; first < kAll; first += Reader::kChunks) {
        for (std::size_t t = 0; t < 2 * pairs; ++t) {
          for (std::size_t c = 0; c < Reader::kChunks; ++c) {
            const auto codes = Reader::at(values.at[t], first + c);
            static_assert(sizeof(codes) == kChunk, "a byte for every code");
            store(joined[t] + c * kChunk, codes);
          }
        }
        const CodedPairs<CodeReader<kBits, false, kHeadDim>, CodesLookup, kVectorsAtOnce<kRows>, kNear> coded{
            lookup, rows, first, upcoming};
        add_chunks<kRows, Reader::kChunks>(task, first, pairs, coded);
      }
    } else {
      const CodedPairs<Reader, CodesLookup, kVectorsAtOnce<kRows>, kNear> coded{lookup, values, 0, upcoming};
      add_chunks<kRows, kAll>(task, 0, pairs, coded);
    }
  }

  /// Adds weights * values to kCount chunks of columns of all rows, from `first` on.
  template <std::size_t kRows, std::size_t kCount, class Pairs>
  [[gnu::always_inline]] static void add_chunks(const AttendTask& task, std::size_t first, std::size_t pairs,
                                                const Pairs& values) noexcept {
    constexpr std::size_t kVectors = kVectorsAtOnce<kRows>;
    if constexpr (kVectors < kPairVectors) {
      // Half of a chunk needs half of the lookups.
      for (std::size_t chunk = first; chunk < first + kCount; ++chunk) {
        add_columns<kHeadDim, kRows, 1, 0, kVectors>(task, kRows, chunk, 0, pairs, values);
        add_columns<kHeadDim, kRows, 1, kVectors, kVectors>(task, kRows, chunk, 0, pairs, values);
      }
    } else {
      constexpr std::size_t kFitting = kFusedSums / kRows / kPairVectors;
      constexpr std::size_t kChunks = kFitting < kCount ? kFitting : kCount;
      for (std::size_t chunk = first; chunk < first + kCount; chunk += kChunks) {
        add_columns<kHeadDim, kRows, kChunks, 0, kPairVectors>(task, kRows, chunk, 0, pairs, values);
      }
    }
  }

  static void add_decoded(const AttendTask& task, const TileRows& values, std::size_t pairs,
                          UpcomingCodes upcoming) noexcept {
    const CodesLookup lookup(*task.v.int16);
    for (std::size_t chunk = 0; chunk < kHeadDim / kChunk; ++chunk) {
      const CodedPairs<Reader, CodesLookup, kPairVectors, false> coded{lookup, values, 0, upcoming};
      PairLevels levels[kAttendTile / 2];
      for (std::size_t p = 0; p < pairs; ++p) levels[p] = coded.at(p, chunk);
      for_each_group<kValueRows>(task.rows, [&](auto rows, std::size_t r) {
        add_columns<kHeadDim, decltype(rows)::value, 1, 0, kPairVectors>(task, block_rows(task.rows), chunk, r, pairs,
                                                                         DecodedPairs{levels});
      });
    }
  }
};

template <std::size_t kHeadDim>
struct FormatCalls {
  template <unsigned kBits, bool kPlane>
  static constexpr FormatCalls of() noexcept {
    using Calls = Format<kBits, kPlane, kHeadDim>;
    return {Calls::score, Calls::add};
  }
  static FormatCalls of(const HeadRows& side) noexcept {
    const bool plane = side.high_bits != 0;
    if (side.cbits == 5) return plane ? of<5, true>() : of<5, false>();
    if (side.cbits == 6) return plane ? of<6, true>() : of<6, false>();
    return of<8, false>();
  }

  void (*score)(const AttendTask& task, const KeyNorms<kHeadDim>& norms, const TileRows& keys, std::size_t count,
                UpcomingCodes upcoming) noexcept;
  void (*add)(const AttendTask& task, const TileRows& values, std::size_t pairs, UpcomingCodes upcoming) noexcept;
};

template <std::size_t kHeadDim>
class Int16Path {
 public:
  static constexpr std::size_t kTile = kAttendTile;

  explicit Int16Path(const AttendTask& task) noexcept
      : task_(task), k_(FormatCalls<kHeadDim>::of(task.k)), v_(FormatCalls<kHeadDim>::of(task.v)), notes_(task) {
    for_each_block(task, [&](auto rows, RowBlock& block) {
      for (std::size_t b = 0; b < kBlocks; ++b) {
        const std::size_t at = rows.first * kMaxNormBlocks + b;
        spread_rows<kMaxNormBlocks>(rows, task.q_int16.units + at, block.score_units[b]);
        spread_rows<kMaxNormBlocks>(rows, task.q_int16.halves + at, block.score_halves[b]);
      }
    });
  }

  void score(const Tile& tile) noexcept {
    const TileRows keys = rows_of<kTile>(task_.k, tile);
    const KeyNorms<kHeadDim> norms(task_.k, tile);
    notes_.expect(norms);
    k_.score(task_, norms, keys, tile.count, codes_from(task_.v, kHeadDim, tile.slots[0]));
  }

  void accumulate(const Tile& tile) noexcept {
    // Two pairs at a time: keys beyond the last have a weight of 0.
    const std::size_t pairs = (tile.count + 3) / 4 * 2;
    notes_.take(tile);
    fix_weights(tile);
    v_.add(task_, rows_of<kTile>(task_.v, tile), pairs, keys_after<kTile>(task_, tile));
  }

 private:
  static constexpr std::size_t kBlocks = kNormBlocks<kHeadDim>;

  /// Puts factors into fixed point, one norm block after the other.
  void fix_weights(const Tile& tile) noexcept {
    const TileNorms<kTile, kBlocks> norms(task_.v, tile);
    for_each_block(task_, [&](auto rows, RowBlock& block) {
      for (std::size_t b = 0; b < kBlocks; ++b) {
        fill_factors<kTile>(task_, tile, rows, norms.of_block[b], block);
        for (std::size_t group = 0; group < kWeightGroups; ++group) fix_group<rows.kSize>(block, b, group);
      }
    });
  }

  template <std::size_t kRows>
  void fix_group(RowBlock& block, std::size_t b, std::size_t group) const noexcept {
    constexpr std::size_t kPlaces = kWeightGroup * kRows;
    const float* factors = block.factors + group * kPlaces;
    Vec totals[kVecs] = {}, largest[kVecs] = {};
    for (std::size_t i = 0; i < kPlaces; i += kBlockLanes) {
      for (std::size_t v = 0; v < kVecs; ++v) {
        const Vec factor = magnitude(load(factors + i + v * kLanes));
        totals[v] += factor;
        largest[v] = max(factor, largest[v]);
      }
    }
    join_rows<kRows>(totals, kAdd);
    join_rows<kRows>(largest, kLarger);
    Vec inverses[kVecs];
    for (std::size_t v = 0; v < kVecs; ++v) {
      const Vec smallest = Vec{} + 1e-37f;
      const Vec unit = max(max(largest[v] / 32766.0f, totals[v] / Int16Levels::kBudget), smallest);
      // What is not finite must show in the output, and has no fixed point.
      const auto finite = totals[v] < INFINITY;
      inverses[v] = finite ? 1.0f / unit : Vec{};
      const Vec not_a_number = Vec{} + NAN;
      store(block.fixed_units[b][group] + v * kLanes,
            (finite ? unit : not_a_number) * static_cast<float>(task_.v.int16->unit));
    }
    IntVec sums[kVecs] = {};
    for (std::size_t i = 0; i < kPlaces; i += kBlockLanes) {
      for (std::size_t v = 0; v < kVecs; ++v) {
        const Vec factor = load(factors + i + v * kLanes);
        const IntVec fixed = totals[v] < INFINITY ? nearest(factor * inverses[v]) : IntVec{};
        store(block.fixed_weights[b] + group * kPlaces + i + v * kLanes, __builtin_convertvector(fixed, ShortVec));
        sums[v] += fixed;
      }
    }
    join_rows<kRows>(sums, kAdd);
    for (std::size_t v = 0; v < kVecs; ++v) store(block.halves[b][group] + v * kLanes, sums[v] / 2);
  }

  const AttendTask& task_;
  FormatCalls<kHeadDim> k_, v_;
  NoteTaker<kHeadDim> notes_;
};

void attend_int16(const AttendTask& task) noexcept {
#define TQ_ATTEND(size) \
  if (task.head_dim == size) return attend_range<Int16Path<size>>(task);
  TQ_HB_FOR_EACH_HEAD_DIM(TQ_ATTEND)
#undef TQ_ATTEND
}

}  // namespace
}  // namespace tq_hb
