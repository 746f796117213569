// Encoding, decoding and the rotation: a warp takes a row.
//
// Compiled without contraction of a*b+c, with IEEE division and square root: the bytes are part of the format.

#include <algorithm>

#include "core/codec_constants.h"
#include "cuda/kernels/dispatch.h"
#include "cuda/kernels/kernels.h"
#include "cuda/kernels/row.cuh"

namespace tq_hb {
namespace {

constexpr unsigned kEncodeWarps = 8;
/// Enough to fill a GPU; each then encodes many rows with one grid.
constexpr TqU32 kMostEncodeBlocks = 1024;

/// Finds the number of boundaries below a value by the cell of a regular grid that the value lies in.
///
/// Cells are so narrow that each holds one boundary at most: the boundaries of the cells before are below the value,
/// those of the cells behind are not, and the cell's own is compared with it. `boundary` is that one, or for a cell
/// without any the next, and `below` counts those before it.
class Grid {
 public:
  struct Cell {
    float boundary;
    unsigned below;
  };
  static constexpr float kLimit = 5.0f;  // beyond every boundary
  static constexpr float kCellsPerUnit = 64.0f;
  static constexpr unsigned kCells = 2 * static_cast<unsigned>(kLimit * kCellsPerUnit) + 1;

  __device__ Grid(Cell* cells, TqU32 codebook, unsigned cbits) : cells_(cells) {
    const float* boundaries = boundaries_of(codebook, cbits);
    const unsigned count = (1u << cbits) - 1;
    if (threadIdx.x <= count) {
      const unsigned i = threadIdx.x;
      const unsigned first = i == 0 ? 0 : cell_of(boundaries[i - 1]) + 1;
      const unsigned last = i == count ? kCells - 1 : cell_of(boundaries[i]);
      const Cell cell{i == count ? INFINITY : boundaries[i], i};
      for (unsigned c = first; c <= last; ++c) cells_[c] = cell;
    }
    __syncthreads();
  }

  __device__ unsigned index_of(float value) const {
    const Cell cell = cells_[cell_of(value)];
    return cell.below + (value > cell.boundary ? 1 : 0);
  }

 private:
  /// Does not fall as the value grows, which is all that matters of its rounding.
  static __device__ unsigned cell_of(float value) {
    // The sum's unit in the last place is 1.
    constexpr float kShift = 0x1.8p23f + kLimit * kCellsPerUnit;
    const float inside = fminf(fmaxf(value, -kLimit), kLimit);
    return __float_as_uint(fmaf(inside, kCellsPerUnit, kShift)) - 0x4B400000u;
  }

