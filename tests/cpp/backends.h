// Runs a test on every backend that this machine has and whose memory the host reaches.
#pragma once

#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "registry.h"

namespace tq_hb {

inline std::vector<std::string> available_backends() {
  std::vector<std::string> names;
  for (const BackendStatus& status : backend_statuses()) {
    if (status.device == nullptr) continue;
    if (status.device->empty(DType::kUint8, {1}).host() != nullptr) names.push_back(status.backend);
  }
  return names;
}

/// Base of tests whose parameter is the backend's name.
using OnEveryBackend = testing::TestWithParam<std::string>;

}  // namespace tq_hb

#define TQ_RUN_ON_EVERY_BACKEND(suite)                                                  \
  INSTANTIATE_TEST_SUITE_P(On, suite, testing::ValuesIn(::tq_hb::available_backends()), \
                           [](const testing::TestParamInfo<std::string>& info) { return info.param; })
