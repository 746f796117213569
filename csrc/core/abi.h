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

// In place of the number of the first row that could not be used: all could.
#define TQ_STATUS_OK 0xFFFFFFFFu

// Limits of the group kernel: query heads that share one decode of a row, and splits of the keys.
#define TQ_GQA_MAX_TILE 8
#define TQ_GQA_MAX_SPLITS 256
// Keys per block, in every attention kernel.
#define TQ_BLOCK 32
