// What the files of the extension module share.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/device.h"
#include "core/encoder.h"

namespace tq_hb {

namespace py = pybind11;

/// Calls `take`, which takes the GIL.
///
/// While the interpreter shuts down, that ends a thread by unwinding it, which no destructor lets pass:
/// the thread waits here for the end of the process instead.
template <class Take>
void take_gil(const Take& take) noexcept {
  try {
    take();
  } catch (...) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

/// Lets other Python threads run while it lives.
class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ~ReleasedGil() {
    take_gil([this] { PyEval_RestoreThread(state_); });
  }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* state_;
};

void bind_errors(py::module_& module);
void bind_params(py::module_& module);
void bind_buffer(py::module_& module);
void bind_encoder(py::module_& module);
void bind_rows(py::module_& module);
void bind_cache(py::module_& module);
void bind_device(py::module_& module);
void bind_dlpack_import(py::module_& module);

/// A Python integer of 64 bits; none for any other object.
std::optional<std::int64_t> to_int64(const py::handle& value);
/// A Python integer in [0, 2^32), or InvalidArgument naming `field`.
std::uint32_t to_uint32(std::string_view op, std::string_view field, const py::handle& value);
/// A Python number as float32, or InvalidArgument naming `field`; so too where only float32 makes it infinite or 0.
float to_float32(std::string_view op, std::string_view field, const py::handle& value);

py::dtype numpy_dtype(DType dtype);
DType dtype_of(const std::string& op, const std::string& field, const py::dtype& dtype);

Shape shape_of(const py::array& array);

/// Throws if a query is not finite. They are (heads, D) or (queries, heads, D), behind the sequences if batched.
void require_queries(const std::string& op, bool batched, const py::array_t<float, py::array::c_style>& q);

/// (kind, kernel, threadgroups, threads, threadgroup_bytes) of everything that was encoded.
py::tuple to_tuple(const std::vector<Node>& nodes);

/// Keeps a Python object alive from C++; may be released on any thread.
std::shared_ptr<void> hold(py::object object);

/// The buffer over a C-contiguous numpy array's own memory; none where the device would have to copy.
std::optional<Buffer> wrap(const Device& device, const std::string& op, const std::string& field,
                           const py::array& array);
/// A new buffer of the device with the array's contents.
Buffer copy_in(const Device& device, const std::string& op, const std::string& field, const py::array& array);

/// A buffer over another library's C-contiguous array in the device's own memory; `stream` is what DLPack's protocol
/// calls that of the consumer. Throws where the array is elsewhere.
Buffer borrow(const Device& device, const std::string& op, const std::string& field, const py::object& producer,
              std::int64_t stream);

/// Buffer.__dlpack__.
py::capsule to_dlpack(const Buffer& buffer, const py::object& stream, const py::object& max_version,
                      const py::object& dl_device, const py::object& copy);

}  // namespace tq_hb
