// Device as a Python class.

#include "core/device.h"

#include "bind/bind.h"
#include "registry.h"

namespace tq_hb {

void bind_device(py::module_& module) {
  py::class_<Device, std::shared_ptr<Device>>(module, "Device")
      .def_property_readonly("name", &Device::name)
      .def_property_readonly("backend", &Device::backend)
      .def_property_readonly("is_simulated", &Device::is_simulated)
      .def_property_readonly("max_buffer_bytes", [](const Device& self) { return self.limits().max_buffer_bytes; })
      .def_property_readonly("num_threads", [](const Device& self) { return self.limits().num_threads; })
      .def_property_readonly("max_threadgroup_bytes",
                             [](const Device& self) { return self.limits().max_threadgroup_bytes; })
      .def_property_readonly("max_threads_per_threadgroup",
                             [](const Device& self) { return self.limits().max_threads_per_threadgroup; })
      .def_property_readonly("num_multiprocessors",
                             [](const Device& self) { return self.limits().num_multiprocessors; })
      .def(
          "offers",
          [](const Device& self, AttendKernel kernel, std::uint64_t head_dim, const std::string& packing,
             unsigned k_bits, unsigned v_bits) {
            return self.offers(kernel, head_dim, parse_packing("Device", packing), k_bits, v_bits);
          },
          py::arg("kernel"), py::arg("head_dim"), py::arg("packing"), py::arg("k_bits"), py::arg("v_bits"))
      .def(
          "empty",
          [](const Device& self, const Shape& shape, const py::dtype& dtype, const std::string& op,
             const std::string& field) { return self.empty(dtype_of(op, field, dtype), shape); },
          py::arg("shape"), py::arg("dtype"), py::arg("op"), py::arg("field"))
      .def("wrap", &wrap, py::arg("op"), py::arg("field"), py::arg("array"))
      .def("copy_in", &copy_in, py::arg("op"), py::arg("field"), py::arg("array"))
      .def("borrow", &borrow, py::arg("op"), py::arg("field"), py::arg("producer"), py::arg("stream"))
      .def("is_capturing", &Device::is_capturing, py::arg("stream"))
      .def("make_encoder", &Device::make_encoder, py::arg("auto_barrier") = false, py::arg("stream") = py::none())
      .def("warm_up", &Device::warm_up, py::arg("bits"), py::call_guard<ReleasedGil>());

  module.def("open_device", &open_device);
  module.def("backend_names", [] { return py::tuple(py::cast(backend_names())); });
  module.def("backend_statuses", [] {
    std::vector<std::tuple<std::string, std::shared_ptr<Device>, std::string>> rows;
    for (BackendStatus& status : backend_statuses()) rows.emplace_back(status.backend, status.device, status.reason);
    return rows;
  });
}

}  // namespace tq_hb
