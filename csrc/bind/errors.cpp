// The Python exceptions and what they are thrown from.

#include <new>

#include "bind/bind.h"

namespace tq_hb {
namespace {

PyObject* g_invalid_argument = nullptr;
PyObject* g_unsupported = nullptr;
PyObject* g_device = nullptr;
PyObject* g_out_of_memory = nullptr;

PyObject* make_exception(py::module_& module, const char* name, const char* doc, const py::object& bases) {
  const std::string qualified = std::string("tq_hb.") + name;
  PyObject* type = PyErr_NewExceptionWithDoc(qualified.c_str(), doc, bases.ptr(), nullptr);
  if (type == nullptr) throw py::error_already_set();
  module.attr(name) = py::handle(type);
  return type;
}

PyObject* class_of(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return g_invalid_argument;
    case ErrorCode::kUnsupported:
      return g_unsupported;
    case ErrorCode::kOutOfMemory:
      return g_out_of_memory;
    case ErrorCode::kDevice:
      break;
  }
  return g_device;
}

}  // namespace

void bind_errors(py::module_& module) {
  const auto base = [](PyObject* type) { return py::reinterpret_borrow<py::object>(type); };
  g_invalid_argument = make_exception(
      module, "InvalidArgument",
      "An argument breaks a rule. The message names the function, the argument, the rule and the value.\n\n"
      ">>> import tq_hb\n>>> tq_hb.codebook(7)\nTraceback (most recent call last):\n"
      "tq_hb.InvalidArgument: codebook: bits must be 5, 6 or 8, got 7",
      base(PyExc_ValueError));
  g_unsupported = make_exception(module, "UnsupportedError",
                                 "The arguments are right, but the backend does not offer this combination.\n\n"
                                 ">>> import tq_hb\n>>> issubclass(tq_hb.UnsupportedError, NotImplementedError)\nTrue",
                                 base(PyExc_NotImplementedError));
  g_device = make_exception(
      module, "DeviceError",
      "The device, its compiler or its driver failed, or an object of it was used at the wrong time.\n\n"
      ">>> import tq_hb\n>>> tq_hb.Device(\"cpu\").encoder().wait()\nTraceback (most recent call last):\n"
      "tq_hb.DeviceError: wait: the encoder has not been committed; call commit() first",
      base(PyExc_RuntimeError));
  g_out_of_memory =
      make_exception(module, "OutOfMemoryError",
                     "The device or the host has not enough memory.\n\n"
                     ">>> import tq_hb\n>>> issubclass(tq_hb.OutOfMemoryError, (tq_hb.DeviceError, MemoryError))\nTrue",
                     py::make_tuple(base(g_device), base(PyExc_MemoryError)));

  // Local: another extension's std::bad_alloc is none of ours.
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      PyErr_SetString(class_of(error.code()), error.what());
    } catch (const std::bad_alloc&) {
      PyErr_SetString(g_out_of_memory, "tq_hb: not enough memory");
    }
  });
}

}  // namespace tq_hb
