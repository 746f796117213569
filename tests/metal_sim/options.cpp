#include "options.h"

#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>

namespace metal_sim {
namespace {

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace

Options read_options() {
  Options options;
  if (const std::string seed = variable("METAL_SIM_SEED"); !seed.empty()) {
    if (seed.find_first_not_of("0123456789") != std::string::npos || seed.size() > 18) {
      throw std::invalid_argument("METAL_SIM_SEED must be a non-negative integer, got " + seed);
    }
    options.seed = std::stoull(seed);
  }
  const std::string check = variable("METAL_SIM_CHECK");
  if (check != "" && check != "0" && check != "1") {
    throw std::invalid_argument("METAL_SIM_CHECK must be 0 or 1, got " + check);
  }
  options.check = check == "1";
  std::istringstream lane(variable("METAL_SIM_LANE"));
  for (std::string word; std::getline(lane, word, ',');) {
    if (word != "ftz" && word != "contract") {
      throw std::invalid_argument("METAL_SIM_LANE must list ftz and contract, got " + lane.str());
    }
    (word == "ftz" ? options.flush_denormals : options.contract) = true;
  }
  options.record = variable("METAL_SIM_RECORD");
  return options;
}

}  // namespace metal_sim
