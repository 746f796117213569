// Runs recorded dispatches again: driver RECORDING...
//
// Linked with a sanitizer, which then watches the kernels. The exit status is 1 after a fault, and the
// sanitizer's own where that reports something.
#include <cstdio>
#include <exception>

#include "recording.h"

// What the sanitizers ask for their options; one of these is called.
extern "C" const char* __tsan_default_options() {
  return "halt_on_error=1:external_symbolizer_path=" METAL_SIM_ADDR2LINE;
}
extern "C" const char* __asan_default_options() {
  return "detect_leaks=0:detect_stack_use_after_return=0:external_symbolizer_path=" METAL_SIM_ADDR2LINE;
}

int main(int count, char** arguments) {
  int status = count > 1 ? 0 : 2;
  for (int i = 1; i < count; ++i) {
    try {
      const metal_sim::Recording recording(arguments[i]);
      metal_sim::execute(recording.batches());
      std::printf("%s: ran\n", arguments[i]);
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", arguments[i], error.what());
      status = 1;
    }
  }
  return status;
}
