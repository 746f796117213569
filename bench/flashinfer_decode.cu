// FlashInfer's decode attention for one sequence, called through the headers that its package brings.
//
// Two kernels serve it: one for a query token, and the one for prefills, which packs the heads of a group as rows for
// tensor cores. Keys and values are float16 or float8 (e4m3), heads first; queries and outputs are float16.

#include <cstdio>
#include <exception>

#include <flashinfer/attention/decode.cuh>
#include <flashinfer/attention/default_decode_params.cuh>
#include <flashinfer/attention/default_prefill_params.cuh>
#include <flashinfer/attention/prefill.cuh>
#include <flashinfer/attention/variants.cuh>

namespace {

using Plain = flashinfer::DefaultAttention<false, false, false, false>;

struct Call {
  void *q, *k, *v, *output, *tmp;
  unsigned heads, kv_heads, keys;
  float scale;
  cudaStream_t stream;
};

template <class Key, unsigned kHeadDim>
cudaError_t decode(const Call& call) {
  using Params = flashinfer::SingleDecodeParams<half, Key, half>;
  Params params(static_cast<half*>(call.q), static_cast<Key*>(call.k), static_cast<Key*>(call.v),
                static_cast<half*>(call.output), nullptr, call.keys, call.heads, call.kv_heads,
                flashinfer::QKVLayout::kHND, kHeadDim, -1, 0.0f, call.scale, 1.0f, 1e4f);
  return flashinfer::SingleDecodeWithKVCacheDispatched<kHeadDim, flashinfer::PosEncodingMode::kNone, Plain, Params>(
      params, static_cast<half*>(call.tmp), call.stream);
}

template <class Key, unsigned kHeadDim>
cudaError_t prefill(const Call& call) {
  using Params = flashinfer::SinglePrefillParams<half, Key, half>;
  Params params(static_cast<half*>(call.q), static_cast<Key*>(call.k), static_cast<Key*>(call.v), nullptr,
                static_cast<half*>(call.output), nullptr, nullptr, call.heads, call.kv_heads, 1, call.keys,
                call.heads * kHeadDim, kHeadDim, kHeadDim, call.keys * kHeadDim, kHeadDim, -1, 0.0f, call.scale, 1.0f,
                1e4f);
  return flashinfer::SinglePrefillWithKVCacheDispatched<kHeadDim, kHeadDim, flashinfer::PosEncodingMode::kNone, false,
                                                        flashinfer::MaskMode::kNone, Plain, Params>(
      params, static_cast<half*>(call.tmp), call.stream);
}

template <unsigned kHeadDim>
cudaError_t attend(bool is_float8, bool on_tensor_cores, const Call& call) {
  if (is_float8) {
    return on_tensor_cores ? prefill<__nv_fp8_e4m3, kHeadDim>(call) : decode<__nv_fp8_e4m3, kHeadDim>(call);
  }
  return on_tensor_cores ? prefill<half, kHeadDim>(call) : decode<half, kHeadDim>(call);
}

}  // namespace

/// Launches a call; 0, or what kept it from being launched.
extern "C" int flashinfer_attend(int is_float8, int on_tensor_cores, unsigned head_dim, void* q, void* k, void* v,
                                 void* output, void* tmp, unsigned heads, unsigned kv_heads, unsigned keys, float scale,
                                 void* stream) {
  const Call call{q, k, v, output, tmp, heads, kv_heads, keys, scale, static_cast<cudaStream_t>(stream)};
  try {
    if (head_dim == 128) return attend<128>(is_float8 != 0, on_tensor_cores != 0, call);
    if (head_dim == 256) return attend<256>(is_float8 != 0, on_tensor_cores != 0, call);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "flashinfer: %s\n", error.what());
  }
  return cudaErrorNotSupported;
}
