// Storage in the memory of a GPU, which the host cannot reach.
#pragma once

#include <memory>

#include "core/buffer.h"
#include "cuda/context.h"

namespace tq_hb {

class CudaStorage final : public Storage {
 public:
  /// Zeroed memory of the GPU's own.
  CudaStorage(const Device* device, std::shared_ptr<CudaContext> context, std::uint64_t size);
  /// Somebody else's memory on the same GPU, kept alive by `owner`.
  CudaStorage(const Device* device, std::shared_ptr<CudaContext> context, void* data, std::uint64_t size,
              std::shared_ptr<void> owner);
  ~CudaStorage() override;

  void* native_handle() const noexcept override { return data_; }
  std::uintptr_t address() const noexcept override { return reinterpret_cast<std::uintptr_t>(data_); }

  void read(std::uint64_t offset, void* target, std::uint64_t size) const override;
  void write(std::uint64_t offset, const void* source, std::uint64_t size) const override;
  void copy(std::uint64_t offset, const Storage& source, std::uint64_t source_offset,
            std::uint64_t size) const override;

 private:
  std::byte* at(std::uint64_t offset) const noexcept { return static_cast<std::byte*>(data_) + offset; }
  void transfer(void* target, const void* source, std::uint64_t size, cudaMemcpyKind kind) const;

  std::shared_ptr<CudaContext> context_;
  std::shared_ptr<void> owner_;
  void* data_ = nullptr;
  bool is_ours_;
};

/// The address on the GPU of a buffer's first byte.
template <class T>
T* device_data(const Buffer& buffer) noexcept {
  return reinterpret_cast<T*>(buffer.address());
}

}  // namespace tq_hb
