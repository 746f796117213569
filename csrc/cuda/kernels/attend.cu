// Attention for a query head at a time, of every shape and format.
//
// Grid:   (rows, splits) blocks of (32, nsg) threads; a row is one head of one query.
// Work:   warp s of split w takes the blocks of TQ_BLOCK keys w * nsg + s, then every splits * nsg-th one. All lanes
//         score a key together, lane t weighs key t of the block, and each lane adds up its own coordinates.
// Shared: the query, the levels of K and V, and at the end every warp's output.
//
// Scores are carried in double, so that any finite scale and norm keeps its order. A key that the row does not see is
// never read.

#include "core/query_range.h"
#include "cuda/kernels/dispatch.h"
#include "cuda/kernels/kernels.h"
#include "cuda/kernels/partials.cuh"
#include "cuda/kernels/query.cuh"
#include "cuda/kernels/row.cuh"

namespace tq_hb {
namespace {

constexpr unsigned kMaxWarps = 4;

/// A lane's part of a row: quads of coordinates, the lanes' side by side.
template <unsigned kHeadDim>
struct LanePart {
  static constexpr unsigned kQuads = kHeadDim < 4 * kWarp ? 1 : kHeadDim / (4 * kWarp);
  static constexpr unsigned kNorms = Row<kHeadDim>::kNorms;

