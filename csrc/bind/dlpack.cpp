// Borrowing another library's array through DLPack.
//
// numpy's own importer knows no bfloat16 and refuses read-only arrays of older producers, so the
// capsule is read here: https://dmlc.github.io/dlpack/latest/c_api.html gives the layout.

#include <cstdint>

#include "bind/bind.h"

namespace tq_hb {
namespace {

struct DLDevice {
  std::int32_t type;
  std::int32_t id;
};
struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* manager;
  void (*deleter)(DLManagedTensor*);
};
struct DLManagedTensorVersioned {
  struct {
    std::uint32_t major, minor;
  } version;
  void* manager;
  void (*deleter)(DLManagedTensorVersioned*);
  std::uint64_t flags;
  DLTensor tensor;
};

constexpr std::int32_t kCpu = 1;
constexpr std::int32_t kCudaHost = 3;
constexpr std::uint64_t kReadOnly = 1;
enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

/// Releases the producer's array when the numpy view goes away.
template <class Managed>
py::capsule keep(Managed* managed) {
  return py::capsule(managed, [](void* pointer) {
    auto* owned = static_cast<Managed*>(pointer);
    if (owned->deleter != nullptr) owned->deleter(owned);
  });
}

std::string describe(const DLDataType& dtype) {
  return "type code " + std::to_string(dtype.code) + " of " + std::to_string(dtype.bits) + " bits";
}

/// numpy's name for the dtype; bfloat16, which numpy lacks, is seen as uint16.
py::dtype numpy_dtype(const std::string& op, const std::string& field, const DLDataType& dtype) {
  const bool whole_bytes =
      dtype.lanes == 1 && dtype.bits >= 8 && dtype.bits <= 64 && (dtype.bits & (dtype.bits - 1)) == 0;
  const char* kind = nullptr;
  if (dtype.code == kInt) kind = "i";
  if (dtype.code == kUInt || (dtype.code == kBfloat && dtype.bits == 16)) kind = "u";
  if (dtype.code == kFloat && dtype.bits >= 16) kind = "f";
  if (kind == nullptr || !whole_bytes) {
    throw invalid(op, field, "must have a float or integer dtype", describe(dtype));
  }
  return py::dtype(kind + std::to_string(dtype.bits / 8));
}

void check_host(const std::string& op, const std::string& field, std::int32_t device_type) {
  if (device_type != kCpu && device_type != kCudaHost) {
    throw invalid(op, field, "must be in host memory or on the call's device; move it to the cpu first",
                  "DLPack device type " + std::to_string(device_type));
  }
}

py::tuple view(const std::string& op, const std::string& field, const DLTensor& tensor, bool read_only,
               const py::capsule& owner) {
  check_host(op, field, tensor.device.type);
  if (tensor.ndim < 0) throw invalid(op, field, "must have a number of axes >= 0", tensor.ndim);
  const py::dtype dtype = numpy_dtype(op, field, tensor.dtype);
  std::vector<py::ssize_t> shape(tensor.shape, tensor.shape + tensor.ndim);
  std::vector<py::ssize_t> strides(shape.size());
  py::ssize_t contiguous = dtype.itemsize();
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides[i] = tensor.strides != nullptr ? tensor.strides[i] * dtype.itemsize() : contiguous;
    contiguous *= shape[i];
  }
  py::array array(dtype, shape, strides, static_cast<std::byte*>(tensor.data) + tensor.byte_offset, owner);
  if (read_only) array.attr("flags").attr("writeable") = false;
  return py::make_tuple(array, tensor.dtype.code == kBfloat);
}

/// The producer's capsule: versioned, which can say "read-only", where the producer knows that.
py::object export_capsule(const std::string& op, const std::string& field, const py::object& producer) {
  const py::tuple device = producer.attr("__dlpack_device__")();
  check_host(op, field, py::int_(device[0]).cast<std::int32_t>());
  try {
    return producer.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0));
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return producer.attr("__dlpack__")();
}

py::tuple view_capsule(const std::string& op, const std::string& field, const py::object& capsule) {
  PyObject* raw = capsule.ptr();
  if (PyCapsule_IsValid(raw, "dltensor_versioned") != 0) {
    auto* managed = static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(raw, "dltensor_versioned"));
    if (managed->version.major != 1) {
      throw invalid(op, field, "must speak DLPack 1", "version " + std::to_string(managed->version.major));
    }
    PyCapsule_SetName(raw, "used_dltensor_versioned");
    return view(op, field, managed->tensor, (managed->flags & kReadOnly) != 0, keep(managed));
  }
  if (PyCapsule_IsValid(raw, "dltensor") == 0) {
    throw invalid(op, field, "must export a DLPack capsule that nobody has consumed", std::string(py::repr(capsule)));
  }
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(raw, "dltensor"));
  PyCapsule_SetName(raw, "used_dltensor");
  return view(op, field, managed->tensor, false, keep(managed));
}

/// (numpy view, whether its uint16 values are bfloat16 bits) of an array that speaks DLPack.
py::tuple from_dlpack(const std::string& op, const std::string& field, const py::object& producer) {
  constexpr const char* kRule = "must be readable through DLPack";
  try {
    return view_capsule(op, field, export_capsule(op, field, producer));
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;  // KeyboardInterrupt and its like
    throw invalid(op, field, kRule, std::string(py::str(error.value())));
  } catch (const py::cast_error&) {
    throw invalid(op, field, kRule, "a device type that is no 32-bit integer");
  }
}

}  // namespace

void bind_dlpack(py::module_& module) {
  module.def("from_dlpack", &from_dlpack, py::arg("op"), py::arg("field"), py::arg("producer"));
}

}  // namespace tq_hb
