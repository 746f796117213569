#include "memory_fault.h"

#include <csignal>
#include <cstddef>
#include <cstdint>

#include <sys/ucontext.h>

#include "machine.h"
#include "sanitizers.h"

namespace metal_sim {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS};

struct sigaction previous[2];
stack_t previous_stack;
thread_local bool is_guarded = false;
// The handler cannot run on a fiber's stack, which may be what overflowed.
alignas(16) char handler_stack[64 * 1024];

struct {
  const char* what;
  const void* address;  ///< null where it says nothing
  const void* instruction;
} last_fault;

/// Where a faulting thread continues, at the top of its stack.
void land() {
  Machine::instance().fail(last_fault.what, last_fault.instruction, last_fault.address);
}

void handle(int signal, siginfo_t* info, void* context) {
  Machine& machine = Machine::instance();
  if (!is_guarded || !machine.is_running()) {
    // Returning with the former handler in place repeats the fault, and that handler sees it.
    sigaction(signal, &previous[signal == SIGBUS], nullptr);
    return;
  }
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext;
  const auto stack = reinterpret_cast<std::uintptr_t>(machine.abandon_stack());
#if defined(__x86_64__)
  last_fault.instruction = reinterpret_cast<const void*>(registers.gregs[REG_RIP]);
  registers.gregs[REG_RIP] = reinterpret_cast<greg_t>(&land);
  registers.gregs[REG_RSP] = static_cast<greg_t>(stack - 64 - 8);  // as after a call
#elif defined(__aarch64__)
  last_fault.instruction = reinterpret_cast<const void*>(registers.pc);
  registers.pc = reinterpret_cast<std::uintptr_t>(&land);
  registers.sp = stack - 64;
#endif
  // The instruction is not a return address: the line is looked up one byte before.
  last_fault.instruction = static_cast<const std::byte*>(last_fault.instruction) + 1;
  last_fault.address = nullptr;
  if (machine.on_stack_of_running_thread(info->si_addr)) {
    last_fault.what = "the stack of a thread overflows";
  } else if (info->si_code == SI_KERNEL) {
    last_fault.what = "an access that is not aligned for its type";
  } else {
    last_fault.what = "an access outside every buffer";
    last_fault.address = info->si_addr;
  }
}

}  // namespace

MemoryFaultGuard::MemoryFaultGuard() {
  if (under_thread_sanitizer() || under_address_sanitizer()) return;
  stack_t stack{};
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof(handler_stack);
  sigaltstack(&stack, &previous_stack);
  struct sigaction action{};
  action.sa_sigaction = &handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (std::size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &previous[i]);
  is_guarded = true;
}

MemoryFaultGuard::~MemoryFaultGuard() {
  if (under_thread_sanitizer() || under_address_sanitizer()) return;
  is_guarded = false;
  for (std::size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &previous[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
}

}  // namespace metal_sim
