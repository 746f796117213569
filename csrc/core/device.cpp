#include "core/device.h"

#include <utility>

#include "core/codebook.h"

namespace tq_hb {

Buffer Device::empty(DType dtype, Shape shape) const {
  check_usable("Device.empty");
  const std::uint64_t size = checked_nbytes(dtype, shape);
  if (size > limits().max_buffer_bytes) {
    throw Error(ErrorCode::kOutOfMemory, "Device.empty: " + std::to_string(size) +
                                             " bytes exceed the device's limit of " +
                                             std::to_string(limits().max_buffer_bytes));
  }
  return Buffer(allocate(size), dtype, std::move(shape));
}

std::shared_ptr<Storage> Device::wrap_host(std::byte* data, std::uint64_t size, std::shared_ptr<void> owner) const {
  check_usable("Device.wrap_host");
  return borrow_host(data, size, std::move(owner));
}

std::shared_ptr<Storage> Device::wrap_native(void* handle, std::shared_ptr<void> owner) const {
  check_usable("Device.wrap_native");
  return borrow_native(handle, std::move(owner));
}

std::shared_ptr<Storage> Device::wrap_address(std::uintptr_t address, std::uint64_t size,
                                              std::shared_ptr<void> owner) const {
  check_usable("Device.wrap_address");
  return borrow_address(address, size, std::move(owner));
}

std::unique_ptr<CommandEncoder> Device::make_encoder(bool auto_barrier, std::optional<std::uintptr_t> stream) const {
  check_usable("Device.encoder");
  return stream ? new_encoder_on(*stream, auto_barrier) : new_encoder(auto_barrier);
}

std::unique_ptr<CommandEncoder> Device::new_encoder_on(std::uintptr_t /*stream*/, bool /*auto_barrier*/) const {
  throw unsupported("Device.encoder", "a stream on " + backend());
}

void Device::warm_up(const std::vector<unsigned>& cbits) const {
  check_usable("Device.warm_up");
  for (const unsigned width : cbits) find_codebook("Device.warm_up", CodebookName::kLloydMax, width);
  prepare(cbits);
}

}  // namespace tq_hb
