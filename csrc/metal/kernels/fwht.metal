// Rotations in place on float32 rows.
//
// Grid:  (rows, 1, 1) threadgroups of (32, 1, 1) threads.

#include "core/codec_constants.h"
#include "metal/kernels/rotation.h"
#include "metal/kernels/row_shape.h"
#include "metal/kernels/slots.h"

enum class Transform { kPremult, kUndo, kPlain };

template <int D, Transform kTransform>
kernel void fwht_rows(device float* data [[buffer(TQ_FWHT_DATA)]], constant TqFwhtArgs& args [[buffer(TQ_FWHT_ARGS)]],
                      uint row [[threadgroup_position_in_grid]], ushort lane [[thread_index_in_simdgroup]]) {
  constexpr int E = D / 32;
  if (row >= args.num_rows) return;
  device float* at = data + ulong(row) * D;
  float y[E];
  load_row<E>(at, lane, y);
  if (kTransform == Transform::kPremult) {
    rotate_row<E>(y, lane);
  } else if (kTransform == Transform::kUndo) {
    unrotate_row<E>(y, lane);
  } else {
    hadamard<E>(y, lane);
    for (int i = 0; i < E; ++i) y[i] *= tq_hb::inverse_sqrt_head_dim(D);
  }
  store_row<E>(at, lane, y);
}

#define TQ_INSTANTIATE_ONE(name, D, transform)                                              \
  template [[host_name(#name "_f32_d" #D)]] kernel void fwht_rows<D, Transform::transform>( \
      device float*, constant TqFwhtArgs&, uint, ushort);
#define TQ_INSTANTIATE(D)                            \
  TQ_INSTANTIATE_ONE(fwht_sign_premult, D, kPremult) \
  TQ_INSTANTIATE_ONE(fwht_sign_undo, D, kUndo)       \
  TQ_INSTANTIATE_ONE(fwht_standalone, D, kPlain)
TQ_HB_FOR_EACH_HEAD_DIM(TQ_INSTANTIATE)
#undef TQ_INSTANTIATE
#undef TQ_INSTANTIATE_ONE
