// Every construct that the simulator knows, as kernels that leave what they computed in `out`.
#include <metal_stdlib>
using namespace metal;

constant float kTable[4] = {1.0f, 0.5f, 0.25f, 0.125f};
constant int kWidth [[function_constant(0)]];
constant bool kFlag [[function_constant(1)]];
constant half kScale [[function_constant(2)]];
constant int kFallback = is_function_constant_defined(kWidth) ? kWidth : 8;
constant int kDoubled = kFallback * 2;

struct Arguments {
  uint count;
  float scale;
};

kernel void constructors(device float* out [[buffer(0)]]) {
  using Four = vec<float, 4>;
  typedef vec<half, 2> Pair;
  const float4 a = float4(1.0f, float2(2.0f, 3.0f), 4.0f);
  const Four b = Four(a.wzyx);
  const float3 c = metal::float3(7.0f);
  const Pair d = Pair(1.5h, 2.5h);
  const int4 e = int4(a * 1.5f);
  const float2 f = float2(d);
  const uchar4 g = as_type<uchar4>(0x04030201u);
  float4 h = float4(0.0f);
  h.xz = a.yw;
  out[0] = b.x + 10.0f * b.w;
  out[1] = c.x + c.y + c.z;
  out[2] = float(e.x) + 10.0f * float(e.w);
  out[3] = f.x + f.y;
  out[4] = float(g.w);
  out[5] = h.x + 10.0f * h.z + h.y;
  out[6] = dot(a, b);
  out[7] = all(a == a) && !any(a != a) ? 1.0f : 0.0f;
}

kernel void literals(device float* out [[buffer(0)]]) {
  const float third = 1.0 / 3.0;
  out[0] = third * 3.0 - 1.0;
  const half big = 2048.0h;
  out[1] = float((big + 1.0h) - 2048.0h);
  out[2] = float(half(65504.0f) * 2.0h);
  out[3] = INFINITY;
  out[4] = float(sizeof(float3)) + float(sizeof(half4)) + float(sizeof(bool));
}

kernel void mathematics(device float* out [[buffer(0)]]) {
  out[0] = precise::exp(1.0f);
  out[1] = fast::exp2(3.0f);
  out[2] = rsqrt(16.0f);
  out[3] = clamp(5.0f, -1.0f, 1.0f);
  out[4] = select(1.0f, 2.0f, true);
  out[5] = fma(2.0f, 3.0f, 4.0f);
  out[6] = ldexp(0.75f, 3);
  int exponent;
  out[7] = frexp(6.0f, exponent) + float(exponent);
  out[8] = isfinite(out[3]) && !isnan(1.0f) && isinf(INFINITY) ? 1.0f : 0.0f;
  out[9] = precise::divide(1.0f, 3.0f);
  out[10] = float(popcount(0xf0f0u)) + float(clz(1u)) + float(ctz(8u));
  out[11] = float(extract_bits(0xabcdu, 4u, 8u)) + float(extract_bits(-1, 3u, 4u));
  out[12] = float(insert_bits(0u, 5u, 4u, 3u));
  out[13] = float(max(ushort(3), ushort(4)) + min(1u, 2u));
  out[14] = mix(1.0f, 3.0f, 0.25f) + fract(1.75f) + sign(-3.0f);
  out[15] = length(float3(2.0f, 3.0f, 6.0f));
}

// The other argument wins over NaN, wherever it stands and however wide the values are.
kernel void not_a_number(device float* out [[buffer(0)]], ushort lane [[thread_index_in_simdgroup]]) {
  const float nan = NAN;
  const float largest = simd_max(lane == 5 ? float(lane) : nan);
  const float smallest = simd_min(lane == 5 ? float(lane) : nan);
  if (lane > 0) return;
  out[0] = max(nan, 1.0f) + max(1.0f, nan);
  out[1] = min(nan, 1.0f) + min(1.0f, nan);
  out[2] = clamp(nan, -1.0f, 1.0f);
  out[3] = float(max(half(nan), 1.0h));
  out[4] = max(float2(nan, 1.0f), float2(2.0f, nan)).x + min(float2(nan, 1.0f), float2(2.0f, nan)).y;
  out[5] = clamp(float2(nan, 4.0f), float2(-1.0f), float2(1.0f)).x;
  out[6] = largest + smallest;
  out[7] = max(nan, nan);
}

