#include "core/ops.h"

#include "core/error.h"

namespace tq_hb {

Precision parse_precision(const std::string& op, const std::string& name) {
  for (const Precision precision : {Precision::kDefault, Precision::kStrict}) {
    if (name == name_of(precision)) return precision;
  }
  throw invalid(op, "precision", "must be one of default, strict", "'" + name + "'");
}

const char* name_of(Precision precision) noexcept {
  return precision == Precision::kStrict ? "strict" : "default";
}

const char* kernel_prefix(Fwht kind) noexcept {
  switch (kind) {
    case Fwht::kPremult:
      return "fwht_sign_premult_f32_d";
    case Fwht::kUndo:
      return "fwht_sign_undo_f32_d";
    case Fwht::kPlain:
      break;
  }
  return "fwht_standalone_f32_d";
}

Accesses accesses_of(const QuantizeOp& op) {
  Accesses accesses;
  for (const QuantizeTarget& target : op.targets) {
    accesses.reads.push_back(&target.src);
    accesses.writes.push_back(&target.packed);
    accesses.writes.push_back(&target.norms);
  }
  return accesses;
}

Accesses accesses_of(const DequantizeOp& op) {
  return {{&op.packed, &op.norms}, {&op.output}};
}

Accesses accesses_of(const AttendOp& op) {
  Accesses accesses{{&op.q, &op.k_packed, &op.k_norms, &op.v_packed, &op.v_norms}, {&op.output}};
  for (const std::optional<Buffer>* input : {&op.sinks, &op.score_bias}) {
    if (*input) accesses.reads.push_back(&**input);
  }
  for (const std::optional<Buffer>* output : {&op.tmp, &op.lse}) {
    if (*output) accesses.writes.push_back(&**output);
  }
  return accesses;
}

Accesses accesses_of(const FwhtOp& op) {
  return {{}, {&op.data}};
}

}  // namespace tq_hb
