// Which keys each query of a call sees. Read by host and device code; static for the reason in codec_constants.h.
#pragma once

#include "core/abi.h"

namespace tq_hb {

/// Keys by age: 0 is the oldest slot that holds a token. `end` is not seen.
struct QueryRange {
  TqU32 begin;
  TqU32 end;
};

/// What a query at `position` sees: the keys up to and including its own, of those only the newest `window` if that
/// is not 0. A query may stand beyond the keys, and then sees fewer of them or none.
static constexpr QueryRange query_range(TqU32 position, TqU32 kv_seq_len, TqU32 window) {
  const TqU32 end = position < kv_seq_len ? position + 1 : kv_seq_len;
  const TqU32 begin = window != 0 && position >= window ? position - window + 1 : 0;
  return QueryRange{begin < end ? begin : end, end};
}

}  // namespace tq_hb