kernel void simd(device float* out [[buffer(0)]], ushort lane [[thread_index_in_simdgroup]],
                 ushort group [[simdgroup_index_in_threadgroup]]) {
  const float x = float(lane + 1);
  device float* to = out + group * 16;
  float results[16];
  results[0] = simd_sum(x);
  results[1] = simd_max(x);
  results[2] = simd_min(x);
  results[3] = simd_product(lane < 3 ? x : 1.0f);
  results[4] = float(simd_or(1u << lane) == 0xffffffffu);
  results[5] = float(simd_and(0xf0u | lane));
  results[6] = float(simd_xor(uint(lane)));
  results[7] = simd_shuffle(x, 31 - lane);
  results[8] = simd_shuffle_xor(x, 1);
  results[9] = simd_shuffle_up(x, 2);
  results[10] = simd_shuffle_down(x, 2);
  results[11] = simd_broadcast(x, 9) + simd_broadcast_first(x);
  results[12] = simd_prefix_inclusive_sum(x);
  results[13] = simd_prefix_exclusive_sum(x);
  results[14] = float(popcount(uint(ulong(simd_ballot(lane % 3 == 0)))));
  results[15] = (simd_all(lane < 32) ? 1.0f : 0.0f) + (simd_any(lane == 40) ? 10.0f : 0.0f);
  const float4 sums = simd_sum(float4(1.0f, x, 0.0f, 2.0f));
  results[4] += sums.x + sums.w;
  if (lane == 3) {
    for (int i = 0; i < 16; ++i) to[i] = results[i];
  }
}

kernel void positions(device uint* out [[buffer(0)]], uint3 grid [[thread_position_in_grid]],
                      ushort3 group [[threadgroup_position_in_grid]], uint2 local [[thread_position_in_threadgroup]],
                      uint index [[thread_index_in_threadgroup]], uint3 threads [[threads_per_threadgroup]],
                      uint3 groups [[threadgroups_per_grid]], uint all [[threads_per_grid]],
                      ushort simdgroups [[simdgroups_per_threadgroup]], ushort width [[threads_per_simdgroup]]) {
  const uint at = grid.y * all + grid.x;
  out[at] = group.x + 10 * group.y + 100 * local.x + 10000 * local.y;
  if (at == 0) {
    out[at] = index + 10 * threads.x + 1000 * groups.x + 10000 * simdgroups + 100000 * width;
  }
}

kernel void function_constants(device float* out [[buffer(0)]], constant Arguments& arguments [[buffer(1)]]) {
  out[0] = float(kFallback);
  out[1] = float(kDoubled);
  out[2] = kFlag ? 1.0f : 0.0f;
  out[3] = float(kScale) * arguments.scale * kTable[arguments.count];
}

template <typename T, int N>
kernel void scaled(device const T* in [[buffer(0)]], device T* out [[buffer(1)]],
                   uint i [[thread_position_in_grid]]) {
  out[i] = in[i] * T(N);
}
template [[host_name("scaled_float_3")]] kernel void scaled<float, 3>(device const float*, device float*, uint);
#define instantiate(name, T, N) template [[host_name(name)]] [[kernel]] decltype(scaled<T, N>) scaled<T, N>;
instantiate("scaled_int_5", int, 5)

[[kernel]] void atomics(device atomic_uint* out [[buffer(0)]], threadgroup atomic_int* shared [[threadgroup(0)]],
                        ushort i [[thread_index_in_threadgroup]]) {
  if (i == 0) atomic_store_explicit(shared, 0, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(shared, 2, memory_order_relaxed);
  atomic_fetch_add_explicit(&out[0], 1u, memory_order_relaxed);
  atomic_fetch_min_explicit(&out[1], uint(100 - i), memory_order_relaxed);
  atomic_fetch_max_explicit(&out[2], uint(i), memory_order_relaxed);
  atomic_fetch_or_explicit(&out[3], 1u << (i % 32), memory_order_relaxed);
  uint expected = atomic_load_explicit(&out[4], memory_order_relaxed);
  while (!atomic_compare_exchange_weak_explicit(&out[4], &expected, expected + 3, memory_order_relaxed,
                                                memory_order_relaxed)) {
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (i == 0) {
    atomic_exchange_explicit(&out[5], uint(atomic_load_explicit(shared, memory_order_relaxed)), memory_order_relaxed);
  }
}

kernel void threadgroup_variables(device float* out [[buffer(0)]], ushort i [[thread_index_in_threadgroup]]) {
  threadgroup float a[2 * 32], b;
  threadgroup vec<float, 2> c[64];
  a[i] = float(i);
  if (i == 0) b = 100.0f;
  c[i] = float2(1.0f, float(i));
  threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
  threadgroup const float2* from = c + (63 - i);
  out[i] = a[63 - i] + b + from->x + from->y;
}
