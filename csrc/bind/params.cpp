// The params structs as Python classes, made from the field lists of core/abi.h.

#include "core/params.h"

#include <cmath>
#include <cstring>
#include <string_view>

#include "bind/bind.h"
#include "core/abi.h"

namespace tq_hb {

std::uint32_t to_uint32(const std::string& op, const std::string& field, const py::handle& value) {
  const auto fail = [&] {
    PyErr_Clear();
    throw invalid(op, field, "must be an integer from 0 to 4294967295", std::string(py::repr(value)));
  };
  const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) fail();
  const unsigned long long number = PyLong_AsUnsignedLongLong(index.ptr());
  if (PyErr_Occurred() != nullptr || number > 0xFFFFFFFFull) fail();
  return static_cast<std::uint32_t>(number);
}

float to_float32(const std::string& op, const std::string& field, const py::handle& value) {
  const double number = PyFloat_AsDouble(value.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw invalid(op, field, "must be a number", std::string(py::repr(value)));
  }
  const float rounded = static_cast<float>(number);
  if (std::isfinite(number) && !std::isfinite(rounded)) {
    throw invalid(op, field, "must be finite in float32", number);
  }
  return rounded;
}

namespace {

void set(const char* op, const char* field, TqU32& target, const py::handle& value) {
  target = to_uint32(op, field, value);
}
void set(const char* op, const char* field, TqF32& target, const py::handle& value) {
  target = to_float32(op, field, value);
}

// Each pair of macros is applied to a field list; the FIELD form takes a default besides.
#define TQ_SKIP(type, name)
#define TQ_BIND_REQUIRED(type, name, doc)                \
  cls.def_property(                                      \
      #name, [](const Args& self) { return self.name; }, \
      [](Args& self, const py::object& value) { set(kName, #name, self.name, value); }, doc);
#define TQ_BIND_FIELD(type, name, value, doc) TQ_BIND_REQUIRED(type, name, doc)
#define TQ_REPR_REQUIRED(type, name, doc) \
  text += (text.empty() ? "" : ", ") + std::string(#name "=") + std::string(py::repr(py::cast(self.name)));
#define TQ_REPR_FIELD(type, name, value, doc) TQ_REPR_REQUIRED(type, name, doc)
#define TQ_EQUAL_REQUIRED(type, name, doc) equal = equal && a.name == b.name;
#define TQ_EQUAL_FIELD(type, name, value, doc) TQ_EQUAL_REQUIRED(type, name, doc)
#define TQ_PARAMETER_REQUIRED(type, name, doc) const py::object &name,
#define TQ_PARAMETER_FIELD(type, name, value, doc) TQ_PARAMETER_REQUIRED(type, name, doc)
#define TQ_ASSIGN_REQUIRED(type, name, doc) set(kName, #name, args.name, name);
#define TQ_ASSIGN_FIELD(type, name, value, doc) TQ_ASSIGN_REQUIRED(type, name, doc)
// Without a value, the conversion to the field's type says what is missing.
#define TQ_KEYWORD_REQUIRED(type, name, doc) py::arg(#name) = py::none(),
#define TQ_KEYWORD_FIELD(type, name, value, doc) py::arg(#name) = static_cast<type>(value),

void refuse_unknown(const char* name, const py::kwargs& unknown) {
  for (const auto& item : unknown) {
    throw py::type_error(std::string(name) + " has no field " + std::string(py::repr(item.first)));
  }
}

/// Copies and pickles by the bytes of the struct, whose layout is fixed.
template <class Args>
void bind_pickle(py::class_<Args>& cls) {
  cls.def(py::pickle([](const Args& self) { return py::bytes(reinterpret_cast<const char*>(&self), sizeof(Args)); },
                     [](const py::bytes& state) {
                       const std::string_view bytes = state;
                       if (bytes.size() != sizeof(Args)) throw py::value_error("the pickled params have another size");
                       Args args;
                       std::memcpy(&args, bytes.data(), sizeof(Args));
                       return args;
                     }));
}

void bind_flash_attn_vec(py::module_& module) {
  using Args = TqFlashAttnVecArgs;
  static constexpr const char* kName = "FlashAttnVecTqHbParams";
  py::class_<Args> cls(
      module, kName,
      "Scalars of a decode-attention call (nwg, the fifteenth field of the kernel's struct, is chosen per call).\n\n"
      "Integer fields are 32-bit and unsigned; anything else raises InvalidArgument naming the field.\n\n"
      ">>> import tq_hb\n>>> p = tq_hb.FlashAttnVecTqHbParams(num_heads=16, num_kv_heads=8, head_dim=256,\n"
      "...     kv_seq_len=64, kv_capacity=1024, scale=0.0625)\n>>> p  # doctest: +NORMALIZE_WHITESPACE\n"
      "FlashAttnVecTqHbParams(num_heads=16, num_kv_heads=8, head_dim=256, kv_seq_len=64, kv_capacity=1024,\n"
      "    scale=0.0625, mask_type=0, sliding_window=0, softcap=0.0, ring_start=0, scale_factor_d512=1.0,\n"
      "    codebook_bits=8, fuse_fwht_pre=0, nsg=1)\n"
      ">>> p.nsg = 4\n>>> p.nsg\n4");
  // The keyword bag ends the macro-made list of parameters, which closes with a comma.
  cls.def(py::init([](TQ_FLASH_ATTN_VEC_FIELDS(TQ_PARAMETER_FIELD, TQ_PARAMETER_REQUIRED, TQ_SKIP)
                          const py::kwargs& unknown) {
            refuse_unknown(kName, unknown);
            Args args{};
            TQ_FLASH_ATTN_VEC_FIELDS(TQ_ASSIGN_FIELD, TQ_ASSIGN_REQUIRED, TQ_SKIP)
            args.nwg = 1;
            return args;
          }),
          py::kw_only(),
          TQ_FLASH_ATTN_VEC_FIELDS(TQ_KEYWORD_FIELD, TQ_KEYWORD_REQUIRED, TQ_SKIP) py::doc("All fields are keywords."));
  TQ_FLASH_ATTN_VEC_FIELDS(TQ_BIND_FIELD, TQ_BIND_REQUIRED, TQ_SKIP)
  cls.def(
      "validate", [](const Args& self, const std::string& op) { validate(op, self); },
      py::arg("op") = "flash_attn_vec_tq_hb",
      "Raise InvalidArgument or UnsupportedError, in the name of ``op``, if a field breaks its rule.\n\n"
      ">>> import tq_hb\n>>> p = tq_hb.FlashAttnVecTqHbParams(num_heads=3, num_kv_heads=1, head_dim=256,\n"
      "...     kv_seq_len=9, kv_capacity=8, scale=0.0625)\n>>> p.validate()\nTraceback (most recent call last):\n"
      "tq_hb.InvalidArgument: flash_attn_vec_tq_hb: kv_capacity must be >= kv_seq_len 9, got 8");
  cls.def("__repr__", [](const Args& self) {
    std::string text;
    TQ_FLASH_ATTN_VEC_FIELDS(TQ_REPR_FIELD, TQ_REPR_REQUIRED, TQ_SKIP)
    return std::string(kName) + "(" + text + ")";
  });
  cls.def(
      "__eq__",
      [](const Args& a, const Args& b) {
        bool equal = true;
        TQ_FLASH_ATTN_VEC_FIELDS(TQ_EQUAL_FIELD, TQ_EQUAL_REQUIRED, TQ_SKIP)
        return equal;
      },
      py::is_operator());
  bind_pickle(cls);
}

void bind_hadamard_quantize(py::module_& module) {
  using Args = TqHadamardQuantizeArgs;
  static constexpr const char* kName = "HadamardQuantizeKvHbParams";
  py::class_<Args> cls(
      module, kName,
      "Scalars of an encode or decode call: which slot of which cache, and at what width.\n\n"
      "The slot is write_pos, or write_pos mod cache_capacity when is_sliding is 1.\n\n"
      ">>> import tq_hb\n>>> hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=8, write_pos=0,\n"
      "...     cache_capacity=1024)\n>>> hp  # doctest: +NORMALIZE_WHITESPACE\n"
      "HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=8, write_pos=0, cache_capacity=1024, is_sliding=0,\n"
      "    scale_factor_d512=1.0, codebook_bits=8)\n"
      ">>> hp.write_pos = 5\n>>> hp.write_pos\n5");
  cls.def(
      py::init([](TQ_HADAMARD_QUANTIZE_FIELDS(TQ_PARAMETER_FIELD, TQ_PARAMETER_REQUIRED) const py::kwargs& unknown) {
        refuse_unknown(kName, unknown);
        Args args{};
        TQ_HADAMARD_QUANTIZE_FIELDS(TQ_ASSIGN_FIELD, TQ_ASSIGN_REQUIRED)
        return args;
      }),
      py::kw_only(),
      TQ_HADAMARD_QUANTIZE_FIELDS(TQ_KEYWORD_FIELD, TQ_KEYWORD_REQUIRED) py::doc("All fields are keywords."));
  TQ_HADAMARD_QUANTIZE_FIELDS(TQ_BIND_FIELD, TQ_BIND_REQUIRED)
  cls.def(
      "validate", [](const Args& self, const std::string& op) { validate(op, self); },
      py::arg("op") = "hadamard_quantize_kv_hb",
      "Raise InvalidArgument or UnsupportedError, in the name of ``op``, if a field breaks its rule.\n\n"
      ">>> import tq_hb\n>>> hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=0,\n"
      "...     cache_capacity=0)\n>>> hp.validate()\nTraceback (most recent call last):\n"
      "tq_hb.InvalidArgument: hadamard_quantize_kv_hb: cache_capacity must be > 0, got 0");
  cls.def("__repr__", [](const Args& self) {
    std::string text;
    TQ_HADAMARD_QUANTIZE_FIELDS(TQ_REPR_FIELD, TQ_REPR_REQUIRED)
    return std::string(kName) + "(" + text + ")";
  });
  cls.def(
      "__eq__",
      [](const Args& a, const Args& b) {
        bool equal = true;
        TQ_HADAMARD_QUANTIZE_FIELDS(TQ_EQUAL_FIELD, TQ_EQUAL_REQUIRED)
        return equal;
      },
      py::is_operator());
  bind_pickle(cls);
}

}  // namespace

void bind_params(py::module_& module) {
  bind_flash_attn_vec(module);
  bind_hadamard_quantize(module);
}

}  // namespace tq_hb
