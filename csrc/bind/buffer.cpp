// Buffer as a Python class, and numpy arrays as buffers.

#include "core/buffer.h"

#include <utility>

#include "bind/bind.h"
#include "bind/dlpack.h"
#include "core/layout.h"

namespace tq_hb {
namespace {

constexpr std::pair<DType, const char*> kDtypes[] = {{DType::kFloat32, "f4"}, {DType::kFloat16, "f2"},
                                                     {DType::kUint8, "u1"},   {DType::kUint16, "u2"},
                                                     {DType::kUint32, "u4"},  {DType::kInt32, "i4"}};

/// A numpy view of the buffer that keeps it alive, or a read-only copy where the host cannot reach its memory.
py::array to_numpy(const py::object& self) {
  const Buffer& buffer = self.cast<const Buffer&>();
  buffer.device()->check_usable("Buffer.numpy");
  const std::vector<py::ssize_t> shape(buffer.shape().begin(), buffer.shape().end());
  if (buffer.host() != nullptr) return py::array(numpy_dtype(buffer.dtype()), shape, buffer.host(), self);
  py::array copy(numpy_dtype(buffer.dtype()), shape);
  void* target = copy.mutable_data();
  {
    const ReleasedGil released;
    buffer.read(target);
  }
  copy.attr("flags").attr("writeable") = false;
  return copy;
}

/// Overwrites the buffer with an array or another buffer of the same dtype and shape.
void copy_from(const Buffer& buffer, const py::object& x) {
  const std::string op = "Buffer.copy_from";
  buffer.device()->check_usable(op);
  if (py::isinstance<Buffer>(x) && x.cast<const Buffer&>().device() == buffer.device()) {
    const Buffer source = x.cast<const Buffer&>();
    const ReleasedGil released;
    buffer.copy_from(source);
    return;
  }
  const py::array array = py::isinstance<Buffer>(x) ? to_numpy(x) : py::array::ensure(x, py::array::c_style);
  if (!array) {
    PyErr_Clear();
    throw invalid(op, "x", "must be a Buffer or a numpy array", std::string(py::str(py::type::of(x))));
  }
  if (!array.dtype().equal(numpy_dtype(buffer.dtype()))) {
    throw invalid(op, "x", std::string("must have dtype ") + name_of(buffer.dtype()),
                  std::string(py::str(array.dtype())));
  }
  if (shape_of(array) != buffer.shape()) {
    throw invalid(op, "x", "must have shape " + to_string(buffer.shape()), to_string(shape_of(array)));
  }
  const void* source = array.data();
  const ReleasedGil released;
  buffer.write(source);
}

py::buffer_info to_buffer_info(const Buffer& buffer) {
  buffer.device()->check_usable("Buffer");
  if (buffer.host() == nullptr) throw py::buffer_error("Buffer: the host cannot reach this memory; use numpy()");
  const std::vector<py::ssize_t> shape(buffer.shape().begin(), buffer.shape().end());
  const py::dtype dtype = numpy_dtype(buffer.dtype());
  std::vector<py::ssize_t> strides(shape.size());
  py::ssize_t stride = dtype.itemsize();
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i];
  }
  return py::buffer_info(buffer.host(), dtype.itemsize(), std::string(1, dtype.char_()),
                         static_cast<py::ssize_t>(shape.size()), shape, strides);
}

/// What numba, cupy and others read; other devices have no such attribute.
py::dict cuda_array_interface(const Buffer& buffer) {
  buffer.device()->check_usable("Buffer.__cuda_array_interface__");
  if (buffer.device()->backend() != "cuda") {
    throw py::attribute_error("Buffer: only a buffer of a cuda device has a __cuda_array_interface__");
  }
  py::dict interface;
  interface["shape"] = py::tuple(py::cast(buffer.shape()));
  interface["typestr"] = numpy_dtype(buffer.dtype()).attr("str");
  interface["data"] = py::make_tuple(buffer.nbytes() == 0 ? 0 : buffer.address(), false);
  interface["version"] = 3;
  interface["strides"] = py::none();
  interface["stream"] = 1;  // the legacy default stream, which waits for the device's own
  return interface;
}

/// One integer or several.
Shape to_shape(const std::string& op, const py::object& value) {
  const auto refusal = [&] {
    return invalid(op, "shape", "must be an integer from 0 to 9223372036854775807 or a tuple of them",
                   std::string(py::repr(value)));
  };
  PyObject* extents = to_int64(value) ? PyTuple_Pack(1, value.ptr()) : PySequence_Tuple(value.ptr());
  if (extents == nullptr) {
    if (PyErr_ExceptionMatches(PyExc_Exception) == 0) throw py::error_already_set();
    PyErr_Clear();
    throw refusal();
  }
  Shape shape;
  for (const py::handle& item : py::reinterpret_steal<py::tuple>(extents)) {
    const std::optional<std::int64_t> extent = to_int64(item);
    if (!extent || *extent < 0) throw refusal();
    shape.push_back(static_cast<std::uint64_t>(*extent));
  }
  return shape;
}

