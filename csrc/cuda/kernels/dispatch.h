// From a call's numbers to a kernel's template arguments.
#pragma once

#include <type_traits>

#include "core/head_dims.h"

namespace tq_hb {

template <unsigned kValue>
using Constant = std::integral_constant<unsigned, kValue>;

/// Calls visit(Constant<head_dim>).
template <class Visit>
void with_head_dim(unsigned head_dim, const Visit& visit) {
#define TQ_VISIT(size) \
  if (head_dim == size) return visit(Constant<size>{});
  TQ_HB_FOR_EACH_HEAD_DIM(TQ_VISIT)
#undef TQ_VISIT
}

/// Calls visit(Constant<high_bits>): 0 where every code has a byte, else the width of the high plane.
template <class Visit>
void with_high_bits(unsigned high_bits, const Visit& visit) {
  switch (high_bits) {
    case 1:
      return visit(Constant<1>{});
    case 2:
      return visit(Constant<2>{});
    default:
      return visit(Constant<0>{});
  }
}

}  // namespace tq_hb
