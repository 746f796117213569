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

/// Packs one block of a plane, so many bytes at a time as a Word has. Its parts are 64-bit integers: what a shift
/// brings in from the next byte is outside the mask.
template <unsigned kWidth, unsigned kShift, class Word>
inline std::size_t pack_words(const std::uint8_t* codes, std::size_t begin, std::size_t bytes,
                              std::uint8_t* plane) noexcept {
  constexpr std::uint64_t kMask = 0x0101010101010101u * ((1u << kWidth) - 1);
  for (; begin + sizeof(Word) <= bytes; begin += sizeof(Word)) {
    Word packed{};
    for (unsigned field = 0; field * kWidth < 8; ++field) {
      Word part;
      std::memcpy(&part, codes + field * bytes + begin, sizeof(part));
      packed |= ((part >> kShift) & kMask) << (field * kWidth);
    }
    std::memcpy(plane + begin, &packed, sizeof(packed));
  }
  return begin;
}

template <unsigned kWidth, unsigned kShift>
void pack_block(const std::uint8_t* codes, std::size_t bytes, std::uint8_t* plane) noexcept {
  typedef std::uint64_t Pair __attribute__((vector_size(16)));
  const std::size_t done = pack_words<kWidth, kShift, Pair>(codes, 0, bytes, plane);
  pack_words<kWidth, kShift, std::uint64_t>(codes, done, bytes, plane);
}

}  // namespace

Packing parse_packing(const std::string& op, const std::string& name) {
  if (name == "byte") return Packing::kByte;
  if (name == "plane") return Packing::kPlane;
  throw invalid(op, "packing", "must be one of byte, plane", "'" + name + "'");
}

void pack_row(const std::uint8_t* codes, std::size_t head_dim, unsigned cbits, std::uint8_t* planes) noexcept {
  for_each_block(head_dim, cbits, [&](Plane plane, std::size_t first, std::size_t bytes, std::size_t offset) {
    const std::uint8_t* source = codes + first;
    std::uint8_t* target = planes + offset;
    if (plane.width == kNibbleBits) return pack_block<kNibbleBits, 0>(source, bytes, target);
    if (plane.width == 1) return pack_block<1, kNibbleBits>(source, bytes, target);
    pack_block<2, kNibbleBits>(source, bytes, target);
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
