// Everything that is checked about a call before a backend sees it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/abi.h"
#include "core/device.h"

namespace tq_hb {

// The first 15 fields take 60 bytes; those filled in per call are appended.
static_assert(sizeof(TqFlashAttnVecArgs) == 76);
static_assert(offsetof(TqFlashAttnVecArgs, num_heads) == 0);
static_assert(offsetof(TqFlashAttnVecArgs, num_kv_heads) == 4);
static_assert(offsetof(TqFlashAttnVecArgs, head_dim) == 8);
static_assert(offsetof(TqFlashAttnVecArgs, kv_seq_len) == 12);
static_assert(offsetof(TqFlashAttnVecArgs, kv_capacity) == 16);
static_assert(offsetof(TqFlashAttnVecArgs, scale) == 20);
static_assert(offsetof(TqFlashAttnVecArgs, mask_type) == 24);
static_assert(offsetof(TqFlashAttnVecArgs, sliding_window) == 28);
static_assert(offsetof(TqFlashAttnVecArgs, softcap) == 32);
static_assert(offsetof(TqFlashAttnVecArgs, nwg) == 36);
static_assert(offsetof(TqFlashAttnVecArgs, ring_start) == 40);
static_assert(offsetof(TqFlashAttnVecArgs, scale_factor_d512) == 44);
static_assert(offsetof(TqFlashAttnVecArgs, codebook_bits) == 48);
static_assert(offsetof(TqFlashAttnVecArgs, fuse_fwht_pre) == 52);
static_assert(offsetof(TqFlashAttnVecArgs, nsg) == 56);
static_assert(offsetof(TqFlashAttnVecArgs, codebook) == 60);
static_assert(offsetof(TqFlashAttnVecArgs, num_queries) == 64);
static_assert(offsetof(TqFlashAttnVecArgs, query_position) == 68);
static_assert(offsetof(TqFlashAttnVecArgs, flags) == 72);

// The first seven fields take 28 bytes; `codebook` is appended.
static_assert(sizeof(TqHadamardQuantizeArgs) == 32);
static_assert(offsetof(TqHadamardQuantizeArgs, head_dim) == 0);
static_assert(offsetof(TqHadamardQuantizeArgs, num_kv_heads) == 4);
static_assert(offsetof(TqHadamardQuantizeArgs, write_pos) == 8);
static_assert(offsetof(TqHadamardQuantizeArgs, cache_capacity) == 12);
static_assert(offsetof(TqHadamardQuantizeArgs, is_sliding) == 16);
static_assert(offsetof(TqHadamardQuantizeArgs, scale_factor_d512) == 20);
static_assert(offsetof(TqHadamardQuantizeArgs, codebook_bits) == 24);
static_assert(offsetof(TqHadamardQuantizeArgs, codebook) == 28);

constexpr unsigned kMaxNsg = 4;
constexpr unsigned kMaxNwg = 32;

/// Raises for a head size no backend offers.
void check_head_dim(const std::string& op, std::uint64_t head_dim);

/// The caller's fields; those filled in per call are not looked at.
void validate(const std::string& op, const TqFlashAttnVecArgs& args);
void validate(const std::string& op, const TqHadamardQuantizeArgs& args);

/// Whole calls: fields, widths, buffers and what may not overlap.
void validate(const AttendOp& op, const Device* device);
void validate(const QuantizeOp& op, const Device* device);
void validate(const DequantizeOp& op, const Device* device);
void validate(const FwhtOp& op, const Device* device);

/// Bytes of the partial results of `splits` workgroups per head: o[D], m and l in float32.
std::uint64_t tmp_buffer_bytes(std::uint64_t num_heads, std::uint64_t head_dim, std::uint64_t num_queries = 1,
                               std::uint64_t splits = kMaxNwg);

}  // namespace tq_hb