  /// Whether the lane has a part; of the shortest rows only every other lane has one.
  static __device__ bool has_part(unsigned lane) { return lane < kHeadDim / 4; }
  static __device__ unsigned quad(unsigned lane, unsigned i) { return lane + i * kWarp; }
  static __device__ constexpr unsigned norm_of(unsigned i) { return i * kNorms / kQuads; }
};

__device__ inline float4 look_up(const float* levels, std::uint32_t codes) {
  return make_float4(levels[codes & 0xFF], levels[codes >> 8 & 0xFF], levels[codes >> 16 & 0xFF], levels[codes >> 24]);
}

/// The table of a codebook, repeated over all 256 byte values: bits above its width do not count.
__device__ inline void load_levels(float (&levels)[256], TqU32 codebook, unsigned cbits) {
  const float* table = levels_of(codebook, cbits);
  for (unsigned i = threadIdx.y * kWarp + threadIdx.x; i < 256; i += blockDim.y * kWarp) {
    levels[i] = table[i & ((1u << cbits) - 1)];
  }
}

template <unsigned kHeadDim>
struct AttendShared {
  float q[kHeadDim];
  float outputs[kMaxWarps][kHeadDim];
  double maxima[kMaxWarps], sums[kMaxWarps];
  double q_scale;
  float k_levels[256], v_levels[256];
};

template <unsigned kHeadDim, unsigned kKHighBits, unsigned kVHighBits>
__global__ void __launch_bounds__(kMaxWarps* kWarp) attend_kernel(const __grid_constant__ AttendCall call) {
  using Part = LanePart<kHeadDim>;
  using KCodes = Codes<kHeadDim, kKHighBits>;
  using VCodes = Codes<kHeadDim, kVHighBits>;
  constexpr unsigned kNorms = Part::kNorms;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& [q, outputs, maxima, sums, q_scale, k_levels, v_levels] =
      *reinterpret_cast<AttendShared<kHeadDim>*>(shared_bytes);

  const TqFlashAttnVecArgs& args = call.args;
  const unsigned lane = threadIdx.x, warp = threadIdx.y;
  const TqU32 row = blockIdx.x;
  const TqU32 kv_head = row % args.num_heads / (args.num_heads / args.num_kv_heads);
  const QueryRange range = range_of_row(args, row);
  const float bias = call.score_bias != nullptr ? call.score_bias[row] : 0.0f;
  load_levels(k_levels, args.codebook, call.k.cbits);
  load_levels(v_levels, args.codebook, call.v.cbits);
  if (warp == 0) {
    Row<kHeadDim> prepared;
    prepared.load(call.q + std::uint64_t{row} * kHeadDim, lane);
    const double undo = scale_by_power_of_two(prepared);
    if (args.fuse_fwht_pre == 1) prepared.rotate(lane);
    prepared.store(q, lane);
    if (lane == 0) q_scale = undo * args.scale * decode_factor<kHeadDim>(1.0f, args.scale_factor_d512);
  }
  __syncthreads();
  const float v_scale = decode_factor<kHeadDim>(1.0f, args.scale_factor_d512);

  float4 part[Part::kQuads], out[Part::kQuads];
#pragma unroll
  for (unsigned i = 0; i < Part::kQuads; ++i) {
    const unsigned quad = Part::quad(lane, i);
    part[i] = Part::has_part(lane) ? reinterpret_cast<const float4*>(q)[quad] : make_float4(0, 0, 0, 0);
    out[i] = make_float4(0, 0, 0, 0);
  }
  double max = -HUGE_VAL, sum = 0.0;

  const std::uint64_t first_slot = std::uint64_t{kv_head} * args.kv_capacity;
  // Blocks start at the first key that is seen, so that what a window leaves out changes no bit.
  const unsigned num_keys = range.end - range.begin;
  for (std::uint64_t first = std::uint64_t{blockIdx.y * blockDim.y + warp} * TQ_BLOCK; first < num_keys;
       first += gridDim.y * blockDim.y * TQ_BLOCK) {
    const unsigned count = min(num_keys - static_cast<unsigned>(first), TQ_BLOCK);
    const bool is_seen = lane < count;
    const TqU32 age = range.begin + static_cast<TqU32>(first) + (is_seen ? lane : 0);
    const std::uint64_t own_slot = first_slot + slot_of_age(args, age);

    float dots[kNorms] = {};
    for (unsigned t = 0; t < count; ++t) {
      const std::uint64_t slot = __shfl_sync(kAllLanes, own_slot, t);
      float sums_of_lane[kNorms] = {};
#pragma unroll
      for (unsigned i = 0; i < Part::kQuads; ++i) {
        if (!Part::has_part(lane)) continue;
        const float4 key =
            look_up(k_levels, KCodes::quad(call.k.packed + slot * KCodes::kRowBytes, Part::quad(lane, i)));
        float& dot = sums_of_lane[Part::norm_of(i)];
        dot += part[i].x * key.x + part[i].y * key.y + part[i].z * key.z + part[i].w * key.w;
      }
#pragma unroll
      for (unsigned n = 0; n < kNorms; ++n) {
        const float dot = warp_sum(sums_of_lane[n]);
        if (lane == t) dots[n] = dot;
      }
    }

    double score = -HUGE_VAL;
    float factors[kNorms] = {};
    if (is_seen) {
      score = 0.0;
#pragma unroll
      for (unsigned n = 0; n < kNorms; ++n) {
        score += static_cast<double>(dots[n]) * call.k.norms[own_slot * kNorms + n];
        factors[n] = call.v.norms[own_slot * kNorms + n] * v_scale;
      }
      score = score * q_scale + bias;
      if (args.softcap > 0.0f) score = args.softcap * tanh(score / args.softcap);
    }
    const double new_max = fmax(max, warp_max(score));
    const float correction = expf(static_cast<float>(max - new_max));
    const float weight = is_seen ? expf(static_cast<float>(score - new_max)) : 0.0f;
    sum = sum * correction + warp_sum(weight);
    max = new_max;
#pragma unroll
    for (unsigned i = 0; i < Part::kQuads; ++i) out[i] = scaled(out[i], correction);
#pragma unroll
    for (unsigned n = 0; n < kNorms; ++n) factors[n] *= weight;
    for (unsigned t = 0; t < count; ++t) {
      const std::uint64_t slot = __shfl_sync(kAllLanes, own_slot, t);
      float factor[kNorms];
#pragma unroll
      for (unsigned n = 0; n < kNorms; ++n) factor[n] = __shfl_sync(kAllLanes, factors[n], t);
#pragma unroll
      for (unsigned i = 0; i < Part::kQuads; ++i) {
        if (!Part::has_part(lane)) continue;
        const float4 value =
            look_up(v_levels, VCodes::quad(call.v.packed + slot * VCodes::kRowBytes, Part::quad(lane, i)));
        out[i] = multiply_add(factor[Part::norm_of(i)], value, out[i]);
      }
    }
  }

#pragma unroll
  for (unsigned i = 0; i < Part::kQuads; ++i) {
    if (Part::has_part(lane)) reinterpret_cast<float4*>(outputs[warp])[Part::quad(lane, i)] = out[i];
  }
  if (lane == 0) {
    maxima[warp] = max;
    sums[warp] = sum;
  }
  __syncthreads();

  // The warps' results become one. No keys at all leave zeros and the logarithm of zero.
  double all_max = -HUGE_VAL, all_sum = 0.0;
  for (unsigned w = 0; w < blockDim.y; ++w) all_max = fmax(all_max, maxima[w]);
  float weights[kMaxWarps];
  for (unsigned w = 0; w < kMaxWarps; ++w) {
    weights[w] = w < blockDim.y && sums[w] != 0.0 ? expf(static_cast<float>(maxima[w] - all_max)) : 0.0f;
    if (w < blockDim.y) all_sum += sums[w] * weights[w];
  }
  const bool is_empty = all_sum == 0.0;
  const float inverse = is_empty ? 0.0f : static_cast<float>(1.0 / all_sum);
  float* partial = outputs_of_row<kHeadDim>(call, row) + blockIdx.y * kHeadDim;
  for (unsigned j = warp * kWarp + lane; j < kHeadDim; j += blockDim.y * kWarp) {
    float value = 0.0f;
    for (unsigned w = 0; w < blockDim.y; ++w) value += weights[w] * outputs[w][j];
    partial[j] = value * inverse;
  }
  if (warp == 0 && lane == 0) {
    states_of_row<HeadState, kHeadDim>(call, row)[blockIdx.y] = {is_empty ? -HUGE_VAL : all_max + log(all_sum)};
  }
}

}  // namespace

Launch attend_launch(const AttendCall& call) {
  Launch sizes{{call.args.num_queries * call.args.num_heads, call.args.nwg}, {kWarp, call.args.nsg}};
  with_head_dim(call.args.head_dim, [&](auto head_dim) { sizes.shared_bytes = sizeof(AttendShared<head_dim>); });
  return sizes;
}

void launch_attend(const AttendCall& call, cudaStream_t stream) {
  const Launch sizes = attend_launch(call);
  with_head_dim(call.args.head_dim, [&](auto head_dim) {
    with_high_bits(call.k.high_bits, [&](auto k_high_bits) {
      with_high_bits(call.v.high_bits, [&](auto v_high_bits) {
        attend_kernel<decltype(head_dim)::value, decltype(k_high_bits)::value, decltype(v_high_bits)::value>
            <<<sizes.grid, sizes.block, sizes.shared_bytes, stream>>>(call);
      });
    });
  });
}

}  // namespace tq_hb
