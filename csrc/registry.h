// Which devices exist here, and why the others do not.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/device.h"

namespace tq_hb {

struct BackendStatus {
  std::string backend;
  std::shared_ptr<Device> device;  ///< null where there is none
  std::string reason;              ///< why there is none
};

/// Every backend the project has, best first.
std::vector<std::string> backend_names();

/// Opens them all.
std::vector<BackendStatus> backend_statuses();

/// The backend's device, or an Error that says why there is none.
std::shared_ptr<Device> open_device(const std::string& backend);

}  // namespace tq_hb
