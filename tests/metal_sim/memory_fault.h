// Turns a memory fault inside a kernel into a failure of its dispatch instead of the end of the process.
#pragma once

namespace metal_sim {

/// Takes over SIGSEGV and SIGBUS while it lives, for the calling thread's kernels; other faults go on to whoever
/// had the signals before. Does nothing under a sanitizer, which reports them better.
class MemoryFaultGuard {
 public:
  MemoryFaultGuard();
  ~MemoryFaultGuard();
  MemoryFaultGuard(const MemoryFaultGuard&) = delete;
  MemoryFaultGuard& operator=(const MemoryFaultGuard&) = delete;
};

}  // namespace metal_sim
