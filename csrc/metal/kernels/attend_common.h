// What the attention kernels share: which keys are visible, queries, scores, table lookups.
#pragma once

#include "core/abi.h"
#include "core/codec_constants.h"
#include "core/query_range.h"
#include "metal/kernels/attend_layout.h"
#include "metal/kernels/packing.h"
#include "metal/kernels/rotation.h"
#include "metal/kernels/tables.h"

/// Below every score, so that an empty maximum loses; finite, so that it can be subtracted from itself.
constant float kNoScore = -3.40282347e38f;
/// In units of its exponent a query's values are below 4, or as long once rotated. It is staged 2^kQueryHeadroom times
/// smaller: its product with 512 levels, which are below 6, and any norm is then below 3/4 of what float32 has.
constant int kQueryHeadroom = 14;
/// Multiplies values until they are divided by the sum of their weights, so that no sum of them overflows.
constant float kValueHeadroom = 5.96046448e-8f;  // 2^-24

/// A run of keys, oldest first: `count` slots from `first_slot` on, wrapping at the capacity.
struct VisibleKeys {
  uint count;
  uint first_slot;
  uint capacity;

  uint slot(uint age) const { return age < capacity - first_slot ? first_slot + age : age - (capacity - first_slot); }
};

/// The keys of ages begin ... end - 1.
inline VisibleKeys visible_keys(constant TqFlashAttnVecArgs& args, uint begin, uint end) {
  VisibleKeys keys;
  keys.count = end - begin;
  keys.capacity = args.kv_capacity;
  keys.first_slot = args.ring_start;
  keys.first_slot = keys.slot(begin);
  return keys;
}

/// What a threadgroup knows about a row of q, which is one head of one query.
struct QueryRow {
  float exponent;  // of its largest value; NaN if the row cannot be used
  float bias;      // added to its scores before softcap
  uint begin;      // it sees the keys of ages begin ... end - 1
  uint end;
};

inline ulong num_rows(constant TqFlashAttnVecArgs& args) {
  return ulong(args.num_queries) * args.num_heads;
}

/// What turns a dot product of codes into a score, and a score into a weight.
///
/// A row's scores are in units of 2^exponent, since scale, query and norm together go beyond float's range. Softcap
/// brings them back into it.
struct ScoreScale {
  float mantissa;
  int exponent;
  float bias;
  float softcap;

  // Fused into the subtraction that follows, the product would differ from the maximum that it is itself.
  float apply(float dot) const {
#pragma clang fp contract(off)
    const float score = dot * mantissa;
    return softcap > 0.0f ? softcap * precise::tanh((ldexp(score, exponent) + bias) / softcap) : score;
  }
  float to_float(float score) const { return softcap > 0.0f ? score : ldexp(score, exponent); }
  float weight(float score, float maximum) const {
#pragma clang fp contract(off)
    return exp(to_float(score - maximum));
  }
};

inline ScoreScale score_scale(constant TqFlashAttnVecArgs& args, float query_exponent, float bias) {
  ScoreScale scale;
  int exponent;
  scale.mantissa = frexp(args.scale, exponent);
  scale.exponent = exponent + int(query_exponent) + kQueryHeadroom;
  scale.bias = bias;
  scale.softcap = args.softcap;
  return scale;
}

/// The constant part of the factor between a code's level and the value: the rest is the row's norm.
template <int D>
inline float row_scale(constant TqFlashAttnVecArgs& args) {
  return tq_hb::norm_blocks(D) == 2 ? precise::divide(1.0f, args.scale_factor_d512) : tq_hb::inverse_sqrt_head_dim(D);
}

/// The exponent of the SIMD group's largest value, which is then below 2 in the unit 2^exponent, or below 4 where
/// float32 ends.
template <int E>
inline int common_exponent(thread const float (&y)[E]) {
  float largest = 0.0f;
  for (int i = 0; i < E; ++i) largest = max(largest, fabs(y[i]));
  largest = simd_max(largest);
  // Clamped so that the factors 2^exponent and 2^-exponent are normal numbers.
  return clamp(int(as_type<uint>(largest) >> 23) - 127, -126, 126);
}

template <int E>
inline void divide_by_power_of_two(thread float (&y)[E], int exponent) {
  const float factor = as_type<float>(uint(127 - exponent) << 23);
  for (int i = 0; i < E; ++i) y[i] *= factor;
}

inline float load_bias(constant TqFlashAttnVecArgs& args, device const float* score_bias, ulong row) {
  return (args.flags & TQ_HAS_SCORE_BIAS) != 0 ? score_bias[row] : 0.0f;
}

/// The part of a row's bias that its scores leave out. Without softcap that is all of it: it moves every score of the
/// row alike, which only a sink and the log-sum-exp see, and a large one would cost the scores their low bits.
inline float bias_after_softmax(constant TqFlashAttnVecArgs& args, device const float* score_bias, ulong row) {
  return args.softcap > 0.0f ? 0.0f : load_bias(args, score_bias, row);
}

/// Loads a row of q and returns its exponent, or NaN if a value or the row's bias is not finite.
template <int D>
inline float load_query(constant TqFlashAttnVecArgs& args, device const float* q, device const float* score_bias,
                        ulong row, ushort lane, thread float (&y)[D / 32]) {
  constexpr int E = D / 32;
  load_row<E>(q + row * D, lane, y);
  bool is_finite = isfinite(load_bias(args, score_bias, row));
  for (int i = 0; i < E; ++i) is_finite = is_finite && isfinite(y[i]);
  return simd_all(is_finite) ? float(common_exponent<E>(y)) : NAN;
}

