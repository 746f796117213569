// Runs another program and collects what it prints.
#pragma once

#include <string>
#include <vector>

namespace metal_sim {

struct ProcessResult {
  int status;          ///< exit status, or 128 + the signal
  std::string output;  ///< standard output and standard error together
};

/// Throws std::runtime_error if the program cannot be started.
ProcessResult run_process(const std::vector<std::string>& arguments);

}  // namespace metal_sim
