// Device: what a backend offers. Makes buffers and encoders.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/buffer.h"
#include "core/encoder.h"

namespace tq_hb {

struct DeviceLimits {
  std::uint64_t max_buffer_bytes;
  unsigned num_threads;
  std::uint64_t max_threadgroup_bytes;        ///< 0 where there are no threadgroups
  std::uint64_t max_threads_per_threadgroup;  ///< 0 where there are no threadgroups
  unsigned num_multiprocessors = 0;           ///< 0 where that is not known
};

/// May be used from any thread.
class Device {
 public:
  virtual ~Device() = default;

  virtual std::string name() const = 0;
  virtual std::string backend() const = 0;
  virtual bool is_simulated() const { return false; }
  virtual DeviceLimits limits() const = 0;
  /// Whether it has a kernel for rows of this size and packing.
  virtual bool offers(AttendKernel kernel, std::uint64_t /*head_dim*/, Packing /*packing*/, unsigned /*k_cbits*/,
                      unsigned /*v_cbits*/) const {
    return kernel == AttendKernel::kPerHead;
  }
  /// Throws in a process that cannot use the device: a forked child of the one that opened it.
  virtual void check_usable(const std::string& /*op*/) const {}

  /// Zeroed memory.
  Buffer empty(DType dtype, Shape shape) const;
  /// Memory of the host's, used in place and kept alive by `owner`; null where the device would have to copy.
  std::shared_ptr<Storage> wrap_host(std::byte* data, std::uint64_t size, std::shared_ptr<void> owner) const;
  /// A memory object of the device's own kind (see Storage::native_handle), kept alive by `owner`; null where the
  /// backend has none.
  std::shared_ptr<Storage> wrap_native(void* handle, std::shared_ptr<void> owner) const;
  /// The device's own memory, which another library has allocated and `owner` keeps alive; null where the backend
  /// cannot tell.
  std::shared_ptr<Storage> wrap_address(std::uintptr_t address, std::uint64_t size, std::shared_ptr<void> owner) const;
  /// With `stream`, a queue of the backend's own kind (for cuda a cudaStream_t), its ops run there.
  std::unique_ptr<CommandEncoder> make_encoder(bool auto_barrier = false,
                                               std::optional<std::uintptr_t> stream = std::nullopt) const;
  /// Makes another library's stream wait for what the device has been given so far.
  virtual void release_to(std::uintptr_t /*stream*/) const {}
  /// Whether what is given to that stream is recorded, not run.
  virtual bool is_capturing(std::uintptr_t /*stream*/) const { return false; }
  /// Does now what the first ops at these widths would otherwise wait for.
  void warm_up(const std::vector<unsigned>& cbits) const;

 private:
  virtual std::shared_ptr<Storage> allocate(std::uint64_t size) const = 0;
  virtual std::shared_ptr<Storage> borrow_host(std::byte* data, std::uint64_t size,
                                               std::shared_ptr<void> owner) const = 0;
  virtual std::shared_ptr<Storage> borrow_native(void* /*handle*/, std::shared_ptr<void> /*owner*/) const {
    return nullptr;
  }
  virtual std::shared_ptr<Storage> borrow_address(std::uintptr_t /*address*/, std::uint64_t /*size*/,
                                                  std::shared_ptr<void> /*owner*/) const {
    return nullptr;
  }
  virtual std::unique_ptr<CommandEncoder> new_encoder(bool auto_barrier) const = 0;
  virtual std::unique_ptr<CommandEncoder> new_encoder_on(std::uintptr_t stream, bool auto_barrier) const;
  virtual void prepare(const std::vector<unsigned>& cbits) const = 0;
};

}  // namespace tq_hb
