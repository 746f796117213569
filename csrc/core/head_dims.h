// The one list of head sizes that every op accepts: instantiations, validation and tests are all made from it.
#pragma once

#define TQ_HB_FOR_EACH_HEAD_DIM(X) \
  X(64)                            \
  X(128)                           \
  X(256)                           \
  X(512)
