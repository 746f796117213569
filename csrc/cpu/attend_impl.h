// The loop behind every attend_<isa>.cpp, each compiled with its own instruction-set flags.
//
// Works in the rotated domain. A key or value is decoded once for all rows, a tile of keys at a time; what
// a row does not see of a tile stays out of its sums, whatever it holds. Scores are carried in double, so
// that any finite scale and norm keeps its order.
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

template <std::size_t kHeadDim>
constexpr std::size_t kBlockDim = kHeadDim < kNormBlock ? kHeadDim : kNormBlock;

/// Ages and slots of a tile's keys, and its K or V rows as levels.
struct Tile {
  alignas(64) float rows[kTile * kMaxHeadDim];
  std::size_t slots[kTile];
  std::size_t first_age;
  std::size_t count;
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

/// Joins the nibble plane and the high plane of a row to codes of a byte each, four to a word: see core/packing.h.
///
/// A word of a plane holds, at each shift, four consecutive codes, in the order of its bytes.
template <std::size_t kHeadDim, unsigned kHighBits>
inline void join_planes(const std::uint8_t* row, std::uint32_t* codes) noexcept {
  constexpr std::size_t kBlock = kHeadDim < kPlaneBlock ? kHeadDim : kPlaneBlock;
  constexpr std::size_t kLowWords = kBlock * kNibbleBits / 32;
  constexpr std::size_t kHighWords = kBlock * kHighBits / 32;
  constexpr std::uint32_t kEveryByte = 0x01010101u;
  constexpr std::uint32_t kLowMask = kEveryByte * ((1u << kNibbleBits) - 1);
  constexpr std::uint32_t kHighMask = kEveryByte * ((1u << kHighBits) - 1);
  for (std::size_t first = 0; first < kHeadDim; first += kBlock) {
    std::uint32_t low[kLowWords], high[kHighWords];
    __builtin_memcpy(low, row + first * kNibbleBits / 8, sizeof(low));
    __builtin_memcpy(high, row + kHeadDim * kNibbleBits / 8 + first * kHighBits / 8, sizeof(high));
    for (unsigned field = 0; field < 8 / kHighBits; ++field) {
      const unsigned low_shift = static_cast<unsigned>(field * kHighWords / kLowWords) * kNibbleBits;
      const std::uint32_t* nibbles = low + field * kHighWords % kLowWords;
      std::uint32_t* out = codes + first / 4 + field * kHighWords;
      for (std::size_t w = 0; w < kHighWords; ++w) {
        const std::uint32_t top = (high[w] >> (field * kHighBits)) & kHighMask;
        out[w] = ((nibbles[w] >> low_shift) & kLowMask) | (top << kNibbleBits);
      }
    }
  }
}

template <std::size_t kHeadDim>
inline void look_up(const std::uint8_t* codes, const float* levels, float* row) noexcept {
  constexpr std::size_t kUnroll = 8;
  for (std::size_t j = 0; j < kHeadDim; j += kUnroll) {
    for (std::size_t i = 0; i < kUnroll; ++i) row[j + i] = levels[codes[j + i]];
  }
}

template <std::size_t kHeadDim, unsigned kHighBits>
void decode_planes(const HeadRows& side, Tile& tile) noexcept {
  for (std::size_t t = 0; t < tile.count; ++t) {
    std::uint32_t codes[kHeadDim / 4];
    join_planes<kHeadDim, kHighBits>(side.codes + tile.slots[t] * side.row_bytes, codes);
    look_up<kHeadDim>(reinterpret_cast<const std::uint8_t*>(codes), side.levels, tile.rows + t * kHeadDim);
  }
}

template <std::size_t kHeadDim>
void decode_tile(const HeadRows& side, Tile& tile) noexcept {
  switch (side.high_bits) {
    case 1:
      return decode_planes<kHeadDim, 1>(side, tile);
    case 2:
      return decode_planes<kHeadDim, 2>(side, tile);
    default:
      for (std::size_t t = 0; t < tile.count; ++t) {
        look_up<kHeadDim>(side.codes + tile.slots[t] * side.row_bytes, side.levels, tile.rows + t * kHeadDim);
      }
  }
}

/// Adds norm * dot(query, key) over one norm block to the scores of kRows rows and kKeys keys.
///
/// Each pair has one accumulator, so its bits do not depend on what it shares a block with.
template <std::size_t kHeadDim, std::size_t kRows, std::size_t kKeys>
inline void score_block(const float* q, const float* keys, const float* const* norms, double* scores) noexcept {
  Vec sums[kRows][kKeys] = {};
  for (std::size_t i = 0; i < kBlockDim<kHeadDim>; i += kLanes) {
    Vec key[kKeys];
    for (std::size_t k = 0; k < kKeys; ++k) key[k] = load(keys + k * kHeadDim + i);
    for (std::size_t r = 0; r < kRows; ++r) {
      const Vec query = load(q + r * kHeadDim + i);
      for (std::size_t k = 0; k < kKeys; ++k) sums[r][k] += query * key[k];
    }
  }
  for (std::size_t r = 0; r < kRows; ++r) {
    for (std::size_t k = 0; k < kKeys; ++k) {
      scores[r * kTile + k] += static_cast<double>(sum_of_lanes(sums[r][k])) * static_cast<double>(*norms[k]);
    }
  }
}

/// Scores of kRows rows from `r` on; those of keys that a row does not see mean nothing.
template <std::size_t kHeadDim, std::size_t kRows>
void score_rows(const AttendTask& task, const Tile& tile, std::size_t r) noexcept {
  constexpr std::size_t kKeys = 4;
  constexpr std::size_t kBlocks = kHeadDim / kBlockDim<kHeadDim>;
  double* scores = task.scratch_scores + r * kTile;
  for (std::size_t i = 0; i < kRows * kTile; ++i) scores[i] = 0.0;
  for (std::size_t b = 0; b < kBlocks; ++b) {
    const float* norms[kTile];
    for (std::size_t t = 0; t < tile.count; ++t) norms[t] = task.k.norms + tile.slots[t] * kBlocks + b;
    const float* q = task.q + r * kHeadDim + b * kBlockDim<kHeadDim>;
    const float* keys = tile.rows + b * kBlockDim<kHeadDim>;
    std::size_t t = 0;
    for (; t + kKeys <= tile.count; t += kKeys) {
      score_block<kHeadDim, kRows, kKeys>(q, keys + t * kHeadDim, norms + t, scores + t);
    }
    for (; t < tile.count; ++t) score_block<kHeadDim, kRows, 1>(q, keys + t * kHeadDim, norms + t, scores + t);
  }
  for (std::size_t i = 0; i < kRows; ++i) {
    const Span seen = seen_of(task.seen[r + i], tile);
    for (std::size_t t = seen.begin; t < seen.end; ++t) {
      double& score = scores[i * kTile + t];
      score = score * task.q_scale[r + i] + task.bias[r + i];
      if (task.softcap > 0.0) score = task.softcap * tanh(score / task.softcap);
    }
  }
}

/// Turns a row's scores into weights, and rescales its state to the new maximum.
template <std::size_t kHeadDim>
void update_softmax(const AttendTask& task, std::size_t r, Span seen, float* weights) noexcept {
  if (seen.begin >= seen.end) return;
  const double* scores = task.scratch_scores + r * kTile;
  double max = task.max[r];
  for (std::size_t t = seen.begin; t < seen.end; ++t) max = scores[t] > max ? scores[t] : max;
  const float correction = expf(static_cast<float>(task.max[r] - max));
  double sum = task.sum[r] * static_cast<double>(correction);
  for (std::size_t t = seen.begin; t < seen.end; ++t) {
    weights[t] = expf(static_cast<float>(scores[t] - max));
    sum += static_cast<double>(weights[t]);
  }
  task.max[r] = max;
  task.sum[r] = sum;
  float* out = task.out + r * kHeadDim;
  if (correction != 1.0f) {
    for (std::size_t j = 0; j < kHeadDim; ++j) out[j] *= correction;
  }
}

/// Adds weights * values to the outputs of kRows rows from `r` on, some columns in registers at a time.
template <std::size_t kHeadDim, std::size_t kRows>
void accumulate_rows(const AttendTask& task, const Tile& tile, std::size_t r) noexcept {
  constexpr std::size_t kColumns = 4;  // vectors
  constexpr std::size_t kDim = kBlockDim<kHeadDim>;
  constexpr std::size_t kBlocks = kHeadDim / kDim;
  static_assert(kDim % (kColumns * kLanes) == 0);
  Span seen[kRows];
  float weights[kRows][kTile];
  for (std::size_t i = 0; i < kRows; ++i) {
    seen[i] = seen_of(task.seen[r + i], tile);
    update_softmax<kHeadDim>(task, r + i, seen[i], weights[i]);
  }
  float* out = task.out + r * kHeadDim;
  for (std::size_t b = 0; b < kBlocks; ++b) {
    float factors[kRows][kTile] = {};  // of 0 for a key that is not seen, whose norm is never read
    for (std::size_t i = 0; i < kRows; ++i) {
      for (std::size_t t = seen[i].begin; t < seen[i].end; ++t) {
        factors[i][t] = weights[i][t] * (task.v.norms[tile.slots[t] * kBlocks + b] * task.v_scale);
      }
    }
    for (std::size_t j = b * kDim; j < (b + 1) * kDim; j += kColumns * kLanes) {
      Vec sums[kRows][kColumns];
      for (std::size_t i = 0; i < kRows; ++i) {
        for (std::size_t c = 0; c < kColumns; ++c) sums[i][c] = load(out + i * kHeadDim + j + c * kLanes);
      }
      for (std::size_t t = 0; t < tile.count; ++t) {
        for (std::size_t c = 0; c < kColumns; ++c) {
          const Vec value = load(tile.rows + t * kHeadDim + j + c * kLanes);
          for (std::size_t i = 0; i < kRows; ++i) sums[i][c] += factors[i][t] * value;
        }
      }
      for (std::size_t i = 0; i < kRows; ++i) {
        for (std::size_t c = 0; c < kColumns; ++c) store(out + i * kHeadDim + j + c * kLanes, sums[i][c]);
      }
    }
  }
}

template <std::size_t kValue>
struct Count {
  static constexpr std::size_t value = kValue;
};

/// Calls visit(Count<2>, r) for pairs of rows, which share the loads of a key, and visit(Count<1>, r) for an odd one.
template <class Visit>
void for_each_pair(std::size_t rows, const Visit& visit) noexcept {
  std::size_t r = 0;
  for (; r + 2 <= rows; r += 2) visit(Count<2>{}, r);
  if (r < rows) visit(Count<1>{}, r);
}

template <std::size_t kHeadDim>
void attend_range(const AttendTask& task) noexcept {
  Tile tile;
  for (std::size_t r = 0; r < task.rows; ++r) {
    task.max[r] = -INFINITY;
    task.sum[r] = 0.0;
  }
  for (std::size_t j = 0; j < task.rows * kHeadDim; ++j) task.out[j] = 0.0f;

  std::size_t slot = task.first_slot;
  for (std::size_t done = 0; done < task.count; done += kTile) {
    tile.first_age = task.first_age + done;
    tile.count = task.count - done < kTile ? task.count - done : kTile;
    for (std::size_t t = 0; t < tile.count; ++t) {
      tile.slots[t] = slot;
      slot = slot + 1 == task.capacity ? 0 : slot + 1;
    }
    decode_tile<kHeadDim>(task.k, tile);
    for_each_pair(task.rows,
                  [&](auto rows, std::size_t r) { score_rows<kHeadDim, decltype(rows)::value>(task, tile, r); });
    decode_tile<kHeadDim>(task.v, tile);
    for_each_pair(task.rows,
                  [&](auto rows, std::size_t r) { accumulate_rows<kHeadDim, decltype(rows)::value>(task, tile, r); });
  }
}

void run(const AttendTask& task) noexcept {
#define TQ_ATTEND(size) \
  if (task.head_dim == size) return attend_range<size>(task);
  TQ_HB_FOR_EACH_HEAD_DIM(TQ_ATTEND)
#undef TQ_ATTEND
}

}  // namespace
}  // namespace tq_hb
