// Rotates, measures and quantises rows into the cache: one SIMD group per row.
//
// Grid:  (KV heads, tokens, tensors) threadgroups of (32, 1, 1) threads.
//
// The bytes are part of the format: sums run in a fixed order, nothing contracts to a fused multiply-add,
// division and square root are the correctly rounded ones. A row whose norm is not finite is left as it
// was and reported.

#include "core/abi.h"
#include "core/codec_constants.h"
#include "metal/kernels/cache_slot.h"
#include "metal/kernels/packing.h"
#include "metal/kernels/rotation.h"
#include "metal/kernels/slots.h"
#include "metal/kernels/tables.h"

#pragma clang fp contract(off)
#if __METAL_VERSION__ >= 320
#pragma METAL fp contract(off)
#endif

/// sqrt(D): gives the coordinates of a row of length 1 the variance 1.
template <int D>
inline float to_unit_variance() {
  return D == 64 ? 8.0f : D == 128 ? 11.3137085f : 16.0f;
}

/// One tensor: where rows come from and go to.
struct EncodeTarget {
  device const float* src;
  device uchar* packed;
  device float* norms;
  device atomic_uint* status;
  constant float* boundaries;
  uint cbits;
};

/// Number of boundaries strictly below the value, by a binary search of `cbits` steps.
inline uint index_of(float value, constant float* boundaries, uint cbits) {
  uint index = 0;
  for (uint step = 1u << (cbits - 1); step > 0; step /= 2) {
    if (value > boundaries[index + step - 1]) index += step;
  }
  return index;
}

/// The sum of squares of the lane's norm block, in every lane: serial in the lane, then an XOR tree over the
/// lanes that share the block.
template <int D>
inline float block_energy(thread const float (&y)[D / 32]) {
  float sum = 0.0f;
  for (int i = 0; i < D / 32; ++i) sum += y[i] * y[i];
  constexpr ushort kLanesPerBlock = 32 / tq_hb::norm_blocks(D);
  for (ushort mask = 1; mask < kLanesPerBlock; mask *= 2) sum += simd_shuffle_xor(sum, mask);
  return sum;
}

template <int D>
inline void encode_row(EncodeTarget target, constant TqHadamardQuantizeArgs& args, uint head, uint token, ushort lane) {
  constexpr int E = D / 32;
  constexpr bool kHasTwoNorms = tq_hb::norm_blocks(D) == 2;
  const ulong src_row = ulong(token) * args.num_kv_heads + head;
  float y[E];
  load_row<E>(target.src + src_row * D, lane, y);
  rotate_row<E>(y, lane);
  for (int i = 0; i < E; ++i) y[i] = fabs(y[i]) < tq_hb::kFlushBelow ? 0.0f : y[i];

  const float length = precise::sqrt(block_energy<D>(y));
  const float norm = kHasTwoNorms ? length * tq_hb::kBlockRms : length;
  if (!simd_all(isfinite(norm))) {
    if (lane == 0) atomic_fetch_min_explicit(target.status, uint(src_row), memory_order_relaxed);
    return;
  }
  const float inverse = norm > tq_hb::kSmallestNorm ? precise::divide(1.0f, norm) : 0.0f;

  uint codes[(E + 3) / 4];
  for (int i = 0; i < E; ++i) {
    const float v = kHasTwoNorms ? y[i] * inverse * args.scale_factor_d512 : y[i] * (inverse * to_unit_variance<D>());
    const uint code = index_of(v, target.boundaries, target.cbits) << (i % 4 * 8);
    codes[i / 4] = i % 4 == 0 ? code : codes[i / 4] | code;
  }

  const ulong row = ulong(head) * args.cache_capacity + encode_slot(args, token);
  store_codes<D>(codes, target.packed + row * row_bytes(D, target.cbits), target.cbits, lane);
  if (kHasTwoNorms) {
    if (lane % 16 == 0) target.norms[row * 2 + lane / 16] = norm;
  } else {
    if (lane == 0) target.norms[row] = norm;
  }
}

template <int D>
kernel void hadamard_quantize_kv_hb(device const float* src [[buffer(TQ_QUANTIZE_SRC)]],
                                    device uchar* packed [[buffer(TQ_QUANTIZE_PACKED)]],
                                    device float* norms [[buffer(TQ_QUANTIZE_NORMS)]],
                                    constant TqHadamardQuantizeArgs& args [[buffer(TQ_QUANTIZE_ARGS)]],
                                    device atomic_uint* status [[buffer(TQ_QUANTIZE_STATUS)]],
                                    uint3 group [[threadgroup_position_in_grid]],
                                    ushort lane [[thread_index_in_simdgroup]]) {
  const EncodeTarget target = {src, packed, norms, status, codebook_boundaries(args.codebook, k_cbits()), k_cbits()};
  encode_row<D>(target, args, group.x, group.y, lane);
}

template <int D>
kernel void hadamard_quantize_kv_hb_dual(device const float* src_k [[buffer(TQ_QUANTIZE_DUAL_SRC_K)]],
                                         device const float* src_v [[buffer(TQ_QUANTIZE_DUAL_SRC_V)]],
                                         device uchar* k_packed [[buffer(TQ_QUANTIZE_DUAL_K_PACKED)]],
                                         device uchar* v_packed [[buffer(TQ_QUANTIZE_DUAL_V_PACKED)]],
                                         device float* k_norms [[buffer(TQ_QUANTIZE_DUAL_K_NORMS)]],
                                         device float* v_norms [[buffer(TQ_QUANTIZE_DUAL_V_NORMS)]],
                                         constant TqHadamardQuantizeArgs& args [[buffer(TQ_QUANTIZE_DUAL_ARGS)]],
                                         device atomic_uint* status [[buffer(TQ_QUANTIZE_DUAL_STATUS)]],
                                         uint3 group [[threadgroup_position_in_grid]],
                                         ushort lane [[thread_index_in_simdgroup]]) {
  const EncodeTarget k = {src_k, k_packed, k_norms, status, codebook_boundaries(args.codebook, k_cbits()), k_cbits()};
  const EncodeTarget v = {src_v,    v_packed, v_norms, status + 1, codebook_boundaries(args.codebook, v_cbits()),
                          v_cbits()};
  encode_row<D>(group.z == 0 ? k : v, args, group.x, group.y, lane);
}

#define TQ_INSTANTIATE(D)                                                                                              \
  template [[host_name("hadamard_quantize_kv_hb_d" #D)]] kernel void hadamard_quantize_kv_hb<D>(                       \
      device const float*, device uchar*, device float*, constant TqHadamardQuantizeArgs&, device atomic_uint*, uint3, \
      ushort);                                                                                                         \
  template [[host_name("hadamard_quantize_kv_hb_dual_d" #D)]] kernel void hadamard_quantize_kv_hb_dual<D>(             \
      device const float*, device const float*, device uchar*, device uchar*, device float*, device float*,            \
      constant TqHadamardQuantizeArgs&, device atomic_uint*, uint3, ushort);
TQ_HB_FOR_EACH_HEAD_DIM(TQ_INSTANTIATE)
#undef TQ_INSTANTIATE
