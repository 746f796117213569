// One token's attention by ggml's CPU backend, for bench/peers/llama_cpp.py: a graph of one ggml_flash_attn_ext per
// buffer of keys and values, planned once and computed per call.
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "ggml-cpu.h"
#include "ggml.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Attention {
  ggml_context* context = nullptr;
  ggml_cgraph* graph = nullptr;
  ggml_cplan plan = {};
  std::vector<std::uint8_t> work;

  ~Attention() { ggml_free(context); }
};

}  // namespace

EXPORT const char* tq_ggml_version() {
  return ggml_version();
}

// The ggml_type of that name, or -1.
EXPORT int tq_ggml_type(const char* name) {
  for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
    const char* candidate = ggml_type_name(static_cast<ggml_type>(type));
    if (candidate != nullptr && std::string_view(candidate) == name) return type;
  }
  return -1;
}

// Bytes of a row of that many values.
EXPORT std::size_t tq_ggml_row_bytes(int type, std::int64_t values) {
  return ggml_row_size(static_cast<ggml_type>(type), values);
}

// Converts rows as llama.cpp converts what it stores in a cache.
EXPORT void tq_ggml_convert(int type, const float* source, std::uint8_t* target, std::int64_t rows,
                            std::int64_t values) {
  ggml_cpu_init();
  const ggml_from_float_t convert = ggml_get_type_traits_cpu(static_cast<ggml_type>(type))->from_float;
  for (std::int64_t row = 0; row < rows; ++row) {
    convert(source + row * values, target + row * tq_ggml_row_bytes(type, values), values);
  }
}

// A pool of as many threads, the caller's among them; paused until resumed.
EXPORT ggml_threadpool* tq_ggml_threads_new(int threads) {
  ggml_cpu_init();
  ggml_threadpool_params params = ggml_threadpool_params_default(threads);
  params.paused = true;
  return ggml_threadpool_new(&params);
}

EXPORT void tq_ggml_threads_resume(ggml_threadpool* pool) {
  ggml_threadpool_resume(pool);
}
EXPORT void tq_ggml_threads_pause(ggml_threadpool* pool) {
  ggml_threadpool_pause(pool);
}

// q and out are (heads, head_dim) floats; k and v are (kv_heads, tokens, head_dim) in `type`. All must outlive the
// result.
EXPORT Attention* tq_ggml_attention_new(int type, float* q, void* k, void* v, float* out, std::int64_t heads,
                                        std::int64_t kv_heads, std::int64_t head_dim, std::int64_t tokens, float scale,
                                        int threads, ggml_threadpool* pool) {
  auto attention = std::make_unique<Attention>();
  ggml_init_params params = {ggml_tensor_overhead() * 8 + ggml_graph_overhead(), nullptr, /*no_alloc=*/true};
  ggml_context* context = attention->context = ggml_init(params);
  ggml_tensor* query = ggml_new_tensor_3d(context, GGML_TYPE_F32, head_dim, 1, heads);
  ggml_tensor* keys = ggml_new_tensor_3d(context, static_cast<ggml_type>(type), head_dim, tokens, kv_heads);
  ggml_tensor* values = ggml_new_tensor_3d(context, static_cast<ggml_type>(type), head_dim, tokens, kv_heads);
  ggml_tensor* result = ggml_flash_attn_ext(context, query, keys, values, /*mask=*/nullptr, scale, 0.0F, 0.0F);
  query->data = q;
  keys->data = k;
  values->data = v;
  result->data = out;
  attention->graph = ggml_new_graph(context);
  ggml_build_forward_expand(attention->graph, result);
  attention->plan = ggml_graph_plan(attention->graph, threads, pool);
  attention->work.resize(attention->plan.work_size);
  attention->plan.work_data = attention->work.data();
  return attention.release();
}

// 0, or ggml's status.
EXPORT int tq_ggml_attention_compute(Attention* attention) {
  return ggml_graph_compute(attention->graph, &attention->plan);
}

EXPORT void tq_ggml_attention_free(Attention* attention) {
  delete attention;
}
