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

// FIELD(type, name, default) is set by the caller, REQUIRED(type, name) has no default, and
// PLANNED(type, name) is filled in per call by the dispatch policy.
#define TQ_FLASH_ATTN_VEC_FIELDS(FIELD, REQUIRED, PLANNED) \
  REQUIRED(TqU32, num_heads)                               \
  REQUIRED(TqU32, num_kv_heads)                            \
  REQUIRED(TqU32, head_dim)                                \
  REQUIRED(TqU32, kv_seq_len)                              \
  REQUIRED(TqU32, kv_capacity)                             \
  REQUIRED(TqF32, scale)                                   \
  FIELD(TqU32, mask_type, 0)                               \
  FIELD(TqU32, sliding_window, 0)                          \
  FIELD(TqF32, softcap, 0.0f)                              \
  PLANNED(TqU32, nwg)                                      \
  FIELD(TqU32, ring_start, 0)                              \
  FIELD(TqF32, scale_factor_d512, 1.0f)                    \
  FIELD(TqU32, codebook_bits, 8)                           \
  FIELD(TqU32, fuse_fwht_pre, 0)                           \
  FIELD(TqU32, nsg, 1)

#define TQ_HADAMARD_QUANTIZE_FIELDS(FIELD, REQUIRED) \
  REQUIRED(TqU32, head_dim)                          \
  REQUIRED(TqU32, num_kv_heads)                      \
  REQUIRED(TqU32, write_pos)                         \
  REQUIRED(TqU32, cache_capacity)                    \
  FIELD(TqU32, is_sliding, 0)                        \
  FIELD(TqF32, scale_factor_d512, 1.0f)              \
  FIELD(TqU32, codebook_bits, 8)

#define TQ_DECLARE_WITH_DEFAULT(type, name, value) type name;
#define TQ_DECLARE(type, name) type name;

struct TqFlashAttnVecArgs {
  TQ_FLASH_ATTN_VEC_FIELDS(TQ_DECLARE_WITH_DEFAULT, TQ_DECLARE, TQ_DECLARE)
};

struct TqHadamardQuantizeArgs {
  TQ_HADAMARD_QUANTIZE_FIELDS(TQ_DECLARE_WITH_DEFAULT, TQ_DECLARE)
};

#undef TQ_DECLARE_WITH_DEFAULT
#undef TQ_DECLARE
