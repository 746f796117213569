#include "registry.h"

#include "cpu/device.h"

namespace tq_hb {

std::vector<BackendStatus> backend_statuses() {
  return {
      {"metal", nullptr, "this version has no metal backend"},
      {"cuda", nullptr, "this version has no cuda backend"},
      {"cpu", cpu_device(), ""},
  };
}

std::shared_ptr<Device> open_device(const std::string& backend) {
  for (const BackendStatus& status : backend_statuses()) {
    if (status.backend != backend) continue;
    if (status.device == nullptr)
      throw Error(ErrorCode::kDevice, "Device: " + backend + " is not available: " + status.reason);
    return status.device;
  }
  throw invalid("Device", "name", "must be \"auto\", \"metal\", \"cuda\" or \"cpu\"", '"' + backend + '"');
}

}  // namespace tq_hb
