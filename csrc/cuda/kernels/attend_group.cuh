// Attention for up to kRows rows of q that share a KV head: a key is decoded once for all of them, on tensor cores.
//
// Grid:   (splits, KV heads, tiles of rows) blocks of (32, 8) or (32, 12) threads, one per multiprocessor.
// Work:   a split has consecutive tiles of kKeys keys, which its units take in turn. A unit is a warp, or two where a
//         row has two norm blocks, of which each takes one. Every unit keeps its own softmax and output.
// Shared: the tables, the queries, a ring of K and V rows for every warp, filled by asynchronous copies, and for pairs
//         of warps the scores that they exchange. At the end every unit's output lies over the tables and the ring.
//
// Products are those of float16 with its remainder: a table holds both for every level, side by side, and queries and
// weights are cut in the same way. A table has a copy for every lane, so that lookups never meet in a bank, with the
// levels of K and of V side by side.
//
// Matrices: S = K q^T has keys as rows, O = V^T p^T coordinates, and both have rows of q as columns. The order of
// coordinates inside a product is free. So in S a lane holds 16 consecutive coordinates of a key, with q's in the same
// order, and in O a group of four lanes holds 16 consecutive coordinates of V: rows are read as they lie in memory.
// What a lookup gives is an operand as it is, of two neighbours in the inner dimension, level and remainder: the other
// operand then has its value twice. Up to kNarrowRows rows have two columns each, one of values and one of remainders.
// More leave no second column; values and remainders then take products of their own.
//
// Scores count in powers of two. What a row does not see is selected away, whatever it holds.

#pragma once

#include <cfloat>

#include "core/query_range.h"
#include "cuda/kernels/code_tile.cuh"
#include "cuda/kernels/dispatch.h"
#include "cuda/kernels/half_products.cuh"
#include "cuda/kernels/kernels.h"
#include "cuda/kernels/overlap.cuh"
#include "cuda/kernels/partials.cuh"
#include "cuda/kernels/query.cuh"
#include "cuda/kernels/row.cuh"

namespace tq_hb {
namespace {

constexpr unsigned kRows = TQ_GQA_MAX_TILE;
constexpr unsigned kNarrowRows = kRows / 2;
/// Rows of K and V that a block asks for before it needs them.
constexpr unsigned kRingBytes = 128 << 10;
constexpr unsigned kTableStride = 256;
constexpr unsigned kTableBytes = 256 * kTableStride;
constexpr unsigned kVTableOffset = 128;
/// Weights are multiplied by this, so that the remainder of a small one is a normal float16.
constexpr float kWeightScale = 256.0f;
/// A maximum may be exceeded by so many powers of two before everything is rescaled to a new one.
constexpr float kSlack = 4.0f;
/// Scores beyond this count as equal.
constexpr float kLargestScore = 1e38f;
constexpr float kLog2E = 1.4426950408889634f;

template <unsigned kHeadDim, unsigned kKHighBits, unsigned kVHighBits, bool kIsNarrow>
struct Shape {
  static constexpr bool kHasPlanes = kKHighBits != 0 && kVHighBits != 0;
  // Bytes come slower than they are used. Planes do not, and with few rows there are registers for more warps.
  static constexpr unsigned kWarps = kIsNarrow && kHasPlanes && kHeadDim <= kNormBlock ? 12 : 8;
  static constexpr unsigned kThreads = kWarps * kWarp;
  static constexpr unsigned kBlockDim = kHeadDim < kNormBlock ? kHeadDim : kNormBlock;  // coordinates of a warp
  static constexpr unsigned kBlocks = kHeadDim / kBlockDim;
  static constexpr unsigned kUnits = kWarps / kBlocks;
  static constexpr unsigned kSteps = kBlockDim / 16;  // products along a row of K, and pairs of coordinates of V
  static constexpr unsigned kOutputStride = kHeadDim + 4;
  using KTile = CodeTile<kHeadDim, kBlockDim, kKHighBits>;
  using VTile = CodeTile<kHeadDim, kBlockDim, kVHighBits>;
  static constexpr unsigned kStageBytes = KTile::kBytes + VTile::kBytes;
  static constexpr unsigned kStages = kRingBytes / (kWarps * kStageBytes);

