// Borrowing another library's array through DLPack.
//
// numpy's own importer knows no bfloat16, no Metal buffers, and refuses read-only arrays of older
// producers, so the capsule is read here.

#include <utility>

#include "bind/bind.h"
#include "bind/dlpack.h"
#include "registry.h"

namespace tq_hb {
namespace {

using namespace dlpack;

/// Releases the producer's array when what was made of it goes away.
template <class Managed>
py::capsule keep(Managed* managed) {
  return py::capsule(managed, [](void* pointer) {
    auto* owned = static_cast<Managed*>(pointer);
    if (owned->deleter != nullptr) owned->deleter(owned);
  });
}

std::string describe(const DLDataType& dtype) {
  const std::string bits = std::to_string(dtype.bits);
  switch (dtype.code) {
    case kBfloat:
      return "bfloat" + bits;
    case kComplex:
      return "complex" + bits;
    case kBool:
      return "bool";
    default:
      return "a dtype with DLPack's type code " + std::to_string(dtype.code) + " and " + bits + " bits";
  }
}

/// numpy's name for the dtype; bfloat16, which numpy lacks, is seen as uint16. One without a name breaks `rule`.
py::dtype numpy_dtype(const std::string& op, const std::string& field, const std::string& rule,
                      const DLDataType& dtype) {
  const bool whole_bytes =
      dtype.lanes == 1 && dtype.bits >= 8 && dtype.bits <= 64 && (dtype.bits & (dtype.bits - 1)) == 0;
  const char* kind = nullptr;
  if (dtype.code == kInt) kind = "i";
  if (dtype.code == kUInt || (dtype.code == kBfloat && dtype.bits == 16)) kind = "u";
  if (dtype.code == kFloat && dtype.bits >= 16) kind = "f";
  if (kind == nullptr || !whole_bytes) {
    throw invalid(op, field, rule, describe(dtype));
  }
  return py::dtype(kind + std::to_string(dtype.bits / 8));
}

void check_device(const std::string& op, const std::string& field, std::int32_t device_type) {
  if (device_type != kCpu && device_type != kCudaHost && device_type != kMetal) {
    throw invalid(op, field, "must be in host memory or on the call's device; move it to the cpu first",
                  "DLPack device type " + std::to_string(device_type));
  }
}

/// The memory of an id<MTLBuffer>.
std::shared_ptr<Storage> borrow_metal(const std::string& op, const std::string& field, void* handle, py::object owner) {
  try {
    return open_device("metal")->wrap_native(handle, hold(std::move(owner)));
  } catch (const Error& error) {
    throw invalid(op, field, "must be a Metal buffer that can be used here; move it to the cpu first", error.what());
  }
}

struct HostMemory {
  std::byte* data;
  py::object owner;
};

/// Where the host finds the tensor's first element.
///
/// The owner of a Metal buffer's memory is a Buffer over all of it, by which wrap() knows the memory again.
HostMemory host_memory(const std::string& op, const std::string& field, const DLTensor& tensor, py::object owner) {
  if (tensor.device.type != kMetal)
    return {static_cast<std::byte*>(tensor.data) + tensor.byte_offset, std::move(owner)};
  const std::shared_ptr<Storage> storage = borrow_metal(op, field, tensor.data, std::move(owner));
  return {storage->host() + tensor.byte_offset, py::cast(Buffer(storage, DType::kUint8, {storage->size()}))};
}

py::tuple view(const std::string& op, const std::string& field, const std::string& rule, const DLTensor& tensor,
               bool read_only, const py::capsule& owner) {
  check_device(op, field, tensor.device.type);
  if (tensor.ndim < 0) throw invalid(op, field, "must have a number of axes >= 0", tensor.ndim);
  const py::dtype dtype = numpy_dtype(op, field, rule, tensor.dtype);
  std::vector<py::ssize_t> shape(tensor.shape, tensor.shape + tensor.ndim);
  std::vector<py::ssize_t> strides(shape.size());
  py::ssize_t contiguous = dtype.itemsize();
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides[i] = tensor.strides != nullptr ? tensor.strides[i] * dtype.itemsize() : contiguous;
    contiguous *= shape[i];
  }
  const HostMemory memory = host_memory(op, field, tensor, owner);
  py::array array(dtype, shape, strides, memory.data, memory.owner);
  if (read_only) array.attr("flags").attr("writeable") = false;
  return py::make_tuple(array, tensor.dtype.code == kBfloat);
}

/// Calls __dlpack__ for a versioned capsule, which can say "read-only", where the producer knows that.
py::object call_dlpack(const py::object& producer, py::dict keywords) {
  const py::object method = producer.attr("__dlpack__");
  const py::dict versioned = keywords.attr("copy")();
  versioned["max_version"] = py::make_tuple(int{kMajorVersion}, 0);
  try {
    return method(**versioned);
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return method(**keywords);
}

py::object export_capsule(const std::string& op, const std::string& field, const py::object& producer) {
  // A producer on a Metal device may still hand out a host pointer, as mlx does: the capsule decides.
  const py::tuple device = producer.attr("__dlpack_device__")();
  check_device(op, field, py::int_(device[0]).cast<std::int32_t>());
  return call_dlpack(producer, py::dict());
}

/// Takes the tensor out of a capsule.
template <class Managed>
Managed* consume(PyObject* capsule) {
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, Managed::kName));
  PyCapsule_SetName(capsule, Managed::kUsedName);
  return managed;
}

