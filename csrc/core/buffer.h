// Memory of a device, and arrays in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace tq_hb {

enum class DType { kFloat32, kFloat16, kUint8, kUint16, kUint32, kInt32 };

std::size_t size_of(DType dtype) noexcept;
const char* name_of(DType dtype) noexcept;

using Shape = std::vector<std::uint64_t>;

std::string to_string(const Shape& shape);

/// Bytes of a C-contiguous array; throws where that or a stride would not fit.
std::uint64_t checked_nbytes(DType dtype, const Shape& shape);

class Device;

/// One allocation of a device. `host()` is its address where the host can reach it, and null where it cannot.
class Storage {
 public:
  Storage(const Device* device, std::byte* host, std::uint64_t size) : device_(device), host_(host), size_(size) {}
  virtual ~Storage() = default;
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  const Device* device() const noexcept { return device_; }
  std::byte* host() const noexcept { return host_; }
  std::uint64_t size() const noexcept { return size_; }
  /// The device's own object, borrowed: for metal the id<MTLBuffer>. Null where there is none.
  virtual void* native_handle() const noexcept { return nullptr; }
  /// Where it starts for whoever can reach it; 0 where that means nothing. Different memory has different addresses.
  virtual std::uintptr_t address() const noexcept { return reinterpret_cast<std::uintptr_t>(host_); }

  /// Copy bytes out, in, or from a storage of the same device, after the work that the device has been given so far.
  virtual void read(std::uint64_t offset, void* target, std::uint64_t size) const;
  virtual void write(std::uint64_t offset, const void* source, std::uint64_t size) const;
  virtual void copy(std::uint64_t offset, const Storage& source, std::uint64_t source_offset, std::uint64_t size) const;

 private:
  const Device* device_;
  std::byte* host_;
  std::uint64_t size_;
};

/// A C-contiguous array in a Storage. Copies and slices share the storage.
class Buffer {
 public:
  Buffer() = default;
  /// Throws if the array does not fit in the storage or is misaligned.
  Buffer(std::shared_ptr<Storage> storage, DType dtype, Shape shape, std::uint64_t offset = 0);

  DType dtype() const noexcept { return dtype_; }
  const Shape& shape() const noexcept { return shape_; }
  std::uint64_t offset() const noexcept { return offset_; }
  std::uint64_t nbytes() const noexcept { return nbytes_; }
  std::uint64_t size() const noexcept { return nbytes_ / size_of(dtype_); }
  const std::shared_ptr<Storage>& storage() const noexcept { return storage_; }
  const Device* device() const noexcept { return storage_->device(); }

  /// Null where the host cannot reach the memory.
  std::byte* host() const noexcept { return storage_->host() == nullptr ? nullptr : storage_->host() + offset_; }
  template <class T>
  T* data() const noexcept {
    return reinterpret_cast<T*>(host());
  }

  std::uintptr_t address() const noexcept { return storage_->address() + offset_; }

  /// Copies nbytes() of host memory, out or in.
  void read(void* target) const { storage_->read(offset_, target, nbytes_); }
  void write(const void* source) const { storage_->write(offset_, source, nbytes_); }
  /// Takes over the contents of a buffer of the same device, dtype and shape.
  void copy_from(const Buffer& source) const;

  /// Rows [start, stop) of the first axis.
  Buffer slice(std::uint64_t start, std::uint64_t stop) const;
  /// The same elements with other axes.
  Buffer reshape(Shape shape) const;
  /// Row `index` of the first axis, with that axis removed.
  Buffer row(std::uint64_t index) const;
  bool overlaps(const Buffer& other) const noexcept;

 private:
  std::shared_ptr<Storage> storage_;
  DType dtype_ = DType::kUint8;
  Shape shape_;
  std::uint64_t offset_ = 0;
  std::uint64_t nbytes_ = 0;
};

}  // namespace tq_hb
