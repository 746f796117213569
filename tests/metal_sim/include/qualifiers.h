// Metal's keywords, as macros: the last header before the kernels, since no other may use these words.
//
// In the type-check mode the address spaces are real ones; otherwise they mean nothing.
#pragma once

#if defined(METAL_SIM_TYPE_CHECK)
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2))) const
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant const
#define threadgroup
#endif
#define thread
// Not inlined: the caller is not traced or sanitized, and would take the kernel with it.
#define kernel __attribute__((noinline))

// What the translator writes for function constants, for constants computed from them, and for variables in
// threadgroup memory. At run time these are plain variables that the engine fills.
#if defined(METAL_SIM_TYPE_CHECK)
#define METAL_SIM_CONSTANT extern constant
#define METAL_SIM_DERIVED constant
#define METAL_SIM_ASSIGN(name) =
#define METAL_SIM_END
#define METAL_SIM_DECLARE(name)
#else
#define METAL_SIM_CONSTANT static
#define METAL_SIM_DERIVED static
#define METAL_SIM_ASSIGN(name)                               \
  ;                                                          \
  METAL_SIM_UNTRACED static void metal_sim_update_##name() { \
    name =
#define METAL_SIM_END \
  ;                   \
  }
#define METAL_SIM_DECLARE(name) ::metal_sim::engine.declare(&name, sizeof(name), #name)
#endif
#define is_function_constant_defined(name) (metal_sim_is_defined_##name)
