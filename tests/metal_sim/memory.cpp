// Buffers between inaccessible pages, so that an access past either end cannot go unseen.
#include <cstdint>
#include <cstdlib>
#include <new>

#include <sys/mman.h>
#include <unistd.h>

#include "engine.h"
#include "sanitizers.h"

namespace metal_sim {
namespace {

std::size_t page_size() {
  static const std::size_t size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

std::size_t round_up(std::size_t size, std::size_t unit) {
  return (size + unit - 1) / unit * unit;
}

/// Pages for a buffer, at least one.
std::size_t usable_bytes(std::size_t size) {
  return round_up(size == 0 ? 1 : size, page_size());
}

}  // namespace

std::byte* allocate(std::size_t size) {
  // The address sanitizer watches the heap, to the byte.
  if (under_address_sanitizer()) return static_cast<std::byte*>(std::calloc(size, 1));
  const std::size_t usable = usable_bytes(size), total = usable + 2 * page_size();
  void* pages = mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  std::byte* begin = static_cast<std::byte*>(pages) + page_size();
  if (mprotect(begin, usable, PROT_READ | PROT_WRITE) != 0) {
    munmap(pages, total);
    throw std::bad_alloc();
  }
  return begin + (usable - round_up(size, 16));
}

void release(std::byte* memory, std::size_t size) noexcept {
  if (under_address_sanitizer()) return std::free(memory);
  if (memory == nullptr) return;
  const std::size_t usable = usable_bytes(size);
  munmap(memory + round_up(size, 16) - usable - page_size(), usable + 2 * page_size());
}

}  // namespace metal_sim
