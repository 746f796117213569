// Buffer slots of the attention kernels besides those of core/abi.h. Read by host and device code.
//
// Sinks, bias and log-sum-exp are read or written only where the args' `flags` say that they are there.
#pragma once

#define TQ_ATTEND_SCORE_BIAS 8

#define TQ_REDUCE_ARGS 5  // TqFlashAttnVecArgs
#define TQ_REDUCE_SINKS 6
#define TQ_REDUCE_LSE 7
#define TQ_REDUCE_SCORE_BIAS 8