  static constexpr unsigned kQueries = kTableBytes;
  static constexpr unsigned kExchange = kQueries + kBlocks * kSteps * kWarp * sizeof(uint4);
  static constexpr unsigned kRing = kExchange + (kBlocks > 1 ? 2 * kUnits * kBlocks * kWarp * sizeof(float4) : 0);
  static constexpr unsigned kStates = kRing + kWarps * kStages * kStageBytes;
  static constexpr unsigned kBytes = kStates + kUnits * kRows * sizeof(float2) + kRows * sizeof(float);
  static_assert(kUnits * kRows * kOutputStride * sizeof(float) <= kStates, "the outputs lie over what is not needed");
  static_assert(kBytes <= kGroupSharedBytes);
};

/// What the columns of the products are: rows of q that share a KV head, in the order of queries, then heads.
struct RowTile {
  __device__ RowTile(const AttendCall& call)
      : group(call.args.num_heads / call.args.num_kv_heads),
        first(blockIdx.x * call.head_tile),
        count(min(call.head_tile, group * call.args.num_queries - first)) {}

  /// Index of a row in q.
  __device__ TqU32 row(const AttendCall& call, unsigned index) const {
    const TqU32 i = first + index;
    return i / group * call.args.num_heads + blockIdx.y * group + i % group;
  }

  TqU32 group, first, count;
};

/// Waits for the other warp of a unit. The numbers of barriers are constants, so that tools can follow them.
__device__ inline void wait_for_pair(unsigned unit) {
  switch (unit) {
    case 0:
      asm volatile("bar.sync 1, 64;" ::: "memory");
      break;
    case 1:
      asm volatile("bar.sync 2, 64;" ::: "memory");
      break;
    case 2:
      asm volatile("bar.sync 3, 64;" ::: "memory");
      break;
    default:
      asm volatile("bar.sync 4, 64;" ::: "memory");
  }
}

/// 2^x, and 0 below the normal numbers.
__device__ inline float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

/// Brings x into [-limit, limit]; NaN stays.
__device__ inline float clamped(float x, float limit) {
  float result;
  asm("{ .reg .f32 lower; max.NaN.f32 lower, %1, %2; min.NaN.f32 %0, lower, %3; }"
      : "=f"(result)
      : "f"(x), "f"(-limit), "f"(limit));
  return result;
}

/// The level of byte `index` of a word of codes. `lane_offset` is below 256, so that the address is made of bytes.
__device__ inline std::uint32_t look_up(const unsigned char* table, std::uint32_t codes, unsigned index,
                                        std::uint32_t lane_offset) {
  return *reinterpret_cast<const std::uint32_t*>(table + __byte_perm(codes, lane_offset, 0x5504 | index << 4));
}

__device__ inline std::uint32_t word_of(const uint4& chunk, unsigned index) {
  return index == 0 ? chunk.x : index == 1 ? chunk.y : index == 2 ? chunk.z : chunk.w;
}

__device__ inline unsigned thread_index() {
  return threadIdx.y * kWarp + threadIdx.x;
}

/// Writes a level's 32 copies: eight threads of 16 bytes each.
__device__ inline void write_level(unsigned char* table, unsigned code, float level) {
  const std::uint32_t value = pack_halves(level, 0.0f);
  const std::uint32_t entry = value | pack_remainders(level, 0.0f, value) << 16;
  *reinterpret_cast<uint4*>(table + code * kTableStride + threadIdx.x % 8 * sizeof(uint4)) =
      make_uint4(entry, entry, entry, entry);
}

/// A thread's part of the tables: their levels are loaded before anything large is asked for, and written later.
template <unsigned kThreads>
class Tables {
 public:
  __device__ explicit Tables(const AttendCall& call) {
    const float* k_table = levels_of(call.args.codebook, call.k.cbits);
    const float* v_table = levels_of(call.args.codebook, call.v.cbits);
#pragma unroll
    for (unsigned i = 0; i < kCodes; ++i) {
      k_levels_[i] = k_table[code(i) & ((1u << call.k.cbits) - 1)];
      v_levels_[i] = v_table[code(i) & ((1u << call.v.cbits) - 1)];
    }
  }

