// The params structs as Python classes, made from the field lists of core/abi.h.

#include "core/params.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>
#include <variant>

#include "bind/bind.h"
#include "core/abi.h"

namespace tq_hb {

std::optional<std::int64_t> to_int64(const py::handle& value) {
  const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  const long long number = index ? PyLong_AsLongLong(index.ptr()) : 0;
  if (PyErr_Occurred() == nullptr) return number;
  if (PyErr_ExceptionMatches(PyExc_Exception) == 0) throw py::error_already_set();  // KeyboardInterrupt and its like
  PyErr_Clear();
  return std::nullopt;
}

std::uint32_t to_uint32(std::string_view op, std::string_view field, const py::handle& value) {
  const std::optional<std::int64_t> number = to_int64(value);
  if (!number || *number < 0 || *number > 0xFFFFFFFFll) {
    throw invalid(std::string(op), std::string(field), "must be an integer from 0 to 4294967295",
                  std::string(py::repr(value)));
  }
  return static_cast<std::uint32_t>(*number);
}

float to_float32(std::string_view op, std::string_view field, const py::handle& value) {
  const double number = PyFloat_AsDouble(value.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw invalid(std::string(op), std::string(field), "must be a number", std::string(py::repr(value)));
  }
  const float rounded = static_cast<float>(number);
  if (std::isfinite(number) && !std::isfinite(rounded)) {
    throw invalid(std::string(op), std::string(field), "must be finite in float32", number);
  }
  // 0 can mean something else altogether: as a softcap, none.
  if (number != 0.0 && rounded == 0.0f) {
    throw invalid(std::string(op), std::string(field), "must not round to 0 in float32", number);
  }
  return rounded;
}

namespace {

void store(const char* op, const char* field, TqU32& target, const py::handle& value) {
  target = to_uint32(op, field, value);
}
void store(const char* op, const char* field, TqF32& target, const py::handle& value) {
  target = to_float32(op, field, value);
}

/// One field that callers set.
template <class Args>
struct Field {
  const char* name;
  std::variant<TqU32 Args::*, TqF32 Args::*> member;
  bool is_required;
  const char* doc;
  PyObject* key = PyUnicode_InternFromString(name);  ///< as keyword arguments are spelt; lives as long as the process

