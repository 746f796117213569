#include "registry.h"

#include <utility>

#include "cpu/device.h"
#if defined(TQ_HB_HAVE_CUDA)
#include "cuda/device.h"
#endif
#if defined(TQ_HB_HAVE_METAL)
#include "metal/device.h"
#endif

namespace tq_hb {
namespace {

/// Opens the device or throws an Error whose message is the reason why there is none.
using Open = std::shared_ptr<Device> (*)();

std::shared_ptr<Device> open_metal() {
#if defined(TQ_HB_HAVE_METAL)
  return metal_device();
#else
  throw Error(ErrorCode::kDevice, "it needs macOS");
#endif
}

std::shared_ptr<Device> open_cuda() {
#if defined(TQ_HB_HAVE_CUDA)
  return cuda_device();
#else
  throw Error(ErrorCode::kDevice, "this build has no cuda backend (-Ccmake.define.TQ_HB_CUDA=ON adds it)");
#endif
}

std::shared_ptr<Device> open_cpu() {
  return cpu_device();
}

constexpr std::pair<const char*, Open> kBackends[] = {{"metal", open_metal}, {"cuda", open_cuda}, {"cpu", open_cpu}};

BackendStatus status_of(const char* backend, Open open) {
  try {
    return {backend, open(), ""};
  } catch (const Error& error) {
    return {backend, nullptr, error.what()};
  }
}

}  // namespace

std::vector<std::string> backend_names() {
  std::vector<std::string> names;
  for (const auto& [backend, open] : kBackends) names.emplace_back(backend);
  return names;
}

std::vector<BackendStatus> backend_statuses() {
  std::vector<BackendStatus> statuses;
  for (const auto& [backend, open] : kBackends) statuses.push_back(status_of(backend, open));
  return statuses;
}

std::shared_ptr<Device> open_device(const std::string& backend) {
  // Only the device asked for is opened: a process that never touches a GPU may fork.
  for (const auto& [name, open] : kBackends) {
    if (backend != name) continue;
    const BackendStatus status = status_of(name, open);
    if (status.device == nullptr) {
      throw Error(ErrorCode::kDevice, "Device: " + backend + " is not available: " + status.reason);
    }
    status.device->check_usable("Device");
    return status.device;
  }
  throw invalid("Device", "name", "must be \"auto\", \"metal\", \"cuda\" or \"cpu\"", '"' + backend + '"');
}

}  // namespace tq_hb
