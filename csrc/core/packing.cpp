#include "core/packing.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"

namespace tq_hb {
namespace {

/// The part of every code from bit `shift` on that a plane of `width` bits per code holds.
struct Plane {
  unsigned width;
  unsigned shift;
};

/// Calls visit(plane, first coordinate, bytes of the block, offset of the block in the row) block by block.
template <class Visit>
void for_each_block(std::size_t head_dim, unsigned cbits, const Visit& visit) noexcept {
  const std::size_t block = std::min(head_dim, kPlaneBlock);
  std::size_t offset = 0;
  for (const Plane plane : {Plane{kNibbleBits, 0}, Plane{cbits - kNibbleBits, kNibbleBits}}) {
    const std::size_t bytes = block * plane.width / 8;
    for (std::size_t first = 0; first < head_dim; first += block, offset += bytes) visit(plane, first, bytes, offset);
  }
}

}  // namespace

Packing parse_packing(const std::string& op, const std::string& name) {
  if (name == "byte") return Packing::kByte;
  if (name == "plane") return Packing::kPlane;
  throw invalid(op, "packing", "must be one of byte, plane", "'" + name + "'");
}

void pack_row(const std::uint8_t* codes, std::size_t head_dim, unsigned cbits, std::uint8_t* planes) noexcept {
  // Eight bytes at a time: what a shift brings in from the next byte is outside the mask.
  using Word = std::uint64_t;
  for_each_block(head_dim, cbits, [&](Plane plane, std::size_t first, std::size_t bytes, std::size_t offset) {
    const Word mask = 0x0101010101010101u * ((1u << plane.width) - 1);
    for (std::size_t b = 0; b < bytes; b += sizeof(Word)) {
      Word packed = 0;
      for (unsigned field = 0; field * plane.width < 8; ++field) {
        Word part;
        std::memcpy(&part, codes + first + field * bytes + b, sizeof(part));
        packed |= ((part >> plane.shift) & mask) << (field * plane.width);
      }
      std::memcpy(planes + offset + b, &packed, sizeof(packed));
    }
  });
}

void unpack_row(const std::uint8_t* planes, std::size_t head_dim, unsigned cbits, std::uint8_t* codes) noexcept {
  for_each_block(head_dim, cbits, [&](Plane plane, std::size_t first, std::size_t bytes, std::size_t offset) {
    const unsigned mask = (1u << plane.width) - 1;
    for (unsigned field = 0; field * plane.width < 8; ++field) {
      std::uint8_t* block = codes + first + field * bytes;
      for (std::size_t b = 0; b < bytes; ++b) {
        const unsigned part = ((planes[offset + b] >> (field * plane.width)) & mask) << plane.shift;
        // The nibble plane comes first and sets the whole byte.
        block[b] = static_cast<std::uint8_t>(plane.shift == 0 ? part : block[b] | part);
      }
    }
  });
}

}  // namespace tq_hb
