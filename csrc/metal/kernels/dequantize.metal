// Rebuilds consecutive positions of the cache, still rotated.
//
// Grid:  (KV heads, tokens, 1) threadgroups of (32, 1, 1) threads. `args.write_pos` is the first position.

#include "core/abi.h"
#include "core/codec_constants.h"
#include "metal/kernels/cache_slot.h"
#include "metal/kernels/packing.h"
#include "metal/kernels/rotation.h"
#include "metal/kernels/slots.h"
#include "metal/kernels/tables.h"

kernel void tq_dequantize_hb_kv(device const uchar* packed [[buffer(TQ_DEQUANTIZE_PACKED)]],
                                device const float* norms [[buffer(TQ_DEQUANTIZE_NORMS)]],
                                device float* output [[buffer(TQ_DEQUANTIZE_OUTPUT)]],
                                constant TqHadamardQuantizeArgs& args [[buffer(TQ_DEQUANTIZE_ARGS)]],
                                uint3 group [[threadgroup_position_in_grid]],
                                ushort lane [[thread_index_in_simdgroup]]) {
  const uint head_dim = args.head_dim;
  const uint blocks = tq_hb::norm_blocks(head_dim);
  const ulong row = ulong(group.x) * args.cache_capacity + encode_slot(args, group.y);
  constant float* levels = codebook_levels(args.codebook, k_cbits());
  device const uchar* codes = packed + row * row_bytes(head_dim, k_cbits());
  device float* out = output + (ulong(group.y) * args.num_kv_heads + group.x) * head_dim;
  for (uint j = lane; j < head_dim; j += 32) {
    const float norm = norms[row * blocks + j / tq_hb::kNormDim];
    const float factor =
        blocks == 1 ? norm * tq_hb::inverse_sqrt_head_dim(head_dim) : precise::divide(norm, args.scale_factor_d512);
    out[j] = levels[load_code(codes, head_dim, k_cbits(), j)] * factor;
  }
}
