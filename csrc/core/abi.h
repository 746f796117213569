// Kernel argument structs, shared byte for byte by host and device code.
//
// Compiled as C++, CUDA and MSL: plain 32-bit fields only. The order of the existing fields is fixed;
// new ones are appended.
#pragma once

#if defined(__METAL_VERSION__)
typedef uint TqU32;
#else
#include <cstdint>
typedef std::uint32_t TqU32;
#endif
typedef float TqF32;

// FIELD(type, name, default, doc) is set by the caller, REQUIRED(type, name, doc) has no default, and
// PLANNED(type, name) is filled in per call: by the dispatch policy or from the call's other arguments.
#define TQ_FLASH_ATTN_VEC_FIELDS(FIELD, REQUIRED, PLANNED)                                         \
  REQUIRED(TqU32, num_heads, "Query heads; a multiple of num_kv_heads.")                           \
  REQUIRED(TqU32, num_kv_heads, "Heads of K and V.")                                               \
  REQUIRED(TqU32, head_dim, "Values per head.")                                                    \
  REQUIRED(TqU32, kv_seq_len, "Slots that hold tokens: 0 ... kv_seq_len - 1.")                     \
  REQUIRED(TqU32, kv_capacity, "Slots per head.")                                                  \
  REQUIRED(TqF32, scale, "Multiplies the scores; any finite number.")                              \
  FIELD(TqU32, mask_type, 0, "2 applies sliding_window; 0 and 1 do not.")                          \
  FIELD(TqU32, sliding_window, 0, "Newest tokens that are seen when mask_type is 2.")              \
  FIELD(TqF32, softcap, 0.0f, "If positive, scores become softcap * tanh(score / softcap).")       \
  PLANNED(TqU32, nwg)                                                                              \
  FIELD(TqU32, ring_start, 0, "Slot of the oldest token; not 0 only when the ring is full.")       \
  FIELD(TqF32, scale_factor_d512, 1.0f, "The factor that head_dim 512 was encoded with.")          \
  FIELD(TqU32, codebook_bits, 8, "Width of K's codes, and of V's unless the call says otherwise.") \
  FIELD(TqU32, fuse_fwht_pre, 0, "1 if q is not rotated yet.")                                     \
  FIELD(TqU32, nsg, 1, "SIMD groups per threadgroup: 1, 2 or 4.")                                  \
  PLANNED(TqU32, codebook)                                                                         \
  PLANNED(TqU32, num_queries)                                                                      \
  PLANNED(TqU32, query_position)                                                                   \
  PLANNED(TqU32, flags)

#define TQ_HADAMARD_QUANTIZE_FIELDS(FIELD, REQUIRED, PLANNED)                                \
  REQUIRED(TqU32, head_dim, "Values per head.")                                              \
  REQUIRED(TqU32, num_kv_heads, "Heads of the cache.")                                       \
  REQUIRED(TqU32, write_pos, "Position of the first token written.")                         \
  REQUIRED(TqU32, cache_capacity, "Slots per head.")                                         \
  FIELD(TqU32, is_sliding, 0, "1 if the cache is a ring: slots are positions mod capacity.") \
  FIELD(TqF32, scale_factor_d512, 1.0f, "Multiplies head_dim 512 before it is quantised.")   \
  FIELD(TqU32, codebook_bits, 8, "Width of the codes: 5, 6 or 8.")                           \
  PLANNED(TqU32, codebook)

#define TQ_DECLARE_FIELD(type, name, value, doc) type name;
#define TQ_DECLARE_REQUIRED(type, name, doc) type name;
#define TQ_DECLARE_PLANNED(type, name) type name;

struct TqFlashAttnVecArgs {
  TQ_FLASH_ATTN_VEC_FIELDS(TQ_DECLARE_FIELD, TQ_DECLARE_REQUIRED, TQ_DECLARE_PLANNED)
};

struct TqHadamardQuantizeArgs {
  TQ_HADAMARD_QUANTIZE_FIELDS(TQ_DECLARE_FIELD, TQ_DECLARE_REQUIRED, TQ_DECLARE_PLANNED)
};

#undef TQ_DECLARE_FIELD
#undef TQ_DECLARE_REQUIRED
#undef TQ_DECLARE_PLANNED

// Values of the `codebook` fields.
#define TQ_CODEBOOK_LLOYD_MAX 0
#define TQ_CODEBOOK_MLX_NATIVE 1

// Bits of `flags`: which of the optional buffers an attention call has.
#define TQ_HAS_SINKS 1u
#define TQ_HAS_SCORE_BIAS 2u
#define TQ_HAS_LSE 4u

// Function constants: the widths of K's codes (of the only tensor's, where there is one) and of V's.
#define TQ_CONSTANT_K_CBITS 50
#define TQ_CONSTANT_V_CBITS 52
// Whether the attention kernel, being the only split, divides and writes the output itself.
#define TQ_CONSTANT_DIRECT 53
// Whether codes of 5 and 6 bits lie in planes.
#define TQ_CONSTANT_PLANE 54

// Buffer slots of each kind of kernel. A status slot is one uint per tensor that is checked: the first
// row that could not be used, or TQ_STATUS_OK.
#define TQ_STATUS_OK 0xFFFFFFFFu

#define TQ_ATTEND_ARGS 0  // TqFlashAttnVecArgs
#define TQ_ATTEND_Q 1
#define TQ_ATTEND_K_PACKED 2
#define TQ_ATTEND_K_NORMS 3
#define TQ_ATTEND_V_PACKED 4
#define TQ_ATTEND_V_NORMS 5
#define TQ_ATTEND_DST 6  // partial states, or the output where there is one split
#define TQ_ATTEND_STATUS 7

#define TQ_REDUCE_NUM_HEADS 0
#define TQ_REDUCE_TMP 1
#define TQ_REDUCE_OUTPUT 2
#define TQ_REDUCE_SPLITS 3
#define TQ_REDUCE_STATUS 4

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

// Limits of the group kernel: query heads that share one decode of a row, and splits of the keys.
#define TQ_GQA_MAX_TILE 8
#define TQ_GQA_MAX_SPLITS 256
// Keys per block, in every attention kernel.
#define TQ_BLOCK 32