  __device__ void write(unsigned char* tables) const {
#pragma unroll
    for (unsigned i = 0; i < kCodes; ++i) {
      if (code(i) >= 256) break;
      write_level(tables, code(i), k_levels_[i]);
      write_level(tables + kVTableOffset, code(i), v_levels_[i]);
    }
  }

 private:
  static constexpr unsigned kAtOnce = kThreads / 8;
  static constexpr unsigned kCodes = (256 + kAtOnce - 1) / kAtOnce;
  static __device__ unsigned code(unsigned i) { return i * kAtOnce + thread_index() / 8; }

  float k_levels_[kCodes], v_levels_[kCodes];
};

/// Cuts a row of q into operands of the products, scaled by a power of two: each warp that of its number.
template <class S, bool kIsNarrow, unsigned kHeadDim>
__device__ void prepare_query(unsigned char* shared, float* scales, const AttendCall& call, Row<kHeadDim> row,
                              unsigned signs) {
  static_assert(S::kWarps >= kRows);
  const unsigned lane = threadIdx.x, r = threadIdx.y;
  if (r >= (kIsNarrow ? kNarrowRows : kRows)) return;
  const double undo = scale_by_power_of_two(row);
  // The transform makes coordinates up to sqrt(D) times as large, which float16 holds.
  if (call.args.fuse_fwht_pre == 1) row.rotate(lane, signs);
  if (lane == 0) {
    const double scale = undo * call.args.scale * decode_factor<kHeadDim>(1.0f, call.args.scale_factor_d512) * kLog2E;
    scales[r] = static_cast<float>(fmin(fmax(scale, -1e38), 1e38));
  }
  auto* operands = reinterpret_cast<uint4*>(shared + S::kQueries);
#pragma unroll
  for (unsigned i = 0; i < Row<kHeadDim>::kPairs; ++i) {
    const unsigned coordinate = lane * Row<kHeadDim>::kPerLane + 2 * i;
    const unsigned block = coordinate / S::kBlockDim, within = coordinate % S::kBlockDim;
    const unsigned chunk = within / kChunk, word = within % kChunk / 4, half = within % 4 / 2;
    uint4* of_step = operands + (block * S::kSteps + chunk / 4 * 4 + word) * kWarp + chunk % 4;
    const std::uint32_t values = pack_halves(row.values[2 * i], row.values[2 * i + 1]);
    const std::uint32_t remainders = pack_remainders(row.values[2 * i], row.values[2 * i + 1], values);
    if constexpr (kIsNarrow) {
      reinterpret_cast<uint2*>(of_step + r * 4)[half] = make_uint2(first_twice(values), second_twice(values));
      reinterpret_cast<uint2*>(of_step + (r + kNarrowRows) * 4)[half] =
          make_uint2(first_twice(remainders), second_twice(remainders));
    } else {
      auto* operand = reinterpret_cast<std::uint32_t*>(of_step + r * 4);
      operand[half] = values;
      operand[2 + half] = remainders;
    }
  }
}

template <unsigned kHeadDim, unsigned kKHighBits, unsigned kVHighBits, bool kIsNarrow>
__global__ void __launch_bounds__(Shape<kHeadDim, kKHighBits, kVHighBits, kIsNarrow>::kThreads, 1)
    attend_group_kernel(const __grid_constant__ AttendCall call) {
#if __CUDA_ARCH__ >= 900  // no GPU before has the shared memory
  using S = Shape<kHeadDim, kKHighBits, kVHighBits, kIsNarrow>;
  using KTile = typename S::KTile;
  using VTile = typename S::VTile;
  using KCodes = Codes<kHeadDim, kKHighBits>;
  using VCodes = Codes<kHeadDim, kVHighBits>;
  constexpr unsigned kBlocks = S::kBlocks;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto* states = reinterpret_cast<float2*>(shared + S::kStates);  // maximum and sum
  auto* scales = reinterpret_cast<float*>(states + S::kUnits * kRows);
  const unsigned lane = threadIdx.x, warp = threadIdx.y, g = lane / 4, t = lane % 4;
  const unsigned unit = warp / kBlocks, block = warp % kBlocks;
  const TqU32 split = blockIdx.z, splits = gridDim.z;
  const TqFlashAttnVecArgs& args = call.args;

  // With few rows the merge finds room beside this kernel, and can wait for it; otherwise it is only in the way.
  if constexpr (kIsNarrow) let_next_start();
  // Small loads first: behind large ones they would wait for them.
  const Tables<S::kThreads> tables(call);
  const unsigned signs = Row<kHeadDim>::signs(lane);
  // The columns of this lane, and the keys that any row of the tile sees.
  const RowTile rows(call);
  const unsigned first_row = kIsNarrow ? t % 2 * 2 : 2 * t;
  TqU32 begins[2] = {0, 0}, ends[2] = {0, 0};
#pragma unroll
  for (unsigned c = 0; c < 2; ++c) {
    if (first_row + c >= rows.count) continue;
    const QueryRange range = range_of_row(args, rows.row(call, first_row + c));
    begins[c] = range.begin;
    ends[c] = range.end;
  }
  const QueryRange first_range = range_of_row(args, rows.row(call, 0));
  const QueryRange last_range = range_of_row(args, rows.row(call, rows.count - 1));
  const TqU32 first_key = first_range.begin, last_key = last_range.end;
  // A split has `some` tiles, and the first ones one more.
  const TqU32 num_tiles = (last_key - first_key) / kKeys + ((last_key - first_key) % kKeys != 0 ? 1 : 0);
  const TqU32 some = num_tiles / splits, more = num_tiles % splits;
  const TqU32 first_tile = split * some + min(split, more);
  const TqU32 tiles_end = first_tile + some + (split < more ? 1 : 0);
  TqU32 tile = first_tile + unit;

  const std::uint64_t first_slot = std::uint64_t{blockIdx.y} * args.kv_capacity;
  const auto slot_in_tile = [&](TqU32 at, unsigned key) {
    return slot_of_age(args, min(first_key + at * kKeys + key, last_key - 1));
  };
  const std::uint8_t* k_rows = call.k.packed + first_slot * KCodes::kRowBytes;
  const std::uint8_t* v_rows = call.v.packed + first_slot * VCodes::kRowBytes;
  const unsigned ring_offset = S::kRing + warp * S::kStages * S::kStageBytes;
  const auto ring = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared + ring_offset));
  // Nearly all tiles lie in consecutive slots, whose rows are at fixed distances.
  const auto copy = [&](auto code_tile, std::uint32_t target, const std::uint8_t* first_row, std::uint64_t row_bytes,
                        TqU32 at) {
    using Tile = decltype(code_tile);
    const TqU32 first = slot_in_tile(at, 0);
    if (slot_in_tile(at, kKeys - 1) == first + kKeys - 1) {
      const std::uint8_t* tile_rows = first_row + first * row_bytes;
      Tile::copy(target, block, lane, [&](unsigned key) { return tile_rows + key * row_bytes; });
    } else {
      Tile::copy(target, block, lane, [&](unsigned key) { return first_row + slot_in_tile(at, key) * row_bytes; });
    }
  };
  const auto copy_k = [&](unsigned stage, TqU32 at) {
    copy(KTile{}, ring + stage * S::kStageBytes, k_rows, KCodes::kRowBytes, at);
  };
  const auto copy_v = [&](unsigned stage, TqU32 at) {
    copy(VTile{}, ring + stage * S::kStageBytes + KTile::kBytes, v_rows, VCodes::kRowBytes, at);
  };
  const float* k_norm_rows = call.k.norms + first_slot * kBlocks + block;
  const float* v_norm_rows = call.v.norms + first_slot * kBlocks + block;
  float k_norms[2] = {}, v_norms[2] = {};
  const auto load_norms = [&](TqU32 at) {
#pragma unroll
    for (unsigned i = 0; i < 2; ++i) {
      const std::uint64_t at_norm = std::uint64_t{slot_in_tile(at, g + 8 * i)} * kBlocks;
      k_norms[i] = __ldg(k_norm_rows + at_norm);
      v_norms[i] = __ldg(v_norm_rows + at_norm);
    }
  };

