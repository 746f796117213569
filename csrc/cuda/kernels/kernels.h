// The kernels' launches, for the encoder. Every argument has been checked; results of launches are the caller's to ask.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "core/abi.h"

namespace tq_hb {

struct Launch {
  dim3 grid, block;
  unsigned shared_bytes = 0;
};

/// One tensor of a cache and the rows that go into it.
struct QuantizeTensor {
  const float* src;
  std::uint8_t* packed;
  float* norms;
  std::uint32_t* status;  ///< lowered to the first row that could not be encoded
  unsigned cbits;
  unsigned high_bits;  ///< width of the high plane, 0 where every code has a byte
};

struct QuantizeCall {
  TqHadamardQuantizeArgs args;
  TqU32 first_token;  ///< those before it fall out of the ring again
  TqU32 tokens;
  TqU32 num_tensors;
  QuantizeTensor tensors[2];
};

Launch quantize_launch(const QuantizeCall& call);
void launch(const QuantizeCall& call, cudaStream_t stream);

struct DequantizeCall {
  TqHadamardQuantizeArgs args;
  TqU32 first_slot;
  TqU32 tokens;
  const std::uint8_t* packed;
  const float* norms;
  float* output;
  unsigned cbits;
  unsigned high_bits;
};

Launch dequantize_launch(const DequantizeCall& call);
void launch(const DequantizeCall& call, cudaStream_t stream);

enum class Transform { kRotate, kUnrotate, kPlain };

struct TransformCall {
  Transform transform;
  TqU32 head_dim;
  TqU32 rows;
  float* data;
};

Launch transform_launch(const TransformCall& call);
void launch(const TransformCall& call, cudaStream_t stream);

/// K or V of all heads.
struct CacheSide {
  const std::uint8_t* packed;
  const float* norms;
  unsigned cbits;
  unsigned high_bits;
};

/// An attention op: a kernel that leaves the output of every split, normalised over its keys, and one that merges them.
struct AttendCall {
  TqFlashAttnVecArgs args;
  const float* q;
  CacheSide k, v;
  const float* score_bias;  ///< or null
  const float* sinks;       ///< or null
  float* partials;
  float* output;
  float* lse;  ///< or null
  std::uint32_t* status;
  bool unrotate;
  bool is_group;    ///< whether the group kernel attends
  TqU32 head_tile;  ///< rows that the group kernel takes together, at most TQ_GQA_MAX_TILE
};

Launch attend_launch(const AttendCall& call);
void launch_attend(const AttendCall& call, cudaStream_t stream);
/// The same by the group kernel: head sizes from 128 on, codes at multiples of 16 bytes.
Launch attend_group_launch(const AttendCall& call);
void launch_attend_group(const AttendCall& call, cudaStream_t stream);
/// Shared memory that a block of it may take, whatever the shape.
constexpr unsigned kGroupSharedBytes = 224 << 10;

Launch merge_launch(const AttendCall& call);
void launch_merge(const AttendCall& call, cudaStream_t stream);

}  // namespace tq_hb
