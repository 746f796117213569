// CommandEncoder as a Python class.

#include "core/encoder.h"

#include <utility>

#include <pybind11/native_enum.h>

#include "bind/bind.h"
#include "core/codebook.h"

namespace tq_hb {
namespace {

void quantize(CommandEncoder& encoder, const std::string& op, const TqHadamardQuantizeArgs& args,
              const std::vector<std::tuple<std::string, Buffer, Buffer, Buffer, unsigned>>& targets,
              const std::string& codebook, const std::string& packing) {
  const CodebookName name = parse_codebook_name(op, codebook);
  QuantizeOp record{op, args, {}, parse_packing(op, packing)};
  for (const auto& [key, src, packed, norms, cbits] : targets) {
    record.targets.push_back({src, packed, norms, &find_codebook(op, name, cbits), key});
  }
  encoder.hadamard_quantize(std::move(record));
}

void dequantize(CommandEncoder& encoder, const std::string& op, const TqHadamardQuantizeArgs& args,
                std::uint64_t first_position, const Buffer& packed, const Buffer& norms, const Buffer& output,
                const std::string& codebook, const std::string& packing) {
  const CodebookName name = parse_codebook_name(op, codebook);
  encoder.dequantize({op, args, first_position, packed, norms, output, &find_codebook(op, name, args.codebook_bits),
                      parse_packing(op, packing)});
}

void attend(CommandEncoder& encoder, const std::string& op, const Buffer& q, const Buffer& k_packed,
            const Buffer& k_norms, const Buffer& v_packed, const Buffer& v_norms, const Buffer& output,
            const std::optional<Buffer>& tmp, const TqFlashAttnVecArgs& args, AttendKernel kernel, unsigned head_tile,
            unsigned nwg, unsigned v_bits, const std::string& codebook, bool fused_undo, const std::string& packing,
            const std::optional<std::uint32_t>& query_position, const std::optional<Buffer>& sinks,
            const std::optional<Buffer>& score_bias, const std::optional<Buffer>& lse, const std::string& precision) {
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
  record.packing = parse_packing(op, packing);
  record.precision = parse_precision(op, precision);
  record.fused_undo = fused_undo;
  record.query_position = query_position;
  record.sinks = sinks;
  record.score_bias = score_bias;
  record.lse = lse;
  record.kernel = kernel;
  record.head_tile = head_tile;
  encoder.flash_attn_vec(std::move(record));
}

const char* name_of(NodeKind kind) {
  switch (kind) {
    case NodeKind::kSdpa:
      return "sdpa";
    case NodeKind::kBarrier:
      return "barrier";
    case NodeKind::kOther:
      break;
  }
  return "other";
}

}  // namespace

py::tuple to_tuple(const std::vector<Node>& nodes) {
  const auto sizes = [](const Size3& size) { return py::make_tuple(size.width, size.height, size.depth); };
  py::list rows;
  for (const Node& node : nodes) {
    rows.append(py::make_tuple(name_of(node.kind), node.kernel, sizes(node.threadgroups), sizes(node.threads),
                               node.threadgroup_bytes));
  }
  return py::tuple(rows);
}

void bind_encoder(py::module_& module) {
  py::native_enum<AttendKernel>(module, "AttendKernel", "enum.Enum")
      .value("PER_HEAD", AttendKernel::kPerHead)
      .value("GROUP", AttendKernel::kGroup)
      .finalize();
  py::native_enum<Fwht>(module, "Fwht", "enum.Enum")
      .value("PREMULT", Fwht::kPremult)
      .value("UNDO", Fwht::kUndo)
      .value("PLAIN", Fwht::kPlain)
      .finalize();

  py::class_<CommandEncoder>(module, "CommandEncoder")
      .def("hadamard_quantize", &quantize, py::arg("op"), py::arg("hp"), py::arg("targets"), py::arg("codebook"),
           py::arg("packing") = "byte")
      .def("dequantize", &dequantize, py::arg("op"), py::arg("hp"), py::arg("first_position"), py::arg("packed"),
           py::arg("norms"), py::arg("output"), py::arg("codebook"), py::arg("packing") = "byte")
      .def("flash_attn_vec", &attend, py::arg("op"), py::arg("q"), py::arg("k_packed"), py::arg("k_norms"),
           py::arg("v_packed"), py::arg("v_norms"), py::arg("output"), py::arg("tmp"), py::arg("p"), py::arg("kernel"),
           py::arg("head_tile"), py::arg("nwg"), py::arg("v_bits"), py::arg("codebook"), py::arg("fused_undo"),
           py::arg("packing") = "byte", py::arg("query_position") = py::none(), py::arg("sinks") = py::none(),
           py::arg("score_bias") = py::none(), py::arg("lse") = py::none(), py::arg("precision") = "default")
      .def("fwht", [](CommandEncoder& self, const std::string& op, Fwht kind,
                      const Buffer& data) { self.fwht({op, kind, data}); })
      .def("memory_barrier", &CommandEncoder::memory_barrier)
      .def("commit", &CommandEncoder::commit, py::call_guard<ReleasedGil>())
      .def("wait", &CommandEncoder::wait, py::call_guard<ReleasedGil>())
      .def_property_readonly("is_done", &CommandEncoder::is_done)
      .def_property_readonly("gpu_time", &CommandEncoder::gpu_time)
      .def_property_readonly("kernels", [](const CommandEncoder& self) { return py::tuple(py::cast(self.kernels())); })
      .def_property_readonly("nodes", [](const CommandEncoder& self) { return to_tuple(self.nodes()); });
}

}  // namespace tq_hb
