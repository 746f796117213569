// Device, Buffer and CommandEncoder as Python classes.

#include "core/device.h"

#include <cstring>
#include <utility>

#include "bind/bind.h"
#include "core/codec.h"
#include "core/params.h"
#include "registry.h"

namespace tq_hb {
namespace {

constexpr std::pair<DType, const char*> kDtypes[] = {{DType::kFloat32, "f4"}, {DType::kFloat16, "f2"},
                                                     {DType::kUint8, "u1"},   {DType::kUint16, "u2"},
                                                     {DType::kUint32, "u4"},  {DType::kInt32, "i4"}};

/// Keeps a Python object alive from C++; may be released on any thread.
std::shared_ptr<void> hold(py::object object) {
  return std::shared_ptr<void>(object.release().ptr(), [](void* pointer) {
    take_gil([pointer] {
      const PyGILState_STATE state = PyGILState_Ensure();
      Py_DECREF(static_cast<PyObject*>(pointer));
      PyGILState_Release(state);
    });
  });
}

/// A numpy view of the buffer that keeps it alive.
py::array to_numpy(const py::object& self) {
  const Buffer& buffer = self.cast<const Buffer&>();
  const std::vector<py::ssize_t> shape(buffer.shape().begin(), buffer.shape().end());
  return py::array(numpy_dtype(buffer.dtype()), shape, buffer.host(), self);
}

/// The buffer over a C-contiguous numpy array's own memory.
Buffer wrap(const Device& device, const std::string& op, const std::string& field, const py::array& array) {
  if ((array.flags() & py::array::c_style) == 0) throw invalid(op, field, "must be C-contiguous", "a strided array");
  Shape shape;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) shape.push_back(static_cast<std::uint64_t>(array.shape(i)));
  const DType dtype = dtype_of(op, field, array.dtype());
  auto* data = static_cast<std::byte*>(const_cast<void*>(array.data()));
  if (array.size() > 0 && reinterpret_cast<std::uintptr_t>(data) % size_of(dtype) != 0) {
    throw invalid(op, field, std::string("must be aligned for ") + name_of(dtype), static_cast<const void*>(data));
  }
  auto storage = device.wrap_host(data, static_cast<std::uint64_t>(array.nbytes()), hold(array));
  return Buffer(std::move(storage), dtype, std::move(shape));
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

void quantize(CommandEncoder& encoder, const std::string& op, const TqHadamardQuantizeArgs& args,
              const std::vector<std::tuple<std::string, Buffer, Buffer, Buffer, unsigned>>& targets,
              const std::string& codebook) {
  const CodebookName name = parse_codebook_name(op, codebook);
  QuantizeOp record{op, args, {}};
  for (const auto& [key, src, packed, norms, cbits] : targets) {
    record.targets.push_back({src, packed, norms, &find_codebook(op, name, cbits), key});
  }
  encoder.hadamard_quantize(std::move(record));
}

void dequantize(CommandEncoder& encoder, const std::string& op, const TqHadamardQuantizeArgs& args,
                std::uint64_t first_position, const Buffer& packed, const Buffer& norms, const Buffer& output,
                const std::string& codebook) {
  const CodebookName name = parse_codebook_name(op, codebook);
  encoder.dequantize({op, args, first_position, packed, norms, output, &find_codebook(op, name, args.codebook_bits)});
}

void attend(CommandEncoder& encoder, const std::string& op, const Buffer& q, const Buffer& k_packed,
            const Buffer& k_norms, const Buffer& v_packed, const Buffer& v_norms, const Buffer& output,
            const std::optional<Buffer>& tmp, const TqFlashAttnVecArgs& args, unsigned nwg, unsigned v_bits,
            const std::string& codebook, bool fused_undo) {
  const CodebookName name = parse_codebook_name(op, codebook);
  AttendOp record;
  record.name = op;
  record.args = args;
  record.args.nwg = nwg;
  record.q = q;
  record.k_packed = k_packed;
  record.k_norms = k_norms;
  record.v_packed = v_packed;
  record.v_norms = v_norms;
  record.output = output;
  record.tmp = tmp;
  record.k_codebook = &find_codebook(op, name, args.codebook_bits);
  record.v_codebook = &find_codebook(op, name, v_bits);
  record.fused_undo = fused_undo;
  encoder.flash_attn_vec(std::move(record));
}

/// Index of the first row of a contiguous float32 (rows, D) array that cannot be used, or -1.
///
/// `as_query` rows only have to be finite; others also need norms that fit in float32.
std::int64_t first_bad_row(const Buffer& rows, bool as_query) {
  const std::size_t head_dim = rows.shape().back();
  const float* data = rows.data<const float>();
  for (std::uint64_t row = 0; row < rows.size() / head_dim; ++row) {
    const float* values = data + row * head_dim;
    if (!(as_query ? is_finite_row(values, head_dim) : is_encodable_row(values, head_dim))) {
      return static_cast<std::int64_t>(row);
    }
  }
  return -1;
}

}  // namespace

py::dtype numpy_dtype(DType dtype) {
  for (const auto& [known, name] : kDtypes) {
    if (known == dtype) return py::dtype(name);
  }
  throw Error(ErrorCode::kDevice, "Buffer: a dtype without a numpy counterpart");
}

DType dtype_of(const std::string& op, const std::string& field, const py::dtype& dtype) {
  for (const auto& [known, name] : kDtypes) {
    if (dtype.equal(py::dtype(name))) return known;
  }
  throw invalid(op, field, "must have dtype float32, float16, uint8, uint16, uint32 or int32",
                std::string(py::str(dtype)));
}

void bind_device(py::module_& module) {
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
      .def_property_readonly("nbytes", &Buffer::nbytes,
                             "Bytes of the array.\n\n"
                             ">>> import tq_hb\n>>> tq_hb.Device(\"cpu\").empty((4, 2)).nbytes\n32")
      .def_property_readonly("offset", &Buffer::offset,
                             "Bytes from the start of the shared storage.\n\n"
                             ">>> import tq_hb\n>>> tq_hb.Device(\"cpu\").empty((4, 2))[1:].offset\n8")
      .def("numpy", &to_numpy,
           "The same memory as a numpy array.\n\n"
           ">>> import tq_hb\n>>> buf = tq_hb.Device(\"cpu\").empty(3)\n>>> buf.numpy()[1] = 5\n"
           ">>> buf.numpy().tolist()\n[0.0, 5.0, 0.0]")
      .def("__len__",
           [](const Buffer& self) {
             if (self.shape().empty()) throw py::type_error("a Buffer without axes has no len()");
             return self.shape()[0];
           })
      .def("__getitem__", &get_item)
      .def("__dlpack__",
           [](const py::object& self, const py::kwargs& kwargs) { return to_numpy(self).attr("__dlpack__")(**kwargs); })
      .def("__dlpack_device__", [](const py::object& self) { return to_numpy(self).attr("__dlpack_device__")(); })
      .def("__repr__",
           [](const Buffer& self) {
             return "Buffer(shape=" + to_string(self.shape()) + ", dtype=" + name_of(self.dtype()) + ")";
           })
      .def_buffer([](Buffer& self) {
        const std::vector<py::ssize_t> shape(self.shape().begin(), self.shape().end());
        const py::dtype dtype = numpy_dtype(self.dtype());
        std::vector<py::ssize_t> strides(shape.size());
        py::ssize_t stride = dtype.itemsize();
        for (std::size_t i = shape.size(); i-- > 0;) {
          strides[i] = stride;
          stride *= shape[i];
        }
        return py::buffer_info(self.host(), dtype.itemsize(), std::string(1, dtype.char_()),
                               static_cast<py::ssize_t>(shape.size()), shape, strides);
      });

  py::class_<CommandEncoder>(module, "CommandEncoder")
      .def("hadamard_quantize", &quantize)
      .def("dequantize", &dequantize)
      .def("flash_attn_vec", &attend)
      .def("fwht", [](CommandEncoder& self, const std::string& op, bool premult,
                      const Buffer& data) { self.fwht({op, premult ? Fwht::kPremult : Fwht::kUndo, data}); })
      .def("memory_barrier", &CommandEncoder::memory_barrier)
      .def("commit", &CommandEncoder::commit, py::call_guard<ReleasedGil>())
      .def("wait", &CommandEncoder::wait, py::call_guard<ReleasedGil>())
      .def_property_readonly("gpu_time", &CommandEncoder::gpu_time)
      .def_property_readonly("kernels", [](const CommandEncoder& self) { return py::tuple(py::cast(self.kernels())); });

  py::class_<Device, std::shared_ptr<Device>>(module, "Device")
      .def_property_readonly("name", &Device::name)
      .def_property_readonly("backend", &Device::backend)
      .def_property_readonly("is_simulated", &Device::is_simulated)
      .def_property_readonly("max_buffer_bytes", [](const Device& self) { return self.limits().max_buffer_bytes; })
      .def_property_readonly("num_threads", [](const Device& self) { return self.limits().num_threads; })
      .def(
          "empty",
          [](const Device& self, const Shape& shape, const py::dtype& dtype, const std::string& op,
             const std::string& field) { return self.empty(dtype_of(op, field, dtype), shape); },
          py::arg("shape"), py::arg("dtype"), py::arg("op"), py::arg("field"))
      .def("wrap", &wrap, py::arg("op"), py::arg("field"), py::arg("array"))
      .def("make_encoder", &Device::make_encoder);

  module.def("open_device", &open_device);
  module.def("backend_statuses", [] {
    std::vector<std::tuple<std::string, std::shared_ptr<Device>, std::string>> rows;
    for (BackendStatus& status : backend_statuses()) rows.emplace_back(status.backend, status.device, status.reason);
    return rows;
  });
  module.def("first_bad_row", &first_bad_row, py::call_guard<ReleasedGil>());
  module.def("bad_row_message", &bad_row_message);
}

}  // namespace tq_hb
