// Buffer slots of each kind of kernel. Read by host and device code.
//
// A status slot is one uint per tensor that is checked: the first row that could not be used, or TQ_STATUS_OK. Sinks,
// bias and log-sum-exp are read or written only where the args' `flags` say that they are there.
#pragma once

#include "core/abi.h"

#define TQ_ATTEND_ARGS 0  // TqFlashAttnVecArgs
#define TQ_ATTEND_Q 1
#define TQ_ATTEND_K_PACKED 2
#define TQ_ATTEND_K_NORMS 3
#define TQ_ATTEND_V_PACKED 4
#define TQ_ATTEND_V_NORMS 5
#define TQ_ATTEND_DST 6  // partial states, or the output where there is one split
#define TQ_ATTEND_STATUS 7
#define TQ_ATTEND_SCORE_BIAS 8

#define TQ_REDUCE_ARGS 0  // TqFlashAttnVecArgs
#define TQ_REDUCE_TMP 1
#define TQ_REDUCE_OUTPUT 2
#define TQ_REDUCE_SINKS 3
#define TQ_REDUCE_SCORE_BIAS 4
#define TQ_REDUCE_LSE 5
#define TQ_REDUCE_STATUS 6
#define TQ_REDUCE_Q 7

#define TQ_QUANTIZE_SRC 0
#define TQ_QUANTIZE_PACKED 1
#define TQ_QUANTIZE_NORMS 2
#define TQ_QUANTIZE_ARGS 3  // TqHadamardQuantizeArgs
#define TQ_QUANTIZE_STATUS 4

#define TQ_QUANTIZE_DUAL_SRC_K 0
#define TQ_QUANTIZE_DUAL_SRC_V 1
#define TQ_QUANTIZE_DUAL_K_PACKED 2
#define TQ_QUANTIZE_DUAL_V_PACKED 3
#define TQ_QUANTIZE_DUAL_K_NORMS 4
#define TQ_QUANTIZE_DUAL_V_NORMS 5
#define TQ_QUANTIZE_DUAL_ARGS 6
#define TQ_QUANTIZE_DUAL_STATUS 7  // two words: K's, V's

#define TQ_DEQUANTIZE_PACKED 0
#define TQ_DEQUANTIZE_NORMS 1
#define TQ_DEQUANTIZE_OUTPUT 2
#define TQ_DEQUANTIZE_ARGS 3  // write_pos is the first position read

#define TQ_FWHT_DATA 0
#define TQ_FWHT_ARGS 1

struct TqFwhtArgs {
  TqU32 head_dim;
  TqU32 num_rows;
};