  // The kernels before this one may still write what it reads, but whatever they write passes through this cache.
  const float* q_row = call.q + std::uint64_t{rows.row(call, min(warp, rows.count - 1))} * kHeadDim;
  if (lane == 0) prefetch(q_row, kHeadDim * sizeof(float));
#pragma unroll
  for (unsigned i = 0; i < S::kStages; ++i) {
    const TqU32 at = tile + i * S::kUnits;
    if (lane != 0 || at >= tiles_end) continue;
    const TqU32 first = slot_in_tile(at, 0);
    if (slot_in_tile(at, kKeys - 1) != first + kKeys - 1) continue;
    if (i == 0) {
      prefetch_line(k_norm_rows + first * kBlocks);
      prefetch_line(v_norm_rows + first * kBlocks);
    }
    if (block == 0) prefetch(k_rows + first * KCodes::kRowBytes, kKeys * KCodes::kRowBytes);
    if (block == kBlocks - 1) prefetch(v_rows + first * VCodes::kRowBytes, kKeys * VCodes::kRowBytes);
  }
  tables.write(shared);
  wait_for_previous();
  Row<kHeadDim> query{};
  if (warp < rows.count) query.load(q_row, lane);
  float biases[2] = {0.0f, 0.0f};
  if (args.softcap > 0.0f && call.score_bias != nullptr) {
#pragma unroll
    for (unsigned c = 0; c < 2; ++c) {
      if (first_row + c < rows.count) biases[c] = call.score_bias[rows.row(call, first_row + c)];
    }
  }
  if (tile < tiles_end) load_norms(tile);
#pragma unroll
  for (unsigned i = 0; i < S::kStages; ++i) {
    if (tile + i * S::kUnits < tiles_end) copy_k(i, tile + i * S::kUnits);
    end_copies();
    if (tile + i * S::kUnits < tiles_end) copy_v(i, tile + i * S::kUnits);
    end_copies();
  }
  prepare_query<S, kIsNarrow>(shared, scales, call, query, signs);
  __syncthreads();
  const float q_scales[2] = {scales[first_row], scales[first_row + 1]};
  const float v_scale = decode_factor<kHeadDim>(1.0f, args.scale_factor_d512);
  const float cap = args.softcap * kLog2E;

