// What the files of the extension module share.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <thread>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/device.h"
#include "core/error.h"

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
void bind_device(py::module_& module);
void bind_dlpack(py::module_& module);

/// A Python integer in [0, 2^32), or InvalidArgument naming `field`.
std::uint32_t to_uint32(const std::string& op, const std::string& field, const py::handle& value);
/// A Python number as float32, or InvalidArgument naming `field`.
float to_float32(const std::string& op, const std::string& field, const py::handle& value);

py::dtype numpy_dtype(DType dtype);
DType dtype_of(const std::string& op, const std::string& field, const py::dtype& dtype);

}  // namespace tq_hb