Buffer get_item(const Buffer& buffer, const py::object& key) {
  const std::uint64_t rows = buffer.shape().empty() ? 0 : buffer.shape()[0];
  if (py::isinstance<py::slice>(key)) {
    py::ssize_t start = 0, stop = 0, step = 0, length = 0;
    if (!key.cast<py::slice>().compute(static_cast<py::ssize_t>(rows), &start, &stop, &step, &length)) {
      throw py::error_already_set();
    }
    if (step != 1) throw invalid("Buffer", "slice", "must have step 1", step);
    const auto first = static_cast<std::uint64_t>(start);
    return buffer.slice(first, first + static_cast<std::uint64_t>(length));
  }
  py::ssize_t index = PyNumber_AsSsize_t(key.ptr(), PyExc_IndexError);
  if (index == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  const auto signed_rows = static_cast<py::ssize_t>(rows);
  if (index < -signed_rows || index >= signed_rows) {
    // Python's iteration protocol ends on IndexError.
    throw py::index_error("Buffer: index must lie in the first axis of " + std::to_string(rows) + ", got " +
                          std::to_string(index));
  }
  return buffer.row(static_cast<std::uint64_t>(index < 0 ? index + signed_rows : index));
}

/// The Buffer that an array is a view of, through any number of views; null if it is none.
const Buffer* viewed_buffer(const py::array& array) {
  py::object base = array;
  while (base && py::isinstance<py::array>(base)) base = py::reinterpret_borrow<py::array>(base).base();
  return base && py::isinstance<Buffer>(base) ? &base.cast<const Buffer&>() : nullptr;
}

}  // namespace

std::shared_ptr<void> hold(py::object object) {
  return std::shared_ptr<void>(object.release().ptr(), [](void* pointer) {
    take_gil([pointer] {
      const PyGILState_STATE state = PyGILState_Ensure();
      Py_DECREF(static_cast<PyObject*>(pointer));
      PyGILState_Release(state);
    });
  });
}

py::dtype numpy_dtype(DType dtype) {
  for (const auto& [known, name] : kDtypes) {
    if (known == dtype) return py::dtype(name);
  }
  throw Error(ErrorCode::kDevice, "Buffer: a dtype without a numpy counterpart");
}

DType dtype_of(const std::string& op, const std::string& field, const py::dtype& dtype) {
  // numpy spells the native order in two ways.
  constexpr char kNative = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? '<' : '>';
  const char order = dtype.byteorder();
  const bool is_native = order == '=' || order == '|' || order == kNative;
  for (const auto& [known, name] : kDtypes) {
    if (is_native && dtype.kind() == name[0] && dtype.itemsize() == name[1] - '0') return known;
  }
  throw invalid(op, field, "must have dtype float32, float16, uint8, uint16, uint32 or int32",
                std::string(py::str(dtype)));
}

Shape shape_of(const py::array& array) {
  Shape shape;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) shape.push_back(static_cast<std::uint64_t>(array.shape(i)));
  return shape;
}

std::optional<Buffer> wrap(const Device& device, const std::string& op, const std::string& field,
                           const py::array& array) {
  if ((array.flags() & py::array::c_style) == 0) throw invalid(op, field, "must be C-contiguous", "a strided array");
  const DType dtype = dtype_of(op, field, array.dtype());
  auto* data = static_cast<std::byte*>(const_cast<void*>(array.data()));
  if (array.size() > 0 && reinterpret_cast<std::uintptr_t>(data) % size_of(dtype) != 0) {
    throw invalid(op, field, std::string("must be aligned for ") + name_of(dtype), static_cast<const void*>(data));
  }
  if (array.size() == 0) return device.empty(dtype, shape_of(array));
  const Buffer* viewed = viewed_buffer(array);
  if (viewed != nullptr && viewed->device() == &device && viewed->host() != nullptr) {
    const auto offset = static_cast<std::uint64_t>(data - viewed->storage()->host());
    if (offset % kRowAlignment == 0) return Buffer(viewed->storage(), dtype, shape_of(array), offset);
  }
  auto storage = device.wrap_host(data, static_cast<std::uint64_t>(array.nbytes()), hold(array));
  if (storage == nullptr) return std::nullopt;
  return Buffer(std::move(storage), dtype, shape_of(array));
}

Buffer copy_in(const Device& device, const std::string& op, const std::string& field, const py::array& array) {
  const Buffer buffer = device.empty(dtype_of(op, field, array.dtype()), shape_of(array));
  if (buffer.nbytes() == 0) return buffer;
  const py::array contiguous = py::array::ensure(array, py::array::c_style);
  const void* source = contiguous.data();
  const ReleasedGil released;
  buffer.write(source);
  return buffer;
}

