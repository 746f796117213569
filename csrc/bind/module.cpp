// The extension module tq_hb._core: tables, thread settings and the bindings of the other files.

#include "bind/bind.h"
#include "core/bits.h"
#include "core/codebook.h"
#include "core/codec.h"
#include "core/params.h"
#include "cpu/device.h"

namespace tq_hb {
namespace {

py::array_t<float> copy(const float* values, std::size_t count) {
  return py::array_t<float>(static_cast<py::ssize_t>(count), values);
}

/// Index of the first row of a float32 (..., D) array that cannot be used, or -1.
///
/// `as_query` rows only have to be finite; others also need norms that fit in float32.
std::int64_t first_bad_row(const py::array_t<float, py::array::c_style>& rows, bool as_query) {
  const auto head_dim = static_cast<std::size_t>(rows.shape(rows.ndim() - 1));
  const auto count = static_cast<std::int64_t>(rows.size()) / static_cast<std::int64_t>(head_dim);
  const float* values = rows.data();
  const ReleasedGil released;
  for (std::int64_t row = 0; row < count; ++row, values += head_dim) {
    if (!(as_query ? is_finite_row(values, head_dim) : is_encodable_row(values, head_dim))) return row;
  }
  return -1;
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

  module.def("first_bad_row", &first_bad_row, py::arg("rows").noconvert(), py::arg("as_query"));
  module.def("bad_row_message", &bad_row_message);

  module.def("cpu_isa", &cpu_isa);
  module.def("num_threads", &cpu_num_threads);
  module.def("set_num_threads", &set_cpu_num_threads, py::call_guard<ReleasedGil>());
}