  float out[S::kSteps][4] = {};
  // Below every score, but finite, so that a row that has seen nothing yet needs no case of its own.
  float maxima[2] = {-FLT_MAX, -FLT_MAX}, sums[2] = {0.0f, 0.0f}, v_maxima[2] = {-FLT_MAX, -FLT_MAX};
  const std::uint32_t k_lane = lane * 4, v_lane = lane * 4 + kVTableOffset;
  const TqU32 rounds = (tiles_end - first_tile + S::kUnits - 1) / S::kUnits;
  TqU32 round = 0;
  unsigned stage_index = 0, exchange = 0;
  for (; tile < tiles_end; tile += S::kUnits, ++round) {
    const unsigned char* k_tile = shared + ring_offset + stage_index * S::kStageBytes;
    const unsigned char* v_tile = k_tile + KTile::kBytes;
    wait_for_copies<2 * S::kStages - 1>();
    float products[kIsNarrow ? 2 : 3][4] = {};
#pragma unroll
    for (unsigned j = 0; j < S::kBlockDim / 64; ++j) {
      const uint4 codes_0 = KTile::codes(k_tile, g, 4 * j + t);
      const uint4 codes_1 = KTile::codes(k_tile, g + 8, 4 * j + t);
#pragma unroll
      for (unsigned w = 0; w < 4; ++w) {
        std::uint32_t x[4], y[4];
#pragma unroll
        for (unsigned b = 0; b < 4; ++b) {
          x[b] = look_up(shared, word_of(codes_0, w), b, k_lane);
          y[b] = look_up(shared, word_of(codes_1, w), b, k_lane);
        }
        const uint4 q =
            reinterpret_cast<const uint4*>(shared + S::kQueries)[(block * S::kSteps + 4 * j + w) * kWarp + lane];
        if constexpr (kIsNarrow) {
          multiply_add(products[0], {x[0], y[0], x[1], y[1]}, q.x, q.y);
          multiply_add(products[1], {x[2], y[2], x[3], y[3]}, q.z, q.w);
        } else {
          const std::uint32_t values[4] = {values_of(x[0], x[1]), values_of(y[0], y[1]), values_of(x[2], x[3]),
                                           values_of(y[2], y[3])};
          const std::uint32_t remainders[4] = {remainders_of(x[0], x[1]), remainders_of(y[0], y[1]),
                                               remainders_of(x[2], x[3]), remainders_of(y[2], y[3])};
          multiply_add(products[0], values, q.x, q.y);
          multiply_add(products[1], values, q.z, q.w);
          multiply_add(products[2], remainders, q.x, q.y);
        }
      }
    }
    float scores[4];  // of keys g and g + 8, each for both columns
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
      float score = 0.0f;
      if constexpr (kIsNarrow) {
        score = products[0][i] + products[1][i];
        score += __shfl_xor_sync(kAllLanes, score, 2);  // the row's other column
      } else {
        score = products[0][i] + (products[1][i] + products[2][i]);
      }
      scores[i] = score * k_norms[i / 2] * q_scales[i % 2];
    }
    float weights_of_v[2] = {v_norms[0] * v_scale, v_norms[1] * v_scale};
    const TqU32 next = tile + S::kStages * S::kUnits;
    if (tile + S::kUnits < tiles_end) load_norms(tile + S::kUnits);
    __syncwarp();
    if (next < tiles_end) copy_k(stage_index, next);
    end_copies();
    if constexpr (kBlocks > 1) {
      auto* shared_scores =
          reinterpret_cast<float4*>(shared + S::kExchange) + (exchange * S::kUnits + unit) * 2 * kWarp;
      shared_scores[block * kWarp + lane] = make_float4(scores[0], scores[1], scores[2], scores[3]);
      wait_for_pair(unit);
      const float4 a = shared_scores[lane], b = shared_scores[kWarp + lane];
      scores[0] = a.x + b.x;
      scores[1] = a.y + b.y;
      scores[2] = a.z + b.z;
      scores[3] = a.w + b.w;
      exchange ^= 1;
    }

