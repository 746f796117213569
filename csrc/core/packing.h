// How the codes of a row lie in memory.
//
// Byte packing gives every code a byte. Plane packing cuts a code of 5 or 6 bits in two: a nibble plane of the
// low 4 bits, then a high plane of the rest. Inside a plane of w bits per code, a block of 128 coordinates (or a
// shorter row) takes n = 128 * w / 8 bytes; its coordinate u has the bits from w * (u / n) on of byte u % n. So the
// fields of a vector of bytes at one shift are consecutive coordinates. 8 bits are one byte plane in both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/layout.h"

namespace tq_hb {

enum class Packing { kByte, kPlane };

/// Parses "byte" or "plane".
Packing parse_packing(const std::string& op, const std::string& name);

/// Whether rows of this width are cut into planes.
constexpr bool has_planes(Packing packing, unsigned cbits) {
  return packing == Packing::kPlane && cbits < 8;
}

/// Bytes of a row of codes.
constexpr std::uint64_t row_bytes(Packing packing, unsigned cbits, std::uint64_t head_dim) {
  return has_planes(packing, cbits) ? head_dim * cbits / 8 : head_dim;
}

/// Cuts a row of `head_dim` codes, one byte each, into its planes. Bits above the width are dropped.
void pack_row(const std::uint8_t* codes, std::size_t head_dim, unsigned cbits, std::uint8_t* planes) noexcept;

/// The inverse of pack_row.
void unpack_row(const std::uint8_t* planes, std::size_t head_dim, unsigned cbits, std::uint8_t* codes) noexcept;

}  // namespace tq_hb
