// Rotations in place on float32 rows.
//
// Grid:  (rows, 1, 1) threadgroups of (32, 1, 1) threads.

#include "core/abi.h"
#include "metal/kernels/rotation.h"

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
    for (int i = 0; i < E; ++i) y[i] *= rotation_scale<E>();
  }
  store_row<E>(at, lane, y);
}

#define TQ_INSTANTIATE(name, D, transform)                                                  \
  template [[host_name(#name "_f32_d" #D)]] kernel void fwht_rows<D, Transform::transform>( \
      device float*, constant TqFwhtArgs&, uint, ushort);
TQ_INSTANTIATE(fwht_sign_premult, 256, kPremult)
TQ_INSTANTIATE(fwht_sign_premult, 512, kPremult)
TQ_INSTANTIATE(fwht_sign_undo, 256, kUndo)
TQ_INSTANTIATE(fwht_sign_undo, 512, kUndo)
TQ_INSTANTIATE(fwht_standalone, 256, kPlain)
TQ_INSTANTIATE(fwht_standalone, 512, kPlain)
#undef TQ_INSTANTIATE
