// What the environment asks of a run.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace metal_sim {

struct Options {
  std::optional<std::uint64_t> seed;  ///< METAL_SIM_SEED: a random schedule instead of the fixed one
  bool check = false;                 ///< METAL_SIM_CHECK=1: every access is looked up
  bool flush_denormals = false;       ///< METAL_SIM_LANE=ftz
  bool contract = false;              ///< METAL_SIM_LANE=contract: a*b+c rounds once; "ftz,contract" is both
  std::string record;                 ///< METAL_SIM_RECORD: a folder for one recording of each kind of work
};

/// Throws std::invalid_argument on a value that is not understood.
Options read_options();

}  // namespace metal_sim
