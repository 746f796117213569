#include "fiber.h"

#include <cstdint>
#include <new>

#include <sys/mman.h>
#include <unistd.h>

namespace metal_sim {
namespace {

namespace context = boost::context::detail;

std::size_t stack_bytes() {
  return (under_address_sanitizer() ? 1024 : 256) * 1024;
}

std::size_t page_size() {
  return static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace

Fiber::Fiber() {
  if (under_thread_sanitizer()) sanitizer_fiber_ = __tsan_get_current_fiber();
}

Fiber::Fiber(void (*entry)()) : entry_(entry), size_(stack_bytes()) {
  void* pages = mmap(nullptr, page_size() + size_, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  mprotect(pages, page_size(), PROT_NONE);
  stack_ = static_cast<std::byte*>(pages) + page_size();
  restart();
}

Fiber::~Fiber() {
  if (stack_ == nullptr) return;
  if (under_thread_sanitizer()) __tsan_destroy_fiber(sanitizer_fiber_);
  munmap(stack_ - page_size(), page_size() + size_);
}

void Fiber::restart() {
  context_ = context::make_fcontext(stack_top(), size_, &Fiber::start);
  fake_stack_ = nullptr;
  if (under_thread_sanitizer()) {
    if (sanitizer_fiber_ != nullptr) __tsan_destroy_fiber(sanitizer_fiber_);
    sanitizer_fiber_ = __tsan_create_fiber(0);
  }
}

bool Fiber::owns(const void* address) const {
  const auto* byte = static_cast<const std::byte*>(address);
  return stack_ != nullptr && byte >= stack_ - page_size() && byte < stack_top();
}

void Fiber::start(context::transfer_t transfer) {
  Fiber& self = *static_cast<Fiber**>(transfer.data)[0];
  self.arrived(transfer);
  self.entry_();
}

}  // namespace metal_sim