void bind_buffer(py::module_& module) {
  py::class_<Buffer>(module, "Buffer", py::buffer_protocol(),
                     "Memory of a device: bytes with a dtype and a shape, C-contiguous.\n\n"
                     "Slices of the first axis share storage; so does the array that numpy() returns.\n\n"
                     ">>> import numpy as np, tq_hb\n>>> buf = tq_hb.Device(\"cpu\").empty((4, 2), np.float32)\n"
                     ">>> buf[1:3].numpy()[:] = 1\n>>> buf.numpy().sum(axis=1).tolist()\n[0.0, 2.0, 2.0, 0.0]")
      .def_property_readonly(
          "shape", [](const Buffer& self) { return py::tuple(py::cast(self.shape())); },
          "Extent of each axis.\n\n"
          ">>> import tq_hb\n>>> tq_hb.Device(\"cpu\").empty((4, 2)).shape\n(4, 2)")
      .def_property_readonly(
          "dtype", [](const Buffer& self) { return numpy_dtype(self.dtype()); },
          "numpy dtype.\n\n"
          ">>> import numpy as np, tq_hb\n>>> tq_hb.Device(\"cpu\").empty(3, np.uint8).dtype\ndtype('uint8')")
      .def_property_readonly(
          "ndim", [](const Buffer& self) { return self.shape().size(); },
          "Number of axes.\n\n>>> import tq_hb\n>>> tq_hb.Device(\"cpu\").empty((4, 2)).ndim\n2")
      .def(
          "reshape",
          [](const Buffer& self, const py::object& shape) { return self.reshape(to_shape("Buffer.reshape", shape)); },
          py::arg("shape"),
          "The same memory with other axes, of the same size in all.\n\n"
          ">>> import tq_hb\n>>> tq_hb.Device(\"cpu\").empty((4, 2)).reshape((1, 8))\n"
          "Buffer(shape=(1, 8), dtype=float32)")
      .def_property_readonly("nbytes", &Buffer::nbytes,
                             "Bytes of the array.\n\n"
                             ">>> import tq_hb\n>>> tq_hb.Device(\"cpu\").empty((4, 2)).nbytes\n32")
      .def_property_readonly("offset", &Buffer::offset,
                             "Bytes from the start of the shared storage.\n\n"
                             ">>> import tq_hb\n>>> tq_hb.Device(\"cpu\").empty((4, 2))[1:].offset\n8")
      .def("numpy", &to_numpy,
           "The same memory as a numpy array; of a cuda device, whose memory the host cannot reach, a read-only copy.\n"
           "Ops that are still running may be writing to it.\n\n"
           ">>> import tq_hb\n>>> buf = tq_hb.Device(\"cpu\").empty(3)\n>>> buf.numpy()[1] = 5\n"
           ">>> buf.numpy().tolist()\n[0.0, 5.0, 0.0]")
      .def("copy_from", &copy_from, py::arg("x"),
           "Overwrite the contents with those of a Buffer or a numpy array of the same dtype and shape.\n\n"
           ">>> import numpy as np, tq_hb\n>>> buf = tq_hb.Device(\"cpu\").empty((4, 2))\n"
           ">>> buf[1].copy_from(np.array([3, 4], np.float32))\n>>> buf[0].copy_from(buf[1])\n"
           ">>> buf.numpy()[:2].tolist()\n[[3.0, 4.0], [3.0, 4.0]]")
      .def("__len__",
           [](const Buffer& self) {
             if (self.shape().empty()) throw py::type_error("a Buffer without axes has no len()");
             return self.shape()[0];
           })
      .def("__getitem__", &get_item)
      .def("__dlpack__", &to_dlpack, py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
           py::arg("dl_device") = py::none(), py::arg("copy") = py::none(),
           "DLPack capsule of the memory as the host sees it; with ``dl_device=(8, 0)``, of the Metal buffer itself.\n"
           "Of a cuda device: of the GPU's memory, after which ``stream`` waits, or with ``dl_device=(1, 0)`` of a "
           "copy.")
      .def(
          "__dlpack_device__",
          [](const Buffer& self) {
            return py::make_tuple(self.host() != nullptr ? int{dlpack::kCpu} : int{dlpack::kCuda}, 0);
          },
          "(2, 0), the GPU, on a cuda device; elsewhere (1, 0), the host: there the memory is shared, and every "
          "library can read it.")
      .def_property_readonly("__cuda_array_interface__", &cuda_array_interface)
      .def("__repr__",
           [](const Buffer& self) {
             return "Buffer(shape=" + to_string(self.shape()) + ", dtype=" + name_of(self.dtype()) + ")";
           })
      .def_buffer(&to_buffer_info);

  module.def(
      "copy_beside",
      [](const Buffer& buffer, const std::string& op, const std::string& field, const py::array& array) {
        return copy_in(*buffer.device(), op, field, array);
      },
      py::arg("buffer"), py::arg("op"), py::arg("field"), py::arg("array"));
}

}  // namespace tq_hb
