// Lending a Buffer to another library through DLPack.

#include <type_traits>
#include <utility>

#include "bind/bind.h"
#include "bind/dlpack.h"
#include "registry.h"

namespace tq_hb {
namespace {

using namespace dlpack;

DLDataType dl_dtype(DType dtype) {
  const auto bits = static_cast<std::uint8_t>(8 * size_of(dtype));
  switch (dtype) {
    case DType::kFloat32:
    case DType::kFloat16:
      return {kFloat, bits, 1};
    case DType::kInt32:
      return {kInt, bits, 1};
    case DType::kUint8:
    case DType::kUint16:
    case DType::kUint32:
      break;
  }
  return {kUInt, bits, 1};
}

/// The exported tensor with what it points to; its deleter deletes it.
template <class Managed>
struct Export {
  Buffer buffer;
  std::vector<std::int64_t> shape, strides;
  Managed managed{};
};

template <class Managed>
py::capsule make_capsule(Buffer buffer, std::int32_t device_type, bool is_copied) {
  auto owned = std::make_unique<Export<Managed>>();
  owned->shape.assign(buffer.shape().begin(), buffer.shape().end());
  owned->strides.resize(owned->shape.size());
  std::int64_t stride = 1;
  for (std::size_t i = owned->shape.size(); i-- > 0;) {
    owned->strides[i] = stride;
    stride *= owned->shape[i];
  }

  DLTensor& tensor = owned->managed.tensor;
  const bool is_metal = device_type == kMetal;
  tensor.data = is_metal ? buffer.storage()->native_handle() : reinterpret_cast<void*>(buffer.address());
  tensor.byte_offset = is_metal ? buffer.offset() : 0;
  tensor.device = {device_type, 0};
  tensor.ndim = static_cast<std::int32_t>(owned->shape.size());
  tensor.dtype = dl_dtype(buffer.dtype());
  tensor.shape = owned->shape.data();
  tensor.strides = owned->strides.data();
  if constexpr (std::is_same_v<Managed, DLManagedTensorVersioned>) {
    owned->managed.version = {kMajorVersion, 0};
    owned->managed.flags = is_copied ? kIsCopied : 0;
  }
  owned->managed.deleter = [](Managed* managed) { delete static_cast<Export<Managed>*>(managed->manager); };
  owned->buffer = std::move(buffer);
  owned->managed.manager = owned.get();

  // A capsule that was consumed has another name, and its consumer calls the deleter.
  py::capsule capsule(&owned->managed, Managed::kName, [](PyObject* raw) {
    if (PyCapsule_IsValid(raw, Managed::kName) == 0) return;
    auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(raw, Managed::kName));
    managed->deleter(managed);
  });
  owned.release();
  return capsule;
}

[[noreturn]] void refuse(const std::string& rule, const py::handle& value) {
  // What the protocol asks for: consumers know it and try another way.
  throw py::buffer_error("Buffer.__dlpack__: " + rule + ", got " + std::string(py::repr(value)));
}

std::int32_t requested_device(const Buffer& buffer, const py::object& dl_device) {
  const std::string backend = buffer.device()->backend();
  if (dl_device.is_none()) return backend == "cuda" ? kCuda : kCpu;
  if (dl_device.equal(py::make_tuple(int{kCpu}, 0))) return kCpu;
  if (backend == "metal" && dl_device.equal(py::make_tuple(int{kMetal}, 0))) return kMetal;
  if (backend == "cuda" && dl_device.equal(py::make_tuple(int{kCuda}, 0))) return kCuda;
  refuse("dl_device must be None, (1, 0) or, for a buffer of a metal or cuda device, (8, 0) or (2, 0)", dl_device);
}

bool is_versioned(const py::object& max_version) {
  if (max_version.is_none()) return false;
  const bool is_pair = py::isinstance<py::sequence>(max_version) && py::len(max_version) == 2;
  const std::optional<std::int64_t> major = is_pair ? to_int64(max_version[py::int_(0)]) : std::nullopt;
  if (!major) refuse("max_version must be None or a pair of integers", max_version);
  return *major >= std::int64_t{kMajorVersion};
}

/// What `copy` asks for; none if it leaves that open.
std::optional<bool> requested_copy(const py::object& copy) {
  if (copy.is_none()) return std::nullopt;
  py::detail::make_caster<bool> flag;
  if (!flag.load(copy, /*convert=*/false)) refuse("copy must be None, True or False", copy);
  return py::detail::cast_op<bool>(flag);
}

/// The consumer's stream, as DLPack numbers them, waits for what the device has been given.
void order_stream(const Buffer& buffer, std::int32_t device_type, const py::object& stream) {
  constexpr std::int64_t kNoOrder = -1, kLegacyDefault = 1;
  if (device_type != kCuda) {
    if (!stream.is_none()) refuse("stream must be None", stream);
    return;
  }
  const std::optional<std::int64_t> number = stream.is_none() ? kLegacyDefault : to_int64(stream);
  if (number == kNoOrder) return;
  if (!number || *number <= 0) refuse("stream must be None, -1, 1, 2 or the address of a CUDA stream", stream);
  buffer.device()->release_to(static_cast<std::uintptr_t>(*number));
}

/// A copy on the device, or on the host where that is asked for of memory that it cannot reach.
Buffer copied(const Buffer& buffer, std::int32_t device_type) {
  if (device_type != kCpu || buffer.host() != nullptr) {
    const Buffer copy = buffer.device()->empty(buffer.dtype(), buffer.shape());
    copy.copy_from(buffer);
    return copy;
  }
  const Buffer copy = open_device("cpu")->empty(buffer.dtype(), buffer.shape());
  buffer.read(copy.host());
  return copy;
}

}  // namespace

py::capsule to_dlpack(const Buffer& buffer, const py::object& stream, const py::object& max_version,
                      const py::object& dl_device, const py::object& copy) {
  buffer.device()->check_usable("Buffer.__dlpack__");
  const std::int32_t device_type = requested_device(buffer, dl_device);
  const std::optional<bool> asked = requested_copy(copy);
  const bool versioned = is_versioned(max_version);
  order_stream(buffer, device_type, stream);
  const bool must_copy = device_type == kCpu && buffer.host() == nullptr;
  if (must_copy && !asked.value_or(true)) refuse("copy must not be False where the host cannot reach the memory", copy);
  const bool is_copied = must_copy || asked.value_or(false);
  Buffer exported = is_copied ? copied(buffer, device_type) : buffer;
  return versioned ? make_capsule<DLManagedTensorVersioned>(std::move(exported), device_type, is_copied)
                   : make_capsule<DLManagedTensor>(std::move(exported), device_type, is_copied);
}

}  // namespace tq_hb