/// Puts a row of q into threadgroup memory, and what there is to know about it; zeros for a row that cannot be used.
template <int D>
inline void stage_query(constant TqFlashAttnVecArgs& args, device const float* q, device const float* score_bias,
                        uint query, uint head, threadgroup float* staged, threadgroup QueryRow* about, ushort lane) {
  constexpr int E = D / 32;
  const ulong row = ulong(query) * args.num_heads + head;
  float y[E];
  const float exponent = load_query<D>(args, q, score_bias, row, lane, y);
  const bool is_usable = !isnan(exponent);
  if (is_usable) {
    divide_by_power_of_two<E>(y, int(exponent));
    if (args.fuse_fwht_pre != 0) rotate_row<E>(y, lane);
  }
  for (int i = 0; i < E; ++i) staged[lane * E + i] = is_usable ? ldexp(y[i], -kQueryHeadroom) : 0.0f;
  if (lane > 0) return;
  const uint position = args.query_position - (args.num_queries - 1 - query);
  const uint window = args.mask_type == 2 ? args.sliding_window : 0;
  const tq_hb::QueryRange range = tq_hb::query_range(position, args.kv_seq_len, window);
  about->exponent = exponent;
  about->bias = load_bias(args, score_bias, row) - bias_after_softmax(args, score_bias, row);
  about->begin = range.begin;
  about->end = range.end;
}

/// Puts `copies` copies of a codebook into threadgroup memory, those of one level side by side.
inline void fill_table(threadgroup float* table, constant float* levels, uint cbits, uint copies, uint thread_index,
                       uint threads) {
  for (uint i = thread_index; i < (copies << cbits); i += threads) table[i] = levels[i / copies];
}

/// Looks up codes in the copy that belongs to a lane.
struct LevelTable {
  threadgroup const float* levels;
  uint copies;
  uint mask;

  float4 decode(CodePairs codes) const {
    return float4(levels[(codes.lower & mask) * copies], levels[((codes.lower >> 8) & mask) * copies],
                  levels[(codes.upper & mask) * copies], levels[((codes.upper >> 8) & mask) * copies]);
  }
};

inline LevelTable level_table(threadgroup const float* table, uint cbits, uint copies, ushort lane) {
  LevelTable view;
  view.levels = table + lane % copies;
  view.copies = copies;
  view.mask = (1u << cbits) - 1;
  return view;
}

/// Sums N values over every kLanes lanes at once: lane t gets the sum of value t % N.
///
/// Each step halves the values a lane has and doubles the lanes each stands for: N - 1 shuffles and one for
/// each doubling of kLanes / N, instead of N log2(kLanes).
template <int N, int kLanes>
inline float simd_sum_scatter(thread float (&values)[N], ushort lane) {
  for (ushort half_count = N / 2; half_count > 0; half_count /= 2) {
    const bool upper = (lane & half_count) != 0;
    for (ushort i = 0; i < half_count; ++i) {
      const float kept = upper ? values[i + half_count] : values[i];
      const float sent = upper ? values[i] : values[i + half_count];
      values[i] = kept + simd_shuffle_xor(sent, half_count);
    }
  }
  float sum = values[0];
  for (ushort mask = N; mask < kLanes; mask *= 2) sum += simd_shuffle_xor(sum, mask);
  return sum;
}

/// Sums over the rows that the SIMD group has at a time, where a row has but some of its lanes.
template <int D>
inline float4 sum_over_rows(float4 value) {
  for (ushort mask = tq_hb::stripe_lanes(D); mask < 32; mask *= 2) value += simd_shuffle_xor(value, mask);
  return value;
}

/// How the keys of a row and its sink share the weight.
struct RowTotal {
  float keys;  // what sums of values are multiplied by, weighted relative to the keys' maximum
  float lse;   // the logarithm of the sum of exp(score), the sink included
};

/// From the maximum of the keys' scores and the sum of their weights relative to it.
///
/// Whichever is larger, the keys' maximum or the sink, is what the other is relative to: a large bias costs nothing.
inline RowTotal row_total(constant TqFlashAttnVecArgs& args, device const float* sinks, device const float* score_bias,
                          ScoreScale scale, uint row, float maximum, float sum) {
  float sink = -INFINITY;
  if ((args.flags & TQ_HAS_SINKS) != 0) sink = sinks[row % args.num_heads];
  const float bias = bias_after_softmax(args, score_bias, row);
  // In quarters nothing but the keys' maximum itself can be infinite.
  const float keys = sum == 0.0f ? -INFINITY : scale.to_float(0.25f * maximum);
  const float lead = sink == -INFINITY ? sink : 4.0f * (0.25f * sink - 0.25f * bias - keys);
  const float share = lead > 0.0f ? exp(-lead) : 1.0f;
  const float total = sum * share + (lead > 0.0f ? 1.0f : exp(lead));
  RowTotal result;
  result.keys = total == 0.0f ? 0.0f : share / (total * kValueHeadroom);
  result.lse = total == 0.0f ? -INFINITY : (lead > 0.0f ? sink : 4.0f * (keys + 0.25f * bias)) + log(total);
  return result;
}
