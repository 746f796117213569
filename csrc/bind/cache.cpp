// A cache's calls as one step of Python each: what happens for every token and layer has to be short.

#include <functional>
#include <tuple>
#include <utility>
#include <variant>

#include "bind/bind.h"
#include "core/codebook.h"
#include "core/encoder.h"

namespace tq_hb {
namespace {

/// How codes are stored and how exactly they are attended to: what all calls on a cache have in common.
struct CacheFormat {
  const Codebook* k_codebook;
  const Codebook* v_codebook;
  Packing packing;
  Precision precision;
};

CacheFormat make_format(const std::string& op, unsigned k_bits, unsigned v_bits, const std::string& codebook,
                        const std::string& packing, const std::string& precision) {
  const CodebookName name = parse_codebook_name(op, codebook);
  return {&find_codebook(op, name, k_bits), &find_codebook(op, name, v_bits), parse_packing(op, packing),
          parse_precision(op, precision)};
}

/// Codes and norms of one sequence.
struct CacheBuffers {
  Buffer k_packed, k_norms, v_packed, v_norms;
};

/// How the queries of one sequence are attended to.
struct AttendPlan {
  TqFlashAttnVecArgs args;
  AttendKernel kernel;
  unsigned head_tile;
  std::uint32_t query_position;  ///< of the last one
};

AttendPlan make_plan(const TqFlashAttnVecArgs& args, AttendKernel kernel, unsigned head_tile, unsigned nwg,
                     std::uint32_t query_position) {
  AttendPlan plan{args, kernel, head_tile, query_position};
  plan.args.nwg = nwg;
  return plan;
}

/// One that Python keeps alive during the call.
template <class T>
using Ref = std::reference_wrapper<const T>;

/// One sequence that is appended to: what errors call it, its place in the arrays, how many of its tokens are taken,
/// where the first of them goes, and into what.
using AppendRun = std::tuple<std::string, std::size_t, std::size_t, TqHadamardQuantizeArgs, Ref<CacheBuffers>>;

/// K and V have a leading axis if they are for several sequences.
void record_append(CommandEncoder& encoder, const CacheFormat& format, bool batched, const Buffer& k, const Buffer& v,
                   const std::vector<AppendRun>& runs) {
  const auto tokens_of = [&](const Buffer& all, std::size_t index, std::size_t count) {
    return (batched ? all.row(index) : all).slice(0, count);
  };
  for (const auto& [op, index, count, args, cache] : runs) {
    const CacheBuffers& to = cache;
    QuantizeOp record{op, args, {}, format.packing};
    record.targets.push_back({tokens_of(k, index, count), to.k_packed, to.k_norms, format.k_codebook, "k"});
    record.targets.push_back({tokens_of(v, index, count), to.v_packed, to.v_norms, format.v_codebook, "v"});
    encoder.hadamard_quantize(std::move(record));
  }
}

/// The arguments and results of an attention call, with a leading axis if they are for several sequences.
struct Arrays {
  Buffer q, output;
  std::optional<Buffer> sinks, score_bias, lse;
};

/// One sequence that is attended to: its place in the arrays, what it holds, and how.
using AttendRun = std::tuple<std::size_t, Ref<CacheBuffers>, Ref<AttendPlan>>;

/// What one of them has launched.
struct Launched {
  std::vector<Node> nodes;
  Precision precision;
};

std::vector<Launched> record_attention(CommandEncoder& encoder, const std::string& op, const CacheFormat& format,
                                       bool batched, const Arrays& arrays, const std::vector<AttendRun>& runs) {
  const auto of_sequence = [&](const Buffer& all, std::size_t index) { return batched ? all.row(index) : all; };
  const auto if_given = [&](const std::optional<Buffer>& all, std::size_t index) -> std::optional<Buffer> {
    return all ? std::optional(of_sequence(*all, index)) : std::nullopt;
  };
  std::vector<Launched> launched;
  for (const auto& [index, cache, planned] : runs) {
    const CacheBuffers& held = cache;
    const AttendPlan& plan = planned;
    AttendOp record;
    record.name = op;
    record.args = plan.args;
    record.q = of_sequence(arrays.q, index);
    record.k_packed = held.k_packed;
    record.k_norms = held.k_norms;
    record.v_packed = held.v_packed;
    record.v_norms = held.v_norms;
    record.output = of_sequence(arrays.output, index);
    record.k_codebook = format.k_codebook;
    record.v_codebook = format.v_codebook;
    record.packing = format.packing;
    record.precision = format.precision;
    record.fused_undo = true;
    record.sinks = arrays.sinks;
    record.score_bias = if_given(arrays.score_bias, index);
    record.lse = if_given(arrays.lse, index);
    record.query_position = plan.query_position;
    record.kernel = plan.kernel;
    record.head_tile = plan.head_tile;
    const std::size_t before = encoder.num_nodes();
    encoder.flash_attn_vec(std::move(record));
    launched.push_back({encoder.nodes(before), encoder.precision()});
  }
  return launched;
}

/// Arrays of the host as buffers of a device: their own memory where it can use that, else copies.
class HostArrays {
 public:
  HostArrays(const Device& device, const std::string& op) : device_(device), op_(op) {}

