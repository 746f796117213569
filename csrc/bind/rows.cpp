// What is asked of a host's vectors before a call writes anything.

#include "bind/bind.h"
#include "core/codec.h"

namespace tq_hb {
namespace {

/// Throws if a row of (heads, D) or (tokens, heads, D) values breaks a rule. Returns what follows them.
const float* require(const std::string& op, const std::string& field, RowRule rule, const float* rows,
                     const Shape& shape) {
  const std::uint64_t head_dim = shape.back(), heads = shape.end()[-2];
  const std::uint64_t count = shape.size() > 2 ? shape.front() * heads : heads;
  for (std::uint64_t row = 0; row < count; ++row, rows += head_dim) {
    if (rule == RowRule::kFinite ? is_finite_row(rows, head_dim) : is_encodable_row(rows, head_dim)) continue;
    throw Error(ErrorCode::kInvalidArgument, bad_row_message(op, field, rule, row / heads, row % heads));
  }
  return rows;
}

using Rows = py::array_t<float, py::array::c_style>;

Shape shape_of_rows(const std::string& op, const std::string& field, const Rows& rows, std::size_t least_axes) {
  if (rows.ndim() < static_cast<py::ssize_t>(least_axes)) {
    throw invalid(op, field, "must have at least " + std::to_string(least_axes) + " axes", to_string(shape_of(rows)));
  }
  return shape_of(rows);
}

}  // namespace

void require_queries(const std::string& op, bool batched, const py::array_t<float, py::array::c_style>& q) {
  const Shape shape = shape_of_rows(op, "q", q, batched ? 3 : 2);
  const std::uint64_t sequences = batched ? shape.front() : 1;
  const Shape one(shape.begin() + (batched ? 1 : 0), shape.end());
  const float* rows = q.data();
  const ReleasedGil released;
  for (std::uint64_t i = 0; i < sequences; ++i) {
    rows = require(op, batched ? "q[" + std::to_string(i) + "]" : "q", RowRule::kFinite, rows, one);
  }
}

void bind_rows(py::module_& module) {
  module.def(
      "require_rows",
      [](const std::string& op, const std::string& field, const Rows& rows) {
        const Shape shape = shape_of_rows(op, field, rows, 2);
        const float* values = rows.data();
        const ReleasedGil released;
        require(op, field, RowRule::kEncodable, values, shape);
      },
      py::arg("op"), py::arg("field"), py::arg("rows").noconvert());
  module.def("require_queries", &require_queries, py::arg("op"), py::arg("batched"), py::arg("q").noconvert());
}

}  // namespace tq_hb