  Cell* cells_;
};

template <std::size_t kCount>
constexpr bool fits_grid(const float (&boundaries)[kCount]) {
  for (std::size_t i = 1; i < kCount; ++i) {
    if ((boundaries[i] - boundaries[i - 1]) * Grid::kCellsPerUnit <= 1.0f) return false;
  }
  return -boundaries[0] < Grid::kLimit && boundaries[kCount - 1] < Grid::kLimit;
}
static_assert(fits_grid(kLloydMax5Boundaries) && fits_grid(kMlxNative5Boundaries));
static_assert(fits_grid(kLloydMax6Boundaries) && fits_grid(kMlxNative6Boundaries));
static_assert(fits_grid(kLloydMax8Boundaries) && fits_grid(kMlxNative8Boundaries));

/// The sum of squares of each norm block: serial inside a lane, then an XOR tree over the block's lanes.
template <unsigned kHeadDim>
__device__ float block_energy(const Row<kHeadDim>& row) {
  float energy = 0.0f;
#pragma unroll
  for (unsigned i = 0; i < Row<kHeadDim>::kPerLane; ++i) energy += row.values[i] * row.values[i];
#pragma unroll
  for (unsigned step = 1; step < kWarp / Row<kHeadDim>::kNorms; step *= 2) {
    energy += __shfl_xor_sync(kAllLanes, energy, step);
  }
  return energy;
}

/// Encodes a row that has been loaded; `row` counts those of the source.
template <unsigned kHeadDim>
__device__ void encode_row(const QuantizeCall& call, const QuantizeTensor& tensor, const Grid& grid, TqU32 row,
                           Row<kHeadDim> y, std::uint8_t* codes, unsigned lane) {
  using R = Row<kHeadDim>;
  constexpr unsigned kNormLanes = kWarp / R::kNorms;
  y.rotate(lane);
#pragma unroll
  for (unsigned i = 0; i < R::kPerLane; ++i) y.values[i] = fabsf(y.values[i]) < kFlushBelow ? 0.0f : y.values[i];
  const float norm = sqrtf(block_energy(y)) * (R::kNorms == 1 ? 1.0f : kBlockRms);
  if (!__all_sync(kAllLanes, isfinite(norm))) {
    if (lane == 0) atomicMin(tensor.status, row);
    return;
  }

  const float inverse = norm > kSmallestNorm ? 1.0f / norm : 0.0f;
  if constexpr (R::kNorms == 1) {
    y.multiply(inverse * sqrtf(static_cast<float>(kHeadDim)));
  } else {
    y.multiply(inverse);
    y.multiply(call.args.scale_factor_d512);
  }

  const TqU32 heads = call.args.num_kv_heads;
  const std::uint64_t position = std::uint64_t{call.args.write_pos} + row / heads;
  const std::uint64_t slot = call.args.is_sliding == 1 ? position % call.args.cache_capacity : position;
  const std::uint64_t at = std::uint64_t{row % heads} * call.args.cache_capacity + slot;
  if (lane % kNormLanes == 0) tensor.norms[at * R::kNorms + lane / kNormLanes] = norm;
  typename R::Bytes own;
#pragma unroll
  for (unsigned i = 0; i < R::kPerLane; ++i) own.values[i] = static_cast<std::uint8_t>(grid.index_of(y.values[i]));
  if (tensor.high_bits == 0) {
    reinterpret_cast<typename R::Bytes*>(tensor.packed + at * kHeadDim)[lane] = own;
    return;
  }
  __syncwarp();  // the row before has been read
  reinterpret_cast<typename R::Bytes*>(codes)[lane] = own;
  __syncwarp();
  if (tensor.high_bits == 1) {
    using C = Codes<kHeadDim, 1>;
    C::write_planes(codes, tensor.packed + at * C::kRowBytes, lane);
  } else {
    using C = Codes<kHeadDim, 2>;
    C::write_planes(codes, tensor.packed + at * C::kRowBytes, lane);
  }
}

template <unsigned kHeadDim>
__global__ void __launch_bounds__(kEncodeWarps* kWarp) quantize_kernel(const __grid_constant__ QuantizeCall call) {
  __shared__ Grid::Cell cells[Grid::kCells];
  __shared__ __align__(16) std::uint8_t code_rows[kEncodeWarps][kHeadDim];
  const QuantizeTensor& tensor = call.tensors[blockIdx.y];
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const TqU32 rows_end = (call.first_token + call.tokens) * call.args.num_kv_heads;
  const TqU32 stride = gridDim.x * kEncodeWarps;
  TqU32 row = call.first_token * call.args.num_kv_heads + blockIdx.x * kEncodeWarps + warp;
  Row<kHeadDim> next{};
  if (row < rows_end) next.load(tensor.src + std::uint64_t{row} * kHeadDim, lane);
  const Grid grid(cells, call.args.codebook, tensor.cbits);
  for (; row < rows_end; row += stride) {
    const Row<kHeadDim> y = next;
    if (row + stride < rows_end) next.load(tensor.src + std::uint64_t{row + stride} * kHeadDim, lane);
    encode_row(call, tensor, grid, row, y, code_rows[warp], lane);
  }
}

template <unsigned kHeadDim, unsigned kHighBits>
__global__ void dequantize_kernel(const __grid_constant__ DequantizeCall call) {
  using C = Codes<kHeadDim, kHighBits>;
  constexpr unsigned kNorms = Row<kHeadDim>::kNorms;
  const unsigned lane = threadIdx.x;
  const std::uint64_t token = blockIdx.x / call.args.num_kv_heads;
  const std::uint64_t head = blockIdx.x % call.args.num_kv_heads;
  const std::uint64_t slot = (call.first_slot + token) % call.args.cache_capacity;
  const std::uint64_t at = head * call.args.cache_capacity + slot;
  const std::uint8_t* codes = call.packed + at * C::kRowBytes;
  const float* levels = levels_of(call.args.codebook, call.cbits);
  const std::uint32_t mask = (1u << call.cbits) - 1;
  auto* output = reinterpret_cast<float4*>(call.output + std::uint64_t{blockIdx.x} * kHeadDim);
  for (unsigned quad = lane; quad < kHeadDim / 4; quad += kWarp) {
    const float norm = call.norms[at * kNorms + quad / (kNormBlock / 4)];
    const float factor = decode_factor<kHeadDim>(norm, call.args.scale_factor_d512);
    const std::uint32_t word = C::quad(codes, quad);
    output[quad] = make_float4(levels[word & mask] * factor, levels[word >> 8 & mask] * factor,
                               levels[word >> 16 & mask] * factor, levels[word >> 24 & mask] * factor);
  }
}

template <unsigned kHeadDim>
__global__ void transform_kernel(const __grid_constant__ TransformCall call) {
  const unsigned lane = threadIdx.x;
  float* data = call.data + std::uint64_t{blockIdx.x} * kHeadDim;
  Row<kHeadDim> row;
  row.load(data, lane);
  switch (call.transform) {
    case Transform::kRotate:
      row.rotate(lane);
      break;
    case Transform::kUnrotate:
      row.unrotate(lane);
      break;
    case Transform::kPlain:
      row.hadamard(lane);
      row.multiply(Row<kHeadDim>::kScale);
      break;
  }
  row.store(data, lane);
}

}  // namespace

Launch quantize_launch(const QuantizeCall& call) {
  const TqU32 rows = call.tokens * call.args.num_kv_heads;
  return {{std::min((rows + kEncodeWarps - 1) / kEncodeWarps, kMostEncodeBlocks), call.num_tensors},
          {kEncodeWarps * kWarp}};
}

void launch(const QuantizeCall& call, cudaStream_t stream) {
  const Launch sizes = quantize_launch(call);
  with_head_dim(call.args.head_dim,
                [&](auto head_dim) { quantize_kernel<head_dim><<<sizes.grid, sizes.block, 0, stream>>>(call); });
}

Launch dequantize_launch(const DequantizeCall& call) {
  return {{call.args.num_kv_heads * call.tokens}, {kWarp}};
}

void launch(const DequantizeCall& call, cudaStream_t stream) {
  const Launch sizes = dequantize_launch(call);
  with_head_dim(call.args.head_dim, [&](auto head_dim) {
    with_high_bits(call.high_bits, [&](auto high_bits) {
      dequantize_kernel<decltype(head_dim)::value, decltype(high_bits)::value>
          <<<sizes.grid, sizes.block, 0, stream>>>(call);
    });
  });
}

Launch transform_launch(const TransformCall& call) {
  return {{call.rows}, {kWarp}};
}

void launch(const TransformCall& call, cudaStream_t stream) {
  const Launch sizes = transform_launch(call);
  with_head_dim(call.head_dim,
                [&](auto head_dim) { transform_kernel<head_dim><<<sizes.grid, sizes.block, 0, stream>>>(call); });
}

}  // namespace tq_hb