struct Consumed {
  const DLTensor& tensor;
  bool is_read_only;
  py::capsule owner;
};

Consumed consume_capsule(const std::string& op, const std::string& field, const py::object& capsule) {
  PyObject* raw = capsule.ptr();
  if (PyCapsule_IsValid(raw, DLManagedTensorVersioned::kName) != 0) {
    auto* managed = consume<DLManagedTensorVersioned>(raw);
    py::capsule owner = keep(managed);
    if (managed->version.major != kMajorVersion) {
      throw invalid(op, field, "must speak DLPack 1", "version " + std::to_string(managed->version.major));
    }
    return {managed->tensor, (managed->flags & kReadOnly) != 0, std::move(owner)};
  }
  if (PyCapsule_IsValid(raw, DLManagedTensor::kName) == 0) {
    throw invalid(op, field, "must export a DLPack capsule that nobody has consumed", std::string(py::repr(capsule)));
  }
  auto* managed = consume<DLManagedTensor>(raw);
  return {managed->tensor, false, keep(managed)};
}

constexpr const char* kRule = "must be readable through DLPack";

/// Calls `read`; whatever Python code throws in it is the array's fault, unless memory has run out.
template <class Read>
auto blaming(const std::string& op, const std::string& field, const Read& read) {
  try {
    return read();
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;  // KeyboardInterrupt and its like
    const std::string reason = py::str(error.value());
    if (error.matches(PyExc_MemoryError)) {
      throw Error(ErrorCode::kOutOfMemory, op + ": " + field + " could not be read: " + reason);
    }
    throw invalid(op, field, kRule, reason);
  } catch (const py::cast_error&) {
    throw invalid(op, field, kRule, "a device type that is no 32-bit integer");
  }
}

/// (numpy view, whether its uint16 values are bfloat16 bits) of an array that speaks DLPack.
py::tuple from_dlpack(const std::string& op, const std::string& field, const py::object& producer,
                      const std::string& rule) {
  return blaming(op, field, [&] {
    const Consumed consumed = consume_capsule(op, field, export_capsule(op, field, producer));
    return view(op, field, rule, consumed.tensor, consumed.is_read_only, consumed.owner);
  });
}

Buffer buffer_at(const Device& device, const std::string& op, const std::string& field, std::uintptr_t address,
                 const py::dtype& dtype, const Shape& shape, py::object owner) {
  const DType kind = dtype_of(op, field, dtype);
  std::shared_ptr<Storage> storage = device.wrap_address(address, checked_nbytes(kind, shape), hold(std::move(owner)));
  if (storage == nullptr) throw invalid(op, field, "must be in host memory", "an array on a GPU");
  return Buffer(std::move(storage), kind, shape);
}

/// Of an array that has only __cuda_array_interface__.
Buffer borrow_interface(const Device& device, const std::string& op, const std::string& field,
                        const py::object& producer) {
  const py::dict interface = producer.attr("__cuda_array_interface__");
  if (interface.contains("strides") && !interface["strides"].is_none()) {
    throw invalid(op, field, "must be C-contiguous", "strides " + std::string(py::str(interface["strides"])));
  }
  const auto address = py::tuple(interface["data"])[0].cast<std::uintptr_t>();
  return buffer_at(device, op, field, address, py::dtype::from_args(interface["typestr"]),
                   interface["shape"].cast<Shape>(), producer);
}

}  // namespace

Buffer borrow(const Device& device, const std::string& op, const std::string& field, const py::object& producer,
              std::int64_t stream) {
  return blaming(op, field, [&] {
    if (!py::hasattr(producer, "__dlpack__")) return borrow_interface(device, op, field, producer);
    py::dict keywords;
    keywords["stream"] = stream;
    const Consumed consumed = consume_capsule(op, field, call_dlpack(producer, keywords));
    const DLTensor& tensor = consumed.tensor;
    if (tensor.device.type != kCuda || tensor.device.id != 0) {
      throw invalid(
          op, field, "must be on the GPU that the call runs on, cuda:0",
          "DLPack device (" + std::to_string(tensor.device.type) + ", " + std::to_string(tensor.device.id) + ")");
    }
    const Shape shape(tensor.shape, tensor.shape + tensor.ndim);
    std::int64_t contiguous = 1;
    for (std::size_t i = shape.size(); i-- > 0;) {
      if (tensor.strides != nullptr && shape[i] > 1 && tensor.strides[i] != contiguous) {
        throw invalid(op, field, "must be C-contiguous", "strides that are not");
      }
      contiguous *= tensor.shape[i];
    }
    const std::string rule = "must have a dtype that buffers have";
    if (tensor.dtype.code == kBfloat) throw invalid(op, field, rule, describe(tensor.dtype));
    const auto address = reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset;
    return buffer_at(device, op, field, address, numpy_dtype(op, field, rule, tensor.dtype), shape, consumed.owner);
  });
}

void bind_dlpack_import(py::module_& module) {
  module.def("from_dlpack", &from_dlpack, py::arg("op"), py::arg("field"), py::arg("producer"), py::arg("rule"));
}

}  // namespace tq_hb