  py::object get(const Args& args) const {
    return std::visit([&](auto pointer) { return py::cast(args.*pointer); }, member);
  }
  void set(const char* op, Args& args, const py::handle& value) const {
    std::visit([&](auto pointer) { store(op, name, args.*pointer, value); }, member);
  }
};

/// A params struct as Python sees it.
template <class Args>
struct Params {
  const char* name;
  const char* op;  ///< whose rules validate() checks
  Args defaults;
  std::vector<Field<Args>> fields;  ///< without the planned ones
};

#define TQ_FIELD(type, name, value, doc) {#name, &Args::name, false, doc},
#define TQ_REQUIRED(type, name, doc) {#name, &Args::name, true, doc},
#define TQ_NOT_LISTED(type, name)
#define TQ_DEFAULT(type, name, value, doc) args.name = value;
#define TQ_NO_DEFAULT(type, name, ...)

Params<TqFlashAttnVecArgs> flash_attn_vec_params() {
  using Args = TqFlashAttnVecArgs;
  Args args{};
  TQ_FLASH_ATTN_VEC_FIELDS(TQ_DEFAULT, TQ_NO_DEFAULT, TQ_NO_DEFAULT)
  return {"FlashAttnVecTqHbParams",
          "flash_attn_vec_tq_hb",
          args,
          {TQ_FLASH_ATTN_VEC_FIELDS(TQ_FIELD, TQ_REQUIRED, TQ_NOT_LISTED)}};
}

Params<TqHadamardQuantizeArgs> hadamard_quantize_params() {
  using Args = TqHadamardQuantizeArgs;
  Args args{};
  TQ_HADAMARD_QUANTIZE_FIELDS(TQ_DEFAULT, TQ_NO_DEFAULT, TQ_NO_DEFAULT)
  return {"HadamardQuantizeKvHbParams",
          "hadamard_quantize_kv_hb",
          args,
          {TQ_HADAMARD_QUANTIZE_FIELDS(TQ_FIELD, TQ_REQUIRED, TQ_NOT_LISTED)}};
}

/// `args` with the fields that keywords name set to their values.
template <class Args>
Args with(const Params<Args>& params, Args args, const py::kwargs& values) {
  std::size_t used = 0;
  for (const Field<Args>& field : params.fields) {
    if (used == values.size()) return args;
    PyObject* value = PyDict_GetItemWithError(values.ptr(), field.key);
    if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (value == nullptr) continue;
    field.set(params.name, args, value);
    ++used;
  }
  if (used == values.size()) return args;
  for (const auto& item : values) {
    const auto name = item.first.cast<std::string>();
    const auto is_it = [&](const Field<Args>& field) { return name == field.name; };
    if (std::none_of(params.fields.begin(), params.fields.end(), is_it)) {
      throw py::type_error(std::string(params.name) + " has no field '" + name + "'");
    }
  }
  return args;
}

template <class Args>
Args make(const Params<Args>& params, const py::kwargs& values) {
  std::string missing;
  for (const Field<Args>& field : params.fields) {
    if (!field.is_required || values.contains(field.key)) continue;
    missing += (missing.empty() ? "" : ", ") + std::string(field.name);
  }
  if (!missing.empty()) throw invalid(params.name, missing, "must be given", "no value");
  return with(params, params.defaults, values);
}

/// Both docstrings end with their examples; the fields are listed in between by their own text.
template <class Args>
void bind(py::module_& module, const Params<Args>& params, const std::string& doc, const std::string& examples,
          const std::string& replace_examples, const std::string& validate_examples) {
  std::string listed = "\n\nParameters\n----------\n";
  for (const Field<Args>& field : params.fields) {
    listed += std::string(field.name) + (field.member.index() == 0 ? " : int" : " : float");
    if (!field.is_required) listed += ", default " + std::string(py::str(field.get(params.defaults)));
    listed += std::string("\n    ") + field.doc + "\n";
  }
  py::class_<Args> cls(module, params.name, (doc + listed + "\nExamples\n--------\n" + examples).c_str());
  cls.def(py::init([params](const py::kwargs& values) { return make(params, values); }));
  cls.def(
      "replace", [params](const Args& self, const py::kwargs& values) { return with(params, self, values); },
      ("Return a copy in which the fields that keywords name have other values.\n\n" + replace_examples).c_str());
  for (const Field<Args>& field : params.fields) {
    cls.def_property(
        field.name, [field](const Args& self) { return field.get(self); },
        [field, name = params.name](Args& self, const py::object& value) { field.set(name, self, value); }, field.doc);
  }
  cls.def(
      "validate",
      [name = params.name](const Args& self, const py::object& op) {
        if (!py::isinstance<py::str>(op)) {
          throw invalid(std::string(name) + ".validate", "op", "must be a string", std::string(py::repr(op)));
        }
        validate(op.cast<std::string>(), self);
      },
      py::arg("op") = params.op,
      ("Raise InvalidArgument or UnsupportedError, in the name of ``op``, if a field breaks its rule.\n\n" +
       validate_examples)
          .c_str());
  cls.def("__repr__", [params](const Args& self) {
    std::string text;
    for (const Field<Args>& field : params.fields) {
      text += (text.empty() ? "" : ", ") + std::string(field.name) + "=" + std::string(py::repr(field.get(self)));
    }
    return std::string(params.name) + "(" + text + ")";
  });
  cls.def(
      "__eq__",
      [params](const Args& a, const Args& b) {
        const auto agrees = [&](const Field<Args>& field) {
          return std::visit([&](auto pointer) { return a.*pointer == b.*pointer; }, field.member);
        };
        return std::all_of(params.fields.begin(), params.fields.end(), agrees);
      },
      py::is_operator());
  // Copies and pickles are the bytes of the struct, whose layout is fixed.
  cls.def(py::pickle([](const Args& self) { return py::bytes(reinterpret_cast<const char*>(&self), sizeof(Args)); },
                     [](const py::bytes& state) {
                       const std::string_view bytes = state;
                       if (bytes.size() != sizeof(Args)) throw py::value_error("the pickled params have another size");
                       Args args;
                       std::memcpy(&args, bytes.data(), sizeof(Args));
                       return args;
                     }));
}

}  // namespace

void bind_params(py::module_& module) {
  bind(module, flash_attn_vec_params(),
       "Scalars of a decode-attention call. All fields are keywords.\n\n"
       "Integer fields are 32-bit and unsigned, the others float32; what does not fit, as a number that would become\n"
       "infinite or 0, raises InvalidArgument naming the field.",
       ">>> import tq_hb\n>>> p = tq_hb.FlashAttnVecTqHbParams(num_heads=16, num_kv_heads=8, head_dim=256,\n"
       "...     kv_seq_len=64, kv_capacity=1024, scale=0.0625)\n>>> p  # doctest: +NORMALIZE_WHITESPACE\n"
       "FlashAttnVecTqHbParams(num_heads=16, num_kv_heads=8, head_dim=256, kv_seq_len=64, kv_capacity=1024,\n"
       "    scale=0.0625, mask_type=0, sliding_window=0, softcap=0.0, ring_start=0, scale_factor_d512=1.0,\n"
       "    codebook_bits=8, fuse_fwht_pre=0, nsg=1)\n"
       ">>> p.nsg = 4\n>>> p.nsg\n4",
       ">>> import tq_hb\n>>> p = tq_hb.FlashAttnVecTqHbParams(num_heads=16, num_kv_heads=8, head_dim=256,\n"
       "...     kv_seq_len=64, kv_capacity=1024, scale=0.0625)\n>>> p.replace(kv_seq_len=65, nsg=2) == p\nFalse",
       ">>> import tq_hb\n>>> p = tq_hb.FlashAttnVecTqHbParams(num_heads=3, num_kv_heads=1, head_dim=256,\n"
       "...     kv_seq_len=9, kv_capacity=8, scale=0.0625)\n>>> p.validate()\nTraceback (most recent call last):\n"
       "tq_hb.InvalidArgument: flash_attn_vec_tq_hb: kv_capacity must be >= kv_seq_len 9, got 8");
  bind(module, hadamard_quantize_params(),
       "Scalars of an encode or decode call: which slot of which cache, and at what width. All fields are keywords.\n\n"
       "The slot is write_pos, or write_pos mod cache_capacity when is_sliding is 1.",
       ">>> import tq_hb\n>>> hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=8, write_pos=0,\n"
       "...     cache_capacity=1024)\n>>> hp  # doctest: +NORMALIZE_WHITESPACE\n"
       "HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=8, write_pos=0, cache_capacity=1024, is_sliding=0,\n"
       "    scale_factor_d512=1.0, codebook_bits=8)\n"
       ">>> hp.write_pos = 5\n>>> hp.write_pos\n5",
       ">>> import tq_hb\n>>> hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=8, write_pos=0,\n"
       "...     cache_capacity=1024)\n>>> hp.replace(write_pos=7).write_pos\n7",
       ">>> import tq_hb\n>>> hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=0,\n"
       "...     cache_capacity=0)\n>>> hp.validate()\nTraceback (most recent call last):\n"
       "tq_hb.InvalidArgument: hadamard_quantize_kv_hb: cache_capacity must be > 0, got 0");
}

}  // namespace tq_hb
