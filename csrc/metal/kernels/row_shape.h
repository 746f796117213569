// How a SIMD group shares a row of a head's size. Read by host and device code.
#pragma once

#include "core/abi.h"
#include "core/head_dims.h"

namespace tq_hb {

// Enumerators, since a variable out here would have to name an address space in MSL, which C++ lacks.
enum : TqU32 {
  /// Coordinates that share a norm; a shorter row has one norm as well.
  kNormDim = 256,
  /// Coordinates that 32 lanes share, four each. Half of the lanes share a row of 64, the others have another row.
  kLongestStripe = 128,
};

constexpr TqU32 norm_blocks(TqU32 head_dim) {
  return head_dim > kNormDim ? head_dim / kNormDim : 1;
}

constexpr TqU32 stripe_dim(TqU32 head_dim) {
  return head_dim < kLongestStripe ? head_dim : kLongestStripe;
}
constexpr TqU32 stripes(TqU32 head_dim) {
  return head_dim / stripe_dim(head_dim);
}
constexpr TqU32 stripes_per_norm(TqU32 head_dim) {
  return stripes(head_dim) / norm_blocks(head_dim);
}
/// Lanes that share a stripe.
constexpr TqU32 stripe_lanes(TqU32 head_dim) {
  return stripe_dim(head_dim) / 4;
}

}  // namespace tq_hb
