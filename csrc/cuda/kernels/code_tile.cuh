// A warp's part of the cache in shared memory: a tile of keys, filled by asynchronous copies.
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "cuda/kernels/row.cuh"

namespace tq_hb {
namespace {

constexpr unsigned kKeys = 16;   // of a tile
constexpr unsigned kChunk = 16;  // bytes of one copy, and coordinates that a lane holds together
constexpr std::uint32_t kEveryByte = 0x01010101u;

/// Brings consecutive bytes into the L2 cache: a multiple of 16 of them, from a multiple of 16 on.
__device__ inline void prefetch(const void* bytes, unsigned count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(bytes), "r"(count) : "memory");
#endif
}
/// The same of the line that holds an address.
__device__ inline void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address) : "memory");
}

__device__ inline void copy_chunk(std::uint32_t shared_address, const std::uint8_t* source) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address), "l"(source) : "memory");
}
__device__ inline void end_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <unsigned kPending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  __syncwarp();
}

/// A warp's keys of one tile in shared memory: of each, the codes of kBlockDim coordinates.
///
/// The chunks of a part of a row (bytes, nibbles or high bits) lie at other places in every row, so that reads meet in
/// no bank: see place().
template <unsigned kHeadDim, unsigned kBlockDim, unsigned kHighBits>
struct CodeTile {
  static constexpr bool kHasPlanes = kHighBits != 0;
  static constexpr unsigned kLowChunks = kBlockDim / kChunk / (kHasPlanes ? 2 : 1);
  static constexpr unsigned kHighChunks = kBlockDim * kHighBits / 8 / kChunk;
  static constexpr unsigned kRowChunks = kLowChunks + kHighChunks;
  static constexpr unsigned kBytes = kKeys * kRowChunks * kChunk;

  static __device__ unsigned low_place(unsigned key, unsigned chunk) { return place<kLowChunks>(key, chunk); }
  static __device__ unsigned high_place(unsigned key, unsigned chunk) {
    return kKeys * kLowChunks + place<kHighChunks>(key, chunk);
  }

  /// Starts the copies of all keys; `row_of(key)` is the key's row of codes, of which the warp has block `block`.
  template <class RowOf>
  static __device__ void copy(std::uint32_t tile, unsigned block, unsigned lane, const RowOf& row_of) {
#pragma unroll
    for (unsigned i = 0; i < kKeys * kLowChunks / kWarp; ++i) {
      const unsigned key = i * (kWarp / kLowChunks) + lane / kLowChunks, chunk = lane % kLowChunks;
      copy_chunk(tile + low_place(key, chunk) * kChunk, row_of(key) + (block * kLowChunks + chunk) * kChunk);
    }
    if constexpr (kHasPlanes) {
      constexpr unsigned kHighPlane = kHeadDim * kNibbleBits / 8;
      if (lane >= kKeys * kHighChunks) return;
#pragma unroll
      for (unsigned i = 0; i < (kKeys * kHighChunks + kWarp - 1) / kWarp; ++i) {
        const unsigned key = i * (kWarp / kHighChunks) + lane / kHighChunks, chunk = lane % kHighChunks;
        copy_chunk(tile + high_place(key, chunk) * kChunk,
                   row_of(key) + kHighPlane + (block * kHighChunks + chunk) * kChunk);
      }
    }
  }

  /// The codes of 16 consecutive coordinates, a byte each.
  static __device__ uint4 codes(const unsigned char* tile, unsigned key, unsigned chunk) {
    const auto* chunks = reinterpret_cast<const uint4*>(tile);
    if constexpr (!kHasPlanes) {
      return chunks[low_place(key, chunk)];
    } else {
      // Of a plane block's eight chunks, four lie in the low halves of the nibble plane's bytes and four in the high.
      constexpr unsigned kHighPerBlock = kPlaneBlock * kHighBits / 8 / kChunk;
      const unsigned plane_block = chunk / 8, within = chunk % 8;
      const uint4 low = chunks[low_place(key, plane_block * 4 + within % 4)];
      const uint4 high = chunks[high_place(key, plane_block * kHighPerBlock + within % kHighPerBlock)];
      const unsigned low_shift = within / 4 * kNibbleBits, high_shift = within / kHighPerBlock * kHighBits;
      // Bits above a code's width do not count: the tables repeat.
      const auto join = [&](std::uint32_t low_word, std::uint32_t high_word) {
        constexpr std::uint32_t kNibbles = kEveryByte * ((1u << kNibbleBits) - 1);
        const std::uint32_t above = __funnelshift_l(high_word, high_word, kNibbleBits - high_shift);
        return (low_word >> low_shift & kNibbles) | (above & ~kNibbles);
      };
      return make_uint4(join(low.x, high.x), join(low.y, high.y), join(low.z, high.z), join(low.w, high.w));
    }
  }

 private:
  /// Where a chunk of a key's kRowPart chunks lies.
  ///
  /// Eight lanes read together: four consecutive chunks of keys 2i and 2i + 1 (of K), or two of every other key of
  /// eight (of V). So keys that differ in their lowest bit, and such that differ in the two bits above it, have their
  /// chunks in different banks. A bank is known by the three lowest bits of the place, which the key's bits are in
  /// already where a row part is short.
  template <unsigned kRowPart>
  static __device__ unsigned place(unsigned key, unsigned chunk) {
    const unsigned bit_1 = kRowPart >= 4 ? key >> 1 : kRowPart == 2 ? key >> 2 : 0;
    const unsigned bit_2 = kRowPart >= 8 ? key >> 2 ^ key : kRowPart == 4 ? key >> 2 : 0;
    return (key * kRowPart + chunk) ^ ((bit_1 & 1) << 1 | (bit_2 & 1) << 2);
  }
};

}  // namespace
}  // namespace tq_hb
