#include "core/buffer.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/checked.h"

namespace tq_hb {

std::size_t size_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::kUint8:
      return 1;
    case DType::kFloat16:
    case DType::kUint16:
      return 2;
    case DType::kFloat32:
    case DType::kUint32:
    case DType::kInt32:
      break;
  }
  return 4;
}

const char* name_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::kUint8:
      return "uint8";
    case DType::kFloat16:
      return "float16";
    case DType::kUint16:
      return "uint16";
    case DType::kUint32:
      return "uint32";
    case DType::kInt32:
      return "int32";
    case DType::kFloat32:
      break;
  }
  return "float32";
}

std::string to_string(const Shape& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

std::uint64_t checked_nbytes(DType dtype, const Shape& shape) {
  // The strides of an array without elements have to fit as well.
  std::uint64_t nbytes = size_of(dtype);
  bool is_empty = false;
  for (const std::uint64_t extent : shape) {
    is_empty = is_empty || extent == 0;
    nbytes = checked_product("Buffer", "size", {nbytes, std::max<std::uint64_t>(extent, 1)});
  }
  return is_empty ? 0 : nbytes;
}

void Storage::read(std::uint64_t offset, void* target, std::uint64_t size) const {
  std::memmove(target, host_ + offset, size);
}

void Storage::write(std::uint64_t offset, const void* source, std::uint64_t size) const {
  std::memmove(host_ + offset, source, size);
}

void Storage::copy(std::uint64_t offset, const Storage& source, std::uint64_t source_offset, std::uint64_t size) const {
  std::memmove(host_ + offset, source.host_ + source_offset, size);
}

Buffer::Buffer(std::shared_ptr<Storage> storage, DType dtype, Shape shape, std::uint64_t offset)
    : storage_(std::move(storage)), dtype_(dtype), shape_(std::move(shape)), offset_(offset) {
  nbytes_ = checked_nbytes(dtype_, shape_);
  if (offset_ > storage_->size() || nbytes_ > storage_->size() - offset_) {
    throw invalid("Buffer", "shape", "must fit in the " + std::to_string(storage_->size()) + " bytes of its storage",
                  to_string(shape_));
  }
  if (offset_ % size_of(dtype_) != 0) {
    throw invalid("Buffer", "offset", std::string("must be aligned for ") + name_of(dtype_), offset_);
  }
}

void Buffer::copy_from(const Buffer& source) const {
  if (source.device() != device()) {
    throw invalid("Buffer.copy_from", "x", "must be a buffer of this device", "one of another device");
  }
  if (source.dtype_ != dtype_) {
    throw invalid("Buffer.copy_from", "x", std::string("must have dtype ") + name_of(dtype_), name_of(source.dtype_));
  }
  if (source.shape_ != shape_) {
    throw invalid("Buffer.copy_from", "x", "must have shape " + to_string(shape_), to_string(source.shape_));
  }
  storage_->copy(offset_, *source.storage_, source.offset_, nbytes_);
}

Buffer Buffer::slice(std::uint64_t start, std::uint64_t stop) const {
  if (shape_.empty()) throw invalid("Buffer", "slice", "needs at least one axis", "a scalar");
  if (start > stop || stop > shape_[0]) {
    throw invalid("Buffer", "slice", "must lie in 0 to " + std::to_string(shape_[0]),
                  std::to_string(start) + ":" + std::to_string(stop));
  }
  const std::uint64_t row_bytes = shape_[0] == 0 ? 0 : nbytes_ / shape_[0];
  Shape shape = shape_;
  shape[0] = stop - start;
  return Buffer(storage_, dtype_, std::move(shape), offset_ + start * row_bytes);
}

Buffer Buffer::reshape(Shape shape) const {
  if (checked_nbytes(dtype_, shape) != nbytes_) {
    throw invalid("Buffer.reshape", "shape", "must hold as many elements as " + to_string(shape_), to_string(shape));
  }
  return Buffer(storage_, dtype_, std::move(shape), offset_);
}

Buffer Buffer::row(std::uint64_t index) const {
  const Buffer one = slice(index, index + 1);
  return Buffer(storage_, dtype_, Shape(shape_.begin() + 1, shape_.end()), one.offset());
}

bool Buffer::overlaps(const Buffer& other) const noexcept {
  if (nbytes_ == 0 || other.nbytes_ == 0) return false;
  // Two storages may wrap the same memory, so addresses are compared wherever there are any.
  const bool by_address = storage_->address() != 0 && other.storage_->address() != 0;
  if (!by_address && storage_ != other.storage_) return false;
  const auto begin = by_address ? address() : offset_;
  const auto other_begin = by_address ? other.address() : other.offset_;
  return begin < other_begin + other.nbytes_ && other_begin < begin + nbytes_;
}

}  // namespace tq_hb