    if (args.softcap > 0.0f) {
#pragma unroll
      for (unsigned i = 0; i < 4; ++i) scores[i] = cap * tanhf((scores[i] + biases[i % 2] * kLog2E) / cap);
    }
    float v_scores[4];  // with the logarithm of V's norm: of the weights that meet V
    const float v_logs[2] = {__log2f(fabsf(weights_of_v[0])), __log2f(fabsf(weights_of_v[1]))};
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
      scores[i] = clamped(scores[i], kLargestScore);
      v_scores[i] = scores[i] + v_logs[i / 2];
    }
    const TqU32 tile_key = first_key + tile * kKeys;
    if (tile_key < last_range.begin || tile_key + kKeys > first_range.end) {  // not all rows see all keys
#pragma unroll
      for (unsigned i = 0; i < 4; ++i) {
        const TqU32 age = tile_key + g + 8 * (i / 2);
        if (age < begins[i % 2] || age >= ends[i % 2]) scores[i] = v_scores[i] = -INFINITY;
      }
    }
    const float x[2] = {fmaxf(scores[0], scores[2]), fmaxf(scores[1], scores[3])};
    const float y[2] = {fmaxf(v_scores[0], v_scores[2]), fmaxf(v_scores[1], v_scores[3])};
    const bool grows = x[0] > maxima[0] + kSlack || x[1] > maxima[1] + kSlack || y[0] > v_maxima[0] + kSlack ||
                       y[1] > v_maxima[1] + kSlack;
    if (__any_sync(kAllLanes, grows)) {
#pragma unroll
      for (unsigned c = 0; c < 2; ++c) {
        float new_max = x[c], new_v_max = y[c];
#pragma unroll
        for (unsigned step = 4; step < kWarp; step *= 2) {
          new_max = fmaxf(new_max, __shfl_xor_sync(kAllLanes, new_max, step));
          new_v_max = fmaxf(new_v_max, __shfl_xor_sync(kAllLanes, new_v_max, step));
        }
        new_max = fmaxf(maxima[c], new_max);
        new_v_max = fmaxf(v_maxima[c], new_v_max);
        sums[c] *= power_of_two(maxima[c] - new_max);
        const float correction = power_of_two(v_maxima[c] - new_v_max);
        maxima[c] = new_max;
        v_maxima[c] = new_v_max;
#pragma unroll
        for (unsigned i = 0; i < S::kSteps; ++i) {
          out[i][c] *= correction;
          out[i][2 + c] *= correction;
        }
      }
    }
    float weights[4];
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
      sums[i % 2] += power_of_two(scores[i] - maxima[i % 2]);
      weights[i] = copysignf(kWeightScale * power_of_two(v_scores[i] - v_maxima[i % 2]), weights_of_v[i / 2]);
    }
    // Of each of the lane's four keys, twice.
    std::uint32_t p[4], p_low[4];
