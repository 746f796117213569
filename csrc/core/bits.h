// The one list of index widths ("cbits"): instantiations, validation and tests are all made from it.
#pragma once

#define TQ_HB_FOR_EACH_CBITS(X) \
  X(5)                          \
  X(6)                          \
  X(8)