  Buffer read(const char* field, const py::array& array) const {
    std::optional<Buffer> buffer = wrap(device_, op_, field, array);
    return buffer ? *std::move(buffer) : copy_in(device_, op_, field, array);
  }
  Buffer write(const char* field, py::array& array) {
    if (std::optional<Buffer> buffer = wrap(device_, op_, field, array)) return *std::move(buffer);
    copies_.emplace_back(device_.empty(DType::kFloat32, shape_of(array)), array.mutable_data());
    return copies_.back().first;
  }
  /// Brings back what has been written to copies.
  void finish() const {
    for (const auto& [buffer, target] : copies_) buffer.read(target);
  }

 private:
  const Device& device_;
  const std::string& op_;
  std::vector<std::pair<Buffer, void*>> copies_;
};

void append(const Device& device, const std::string& op, const CacheFormat& format, bool batched, const py::array& k,
            const py::array& v, const std::vector<AppendRun>& runs) {
  const HostArrays host(device, op);
  const auto encoder = device.make_encoder();
  record_append(*encoder, format, batched, host.read("k", k), host.read("v", v), runs);
  const ReleasedGil released;
  encoder->commit();
  encoder->wait();
}

using ArrayOrBuffer = std::variant<Buffer, py::array>;

std::vector<Launched> attend(const Device& device, const std::string& op, const CacheFormat& format, bool batched,
                             const py::array_t<float, py::array::c_style>& q, py::array output,
                             const std::optional<ArrayOrBuffer>& sinks, const std::optional<py::array>& score_bias,
                             std::optional<py::array> lse, const std::vector<AttendRun>& runs) {
  require_queries(op, batched, q);
  if (runs.empty()) return {};
  HostArrays host(device, op);
  Arrays arrays{host.read("q", q), host.write("out", output), {}, {}, {}};
  if (sinks) {
    const auto* buffer = std::get_if<Buffer>(&*sinks);
    arrays.sinks = buffer != nullptr ? *buffer : host.read("sinks", std::get<py::array>(*sinks));
  }
  if (score_bias) arrays.score_bias = host.read("q", *score_bias);
  if (lse) arrays.lse = host.write("lse", *lse);
  const auto encoder = device.make_encoder();
  std::vector<Launched> launched = record_attention(*encoder, op, format, batched, arrays, runs);
  {
    const ReleasedGil released;
    encoder->commit();
    encoder->wait();
  }
  host.finish();
  return launched;
}

}  // namespace

void bind_cache(py::module_& module) {
  py::class_<CacheFormat>(module, "CacheFormat")
      .def(py::init(&make_format), py::arg("op"), py::arg("k_bits"), py::arg("v_bits"), py::arg("codebook"),
           py::arg("packing"), py::arg("precision"));
  py::class_<Launched>(module, "Launched")
      .def_property_readonly("nodes", [](const Launched& self) { return to_tuple(self.nodes); })
      .def_property_readonly("precision", [](const Launched& self) { return name_of(self.precision); });
  py::class_<CacheBuffers>(module, "CacheBuffers")
      .def(py::init([](const Buffer& k_packed, const Buffer& k_norms, const Buffer& v_packed, const Buffer& v_norms) {
             return CacheBuffers{k_packed, k_norms, v_packed, v_norms};
           }),
           py::arg("k_packed"), py::arg("k_norms"), py::arg("v_packed"), py::arg("v_norms"));
  py::class_<AttendPlan>(module, "AttendPlan")
      .def(py::init(&make_plan), py::arg("params"), py::arg("kernel"), py::arg("head_tile"), py::arg("nwg"),
           py::arg("query_position"));
  module.def("append", &append);
  module.def("record_append", &record_append);
  module.def("attend", &attend);
  module.def("record_attention", [](CommandEncoder& encoder, const std::string& op, const CacheFormat& format,
                                    bool batched, const Buffer& q, const Buffer& output,
                                    const std::optional<Buffer>& sinks, const std::optional<Buffer>& score_bias,
                                    const std::optional<Buffer>& lse, const std::vector<AttendRun>& runs) {
    return record_attention(encoder, op, format, batched, {q, output, sinks, score_bias, lse}, runs);
  });
}

}  // namespace tq_hb