#pragma unroll
    for (unsigned i = 0; i < 2; ++i) {
      const std::uint32_t values = pack_halves(weights[2 * i], weights[2 * i + 1]);
      const std::uint32_t remainders = pack_remainders(weights[2 * i], weights[2 * i + 1], values);
      const std::uint32_t own = transpose(kIsNarrow && t >= 2 ? remainders : values);
      p[2 * i] = first_twice(own);
      p[2 * i + 1] = second_twice(own);
      if constexpr (!kIsNarrow) {
        const std::uint32_t low = transpose(remainders);
        p_low[2 * i] = first_twice(low);
        p_low[2 * i + 1] = second_twice(low);
      }
    }

    wait_for_copies<2 * S::kStages - 1>();
#pragma unroll
    for (unsigned h = 0; h < S::kBlockDim / 128; ++h) {
      uint4 codes[4];  // of keys 2t, 2t + 1, 2t + 8 and 2t + 9
#pragma unroll
      for (unsigned r = 0; r < 4; ++r) {
        codes[r] = VTile::codes(v_tile, 2 * t + r % 2 + 8 * (r / 2), 8 * h + g);
      }
#pragma unroll
      for (unsigned w = 0; w < 4; ++w) {
#pragma unroll
        for (unsigned b = 0; b < 4; b += 2) {
          std::uint32_t x[4], y[4];
#pragma unroll
          for (unsigned r = 0; r < 4; ++r) {
            x[r] = look_up(shared, word_of(codes[r], w), b, v_lane);
            y[r] = look_up(shared, word_of(codes[r], w), b + 1, v_lane);
          }
          float (&sum)[4] = out[h * 8 + w * 2 + b / 2];
          multiply_add(sum, {x[0], y[0], x[1], y[1]}, p[0], p[1]);
          multiply_add(sum, {x[2], y[2], x[3], y[3]}, p[2], p[3]);
          if constexpr (!kIsNarrow) {
            multiply_add(sum, {x[0], y[0], x[1], y[1]}, p_low[0], p_low[1]);
            multiply_add(sum, {x[2], y[2], x[3], y[3]}, p_low[2], p_low[3]);
          }
        }
      }
    }
    __syncwarp();
    if (next < tiles_end) copy_v(stage_index, next);
    end_copies();
    stage_index = stage_index + 1 == S::kStages ? 0 : stage_index + 1;
  }

  if constexpr (kBlocks > 1) {
    // Every unit takes the same number of barriers, which is what compute-sanitizer counts by.
    for (; round < rounds; ++round) wait_for_pair(unit);
  }

  if constexpr (!kIsNarrow) let_next_start();

  // The units' results become one. Two warps of a unit have the same sums, but each its own weighted maximum.
#pragma unroll
  for (unsigned c = 0; c < 2; ++c) {
#pragma unroll
    for (unsigned step = 4; step < kWarp; step *= 2) sums[c] += __shfl_xor_sync(kAllLanes, sums[c], step);
    if (g == 0 && block == 0 && first_row == 2 * t) {
      states[unit * kRows + first_row + c] = make_float2(maxima[c], sums[c]);
    }
  }
  wait_for_copies<0>();
  __syncthreads();
  const auto merged_state = [&](unsigned r) {
    float max = -FLT_MAX, sum = 0.0f;
    for (unsigned u = 0; u < S::kUnits; ++u) max = fmaxf(max, states[u * kRows + r].x);
    for (unsigned u = 0; u < S::kUnits; ++u) {
      const float2 state = states[u * kRows + r];
      sum += state.y * exp2f(state.x - max);
    }
    return make_float2(max, sum);
  };
  auto* outputs = reinterpret_cast<float*>(shared);
