// Encoding, decoding and the rotation: a warp takes a row.
//
// Compiled without contraction of a*b+c, with IEEE division and square root: the bytes are part of the format.

#include "cuda/kernels/dispatch.h"
#include "cuda/kernels/kernels.h"
#include "cuda/kernels/row.cuh"

namespace tq_hb {
namespace {

constexpr unsigned kEncodeWarps = 8;
// Values below this count as zero, as on every backend.
constexpr float kFlushBelow = 0x1p-60f;
constexpr float kSmallestNorm = 1e-10f;
constexpr float kBlockRms = 1.0f / 16.0f;

/// Number of boundaries below each value, by binary searches in step with each other.
template <unsigned kCount>
__device__ void find_indices(const float (&values)[kCount], const float* boundaries, unsigned cbits,
                             unsigned (&indices)[kCount]) {
#pragma unroll
  for (unsigned i = 0; i < kCount; ++i) indices[i] = 0;
  for (unsigned step = 1u << (cbits - 1); step > 0; step /= 2) {
#pragma unroll
    for (unsigned i = 0; i < kCount; ++i) indices[i] += values[i] > boundaries[indices[i] + step - 1] ? step : 0;
  }
}

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

template <unsigned kHeadDim>
__global__ void __launch_bounds__(kEncodeWarps* kWarp) quantize_kernel(const __grid_constant__ QuantizeCall call) {
  using R = Row<kHeadDim>;
  __shared__ float boundaries[256];
  __shared__ __align__(16) std::uint8_t code_rows[kEncodeWarps][kHeadDim];
  const QuantizeTensor& tensor = call.tensors[blockIdx.y];
  const float* table = boundaries_of(call.args.codebook, tensor.cbits);
  for (unsigned i = threadIdx.x; i + 1 < 1u << tensor.cbits; i += blockDim.x) boundaries[i] = table[i];
  __syncthreads();

  const unsigned lane = threadIdx.x % kWarp;
  const unsigned warp = threadIdx.x / kWarp;
  const TqU32 heads = call.args.num_kv_heads;
  const TqU32 row = blockIdx.x * kEncodeWarps + warp;  // of those that are kept
  if (row >= heads * call.tokens) return;
  const TqU32 src_row = row + heads * call.first_token;

  R y;
  y.load(tensor.src + std::uint64_t{src_row} * kHeadDim, lane);
  y.rotate(lane);
#pragma unroll
  for (unsigned i = 0; i < R::kPerLane; ++i) y.values[i] = fabsf(y.values[i]) < kFlushBelow ? 0.0f : y.values[i];
  const float norm = sqrtf(block_energy(y)) * (R::kNorms == 1 ? 1.0f : kBlockRms);
  if (!__all_sync(kAllLanes, isfinite(norm))) {
    if (lane == 0) atomicMin(tensor.status, src_row);
    return;
  }

  const float inverse = norm > kSmallestNorm ? 1.0f / norm : 0.0f;
  if constexpr (R::kNorms == 1) {
    y.multiply(inverse * sqrtf(static_cast<float>(kHeadDim)));
  } else {
    y.multiply(inverse);
    y.multiply(call.args.scale_factor_d512);
  }
  unsigned indices[R::kPerLane];
  find_indices(y.values, boundaries, tensor.cbits, indices);

  const std::uint64_t position = std::uint64_t{call.args.write_pos} + src_row / heads;
  const std::uint64_t slot = call.args.is_sliding == 1 ? position % call.args.cache_capacity : position;
  const std::uint64_t at = std::uint64_t{src_row % heads} * call.args.cache_capacity + slot;
  if (lane % (kWarp / R::kNorms) == 0) tensor.norms[at * R::kNorms + lane / (kWarp / R::kNorms)] = norm;
  std::uint8_t* codes = code_rows[warp] + lane * R::kPerLane;
#pragma unroll
  for (unsigned i = 0; i < R::kPerLane; ++i) codes[i] = static_cast<std::uint8_t>(indices[i]);
  __syncwarp();
  if (tensor.high_bits == 1) {
    using C = Codes<kHeadDim, 1>;
    C::write_planes(code_rows[warp], tensor.packed + at * C::kRowBytes, lane);
  } else if (tensor.high_bits == 2) {
    using C = Codes<kHeadDim, 2>;
    C::write_planes(code_rows[warp], tensor.packed + at * C::kRowBytes, lane);
  } else {
    auto* words = reinterpret_cast<std::uint32_t*>(tensor.packed + at * kHeadDim);
    for (unsigned w = lane; w < kHeadDim / 4; w += kWarp) {
      words[w] = reinterpret_cast<const std::uint32_t*>(code_rows[warp])[w];
    }
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
      row.multiply(Row<kHeadDim>::scale());
      break;
  }
  row.store(data, lane);
}

}  // namespace

Launch quantize_launch(const QuantizeCall& call) {
  const TqU32 rows = call.tokens * call.args.num_kv_heads;
  return {{(rows + kEncodeWarps - 1) / kEncodeWarps, call.num_tensors}, {kEncodeWarps * kWarp}};
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
