// The extension module tq_hb._core: tables, thread settings and the bindings of the other files.

#include <algorithm>

#include "bind/bind.h"
#include "core/bits.h"
#include "core/codebook.h"
#include "core/codec.h"
#include "core/codec_constants.h"
#include "core/packing.h"
#include "core/params.h"
#include "cpu/device.h"

namespace tq_hb {
namespace {

py::array_t<float> copy(const float* values, std::size_t count) {
  return py::array_t<float>(static_cast<py::ssize_t>(count), values);
}

using Codes = py::array_t<std::uint8_t, py::array::c_style>;

/// Rows of codes from one layout into the other; `rows` is uint8 (n, row_bytes(source)).
Codes convert_packing(const std::string& op, const Codes& rows, unsigned cbits, std::size_t head_dim,
                      const std::string& source, const std::string& target) {
  check_head_dim(op, head_dim);
  find_codebook(op, CodebookName::kLloydMax, cbits);
  const Packing from = parse_packing(op, source);
  const Packing to = parse_packing(op, target);
  const std::size_t from_bytes = row_bytes(from, cbits, head_dim);
  const std::size_t to_bytes = row_bytes(to, cbits, head_dim);
  if (rows.ndim() != 2 || static_cast<std::size_t>(rows.shape(1)) != from_bytes) {
    throw invalid(op, "codes", "must have " + std::to_string(from_bytes) + " bytes per row", "another size");
  }
  const auto count = static_cast<std::size_t>(rows.shape(0));
  Codes result({count, to_bytes});
  const std::uint8_t* row = rows.data();
  std::uint8_t* converted = result.mutable_data();
  const ReleasedGil released;
  for (std::size_t i = 0; i < count; ++i, row += from_bytes, converted += to_bytes) {
    if (has_planes(from, cbits) == has_planes(to, cbits)) {
      std::copy_n(row, from_bytes, converted);
    } else if (has_planes(from, cbits)) {
      unpack_row(row, head_dim, cbits, converted);
    } else {
      pack_row(row, head_dim, cbits, converted);
    }
  }
  return result;
}

}  // namespace
}  // namespace tq_hb

PYBIND11_MODULE(_core, module) {
  using namespace tq_hb;
  module.doc() = "The C++ core of tq_hb. Use the tq_hb package; this module may change at any time.";
  bind_errors(module);
  bind_params(module);
  bind_buffer(module);
  bind_encoder(module);
  bind_rows(module);
  bind_cache(module);
  bind_device(module);
  bind_dlpack_import(module);

  module.def("to_uint32", &to_uint32);
  module.def("to_float32", &to_float32);
  module.def("check_head_dim", &check_head_dim);
  module.def("tmp_buffer_bytes", &tmp_buffer_bytes);
  module.def("supported_head_dims", [] {
    py::list sizes;
#define TQ_APPEND(size) sizes.append(size);
    TQ_HB_FOR_EACH_HEAD_DIM(TQ_APPEND)
#undef TQ_APPEND
    return py::tuple(sizes);
  });
  module.attr("GQA_MAX_TILE") = TQ_GQA_MAX_TILE;
  module.attr("GQA_MAX_SPLITS") = TQ_GQA_MAX_SPLITS;
  module.def("norms_per_row", &norms_per_row);
  module.def("row_bytes", [](const std::string& packing, unsigned cbits, std::uint64_t head_dim) {
    return row_bytes(parse_packing("row_bytes", packing), cbits, head_dim);
  });
  module.def("convert_packing", &convert_packing, py::arg("op"), py::arg("codes").noconvert(), py::arg("bits"),
             py::arg("head_dim"), py::arg("source"), py::arg("target"));
  module.def("codebook_names", [] { return py::tuple(py::cast(codebook_names())); });
  module.def("supported_bits", [] {
    py::list bits;
#define TQ_APPEND(cbits) bits.append(cbits);
    TQ_HB_FOR_EACH_CBITS(TQ_APPEND)
#undef TQ_APPEND
    return py::tuple(bits);
  });
  module.def("codebook", [](const std::string& op, unsigned cbits, const std::string& name) {
    const Codebook& table = find_codebook(op, parse_codebook_name(op, name), cbits);
    return py::make_tuple(copy(table.levels, table.num_levels()), copy(table.boundaries, table.num_levels() - 1));
  });
  module.def("signs", [](std::uint64_t head_dim) {
    check_head_dim("signs", head_dim);
    return copy(sign_table(), head_dim);
  });

  module.def("cpu_isa", &cpu_isa);
  module.def("cpu_isas", [] { return py::tuple(py::cast(cpu_isas())); });
  module.def("set_cpu_isa", &set_cpu_isa, py::arg("op"), py::arg("field"), py::arg("isa"));
  module.def("num_threads", &cpu_num_threads);
  module.def("set_num_threads", &set_cpu_num_threads, py::call_guard<ReleasedGil>());
}