#pragma unroll
  for (unsigned c = 0; c < 2; ++c) {
    if (first_row + c >= rows.count) continue;
    const float2 merged = merged_state(first_row + c);
    // A row that sees nothing here leaves zeros.
    const float factor = merged.y == 0.0f ? 0.0f : exp2f(v_maxima[c] - merged.x) / (merged.y * kWeightScale);
    float* output = outputs + (unit * kRows + 2 * t + c) * S::kOutputStride + block * S::kBlockDim;
#pragma unroll
    for (unsigned i = 0; i < S::kSteps; ++i) {
      *reinterpret_cast<float2*>(output + (i * 8 + g) * 2) = make_float2(out[i][c] * factor, out[i][2 + c] * factor);
    }
  }
  __syncthreads();
  for (unsigned i = thread_index(); i < rows.count * kHeadDim / 2; i += S::kThreads) {
    const unsigned r = i / (kHeadDim / 2), pair = i % (kHeadDim / 2);
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (unsigned u = 0; u < S::kUnits; ++u) {
#pragma unroll
      for (unsigned column = 0; column < kRows; column += kIsNarrow ? kNarrowRows : kRows) {
        const float2 part =
            *reinterpret_cast<const float2*>(outputs + (u * kRows + r + column) * S::kOutputStride + 2 * pair);
        sum.x += part.x;
        sum.y += part.y;
      }
    }
    const unsigned within = pair % (S::kBlockDim / 2), step = within / 8, group = within % 8;
    const unsigned coordinate =
        pair / (S::kBlockDim / 2) * S::kBlockDim + step / 8 * 128 + group * kChunk + step % 8 * 2;
    const std::uint64_t row = rows.row(call, r);
    *reinterpret_cast<float2*>(outputs_of_row<kHeadDim>(call, row) + split * kHeadDim + coordinate) = sum;
  }
  if (thread_index() < rows.count) {
    const std::uint64_t row = rows.row(call, thread_index());
    const float2 merged = merged_state(thread_index());
    states_of_row<GroupState, kHeadDim>(call, row)[split] = {merged.x, merged.y};
  }
#endif
}

/// Calls visit(K's high bits, V's high bits, whether there are so few rows that each has two columns).
template <class Visit>
void with_group_format(const AttendCall& call, const Visit& visit) {
  with_high_bits(call.k.high_bits, [&](auto k_high_bits) {
    with_high_bits(call.v.high_bits, [&](auto v_high_bits) {
      if (call.head_tile <= kNarrowRows) return visit(k_high_bits, v_high_bits, std::true_type{});
      visit(k_high_bits, v_high_bits, std::false_type{});
    });
  });
}

}  // namespace

template <unsigned kHeadDim>
void set_group_block(const AttendCall& call, Launch& sizes) {
  with_group_format(call, [&](auto k_high_bits, auto v_high_bits, auto is_narrow) {
    using S = Shape<kHeadDim, k_high_bits, v_high_bits, is_narrow>;
    sizes.block = {kWarp, S::kWarps};
    sizes.shared_bytes = S::kBytes;
  });
}

template <unsigned kHeadDim>
void launch_attend_group(const AttendCall& call, const Launch& sizes, cudaStream_t stream) {
  with_group_format(call, [&](auto k_high_bits, auto v_high_bits, auto is_narrow) {
    constexpr auto kKernel = attend_group_kernel<kHeadDim, k_high_bits, v_high_bits, is_narrow>;
    // Holds for the current device alone. Where it is refused, so is the launch.
    static_cast<void>(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kGroupSharedBytes));
    launch_overlapping(kKernel, sizes, stream, call);
  });
}

}  // namespace tq_hb
