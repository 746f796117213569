// Where in the cache a token lives.
#pragma once

#include "core/abi.h"

/// Slot of token `token` of a run that starts at position `write_pos`.
inline ulong encode_slot(constant TqHadamardQuantizeArgs& args, uint token) {
  const ulong position = ulong(args.write_pos) + token;
  return args.is_sliding == 1 ? position % args.cache_capacity : position;
}
