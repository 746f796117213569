"""Every rule about arguments: what is refused, in which words, and that nothing was written."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import tq_hb

ATTEND = "flash_attn_vec_tq_hb(_with_fused_undo)?"
ATTEND_PARAMS = "(flash_attn_vec_tq_hb|FlashAttnVecTqHbParams)"
ENCODE = "hadamard_quantize_kv_hb"
ENCODE_PARAMS = "(hadamard_quantize_kv_hb|HadamardQuantizeKvHbParams)"
NAN, INF = float("nan"), float("inf")


def refusal(op: str, field: str, *rest: str):
    """An InvalidArgument that says ``op: field rule, got value``, with ``rest`` in rule and value."""
    return pytest.raises(tq_hb.InvalidArgument, match=rf"^{op}: {field} .*" + ".*".join(map(re.escape, rest)))


@dataclass
class AttendCall:
    """A call of the attention op that is right until one thing is changed."""

    params: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, Any] = field(default_factory=dict)
    keywords: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        head_dim = self.params.get("head_dim", 256)
        width = head_dim if head_dim in tq_hb.supported_head_dims() else 256
        norms = (2, 12, 2) if width == 512 else (2, 12)
        self.arrays = {
            "q": np.zeros((4, width), np.float32),
            "k_packed": np.zeros((2, 12, width), np.uint8),
            "k_norms": np.zeros(norms, np.float32),
            "v_packed": np.zeros((2, 12, width), np.uint8),
            "v_norms": np.zeros(norms, np.float32),
            **self.buffers,
        }
        self.out = np.full((4, width), 7.0, np.float32)

    def run(self, op=None):
        values = {
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 256,
            "kv_seq_len": 10,
            "kv_capacity": 12,
            "scale": 1.0,
            **self.params,
        }
        p = tq_hb.FlashAttnVecTqHbParams(**values)
        keywords = {"out": self.out, **self.keywords}
        return (op or tq_hb.flash_attn_vec_tq_hb)(*self.arrays.values(), p, **keywords)

    def assert_untouched(self):
        assert (self.out == 7.0).all()


def test_the_classes_of_errors():
    assert issubclass(tq_hb.InvalidArgument, ValueError)
    assert issubclass(tq_hb.UnsupportedError, NotImplementedError)
    assert issubclass(tq_hb.DeviceError, RuntimeError)
    assert issubclass(tq_hb.OutOfMemoryError, tq_hb.DeviceError)
    assert issubclass(tq_hb.OutOfMemoryError, MemoryError)


def test_the_unchanged_call_is_accepted():
    call = AttendCall()
    call.run()
    assert (call.out == 0.0).all()


BAD_ATTEND_PARAMS = [
    ("head_dim", 0, "must be 64, 128, 256 or 512"),
    ("head_dim", 96, "must be 64, 128, 256 or 512"),
    ("head_dim", 255, "must be 64, 128, 256 or 512"),
    ("head_dim", 1024, "must be 64, 128, 256 or 512"),
    ("num_heads", 0, "must be > 0"),
    ("num_kv_heads", 0, "must be > 0"),
    ("num_heads", 3, "num_kv_heads"),
    ("kv_seq_len", 0, "must be > 0"),
    ("kv_capacity", 9, "kv_seq_len"),
    ("codebook_bits", 0, "must be 5, 6 or 8"),
    ("codebook_bits", 4, "must be 5, 6 or 8"),
    ("codebook_bits", 7, "must be 5, 6 or 8"),
    ("codebook_bits", 9, "must be 5, 6 or 8"),
    *(("nsg", n, "") for n in (0, 3, 5, 6, 7, 8, 9, 16, 31, 32, 33)),
    ("mask_type", 3, "must be 0, 1 or 2"),
    ("mask_type", 2**32 - 1, "must be 0, 1 or 2"),
    ("ring_start", 12, "kv_capacity"),
    ("ring_start", 2**32 - 1, "kv_capacity"),
    ("ring_start", 1, "kv_seq_len"),
    ("softcap", -1.0, "must be finite and >= 0"),
    ("softcap", NAN, "must be finite and >= 0"),
    ("softcap", INF, "must be finite and >= 0"),
    ("softcap", 1.4013e-45, "must be 0 or at least 1.2e-38"),
    ("scale", NAN, "must be finite"),
    ("scale", INF, "must be finite"),
    ("scale", -INF, "must be finite"),
    ("scale_factor_d512", 0.0, "must be finite and > 0"),
    ("scale_factor_d512", -1.0, "must be finite and > 0"),
    ("scale_factor_d512", NAN, "must be finite and > 0"),
    ("scale_factor_d512", INF, "must be finite and > 0"),
    ("fuse_fwht_pre", 2, "must be 0 or 1"),
]


@pytest.mark.parametrize(
    "op", [tq_hb.flash_attn_vec_tq_hb, tq_hb.flash_attn_vec_tq_hb_with_fused_undo], ids=["plain", "fused-undo"]
)
@pytest.mark.parametrize(("name", "value", "rule"), BAD_ATTEND_PARAMS)
def test_attend_refuses_a_bad_field(op, name, value, rule):
    call = AttendCall({name: value})

    with refusal(ATTEND, name, rule, "got", str(value).removesuffix(".0")):
        call.run(op)

    call.assert_untouched()


@pytest.mark.parametrize(("name", "value", "rule"), BAD_ATTEND_PARAMS)
def test_params_validate_themselves(name, value, rule):
    good = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 256, "kv_seq_len": 10, "kv_capacity": 12, "scale": 1.0}
    tq_hb.FlashAttnVecTqHbParams(**good).validate()

    with refusal(ATTEND_PARAMS, name, rule, "got"):
        tq_hb.FlashAttnVecTqHbParams(**{**good, name: value}).validate()


def test_mask_type_2_needs_a_window():
    call = AttendCall({"mask_type": 2, "sliding_window": 0})

    with refusal(ATTEND, "sliding_window", "mask_type", "got 0"):
        call.run()

    call.assert_untouched()


@pytest.mark.parametrize("nsg", [1, 2, 4])
def test_accepted_nsg(nsg):
    AttendCall({"nsg": nsg}).run()


def test_a_full_ring_may_start_anywhere():
    AttendCall({"kv_seq_len": 12, "ring_start": 11}).run()


INTEGER_FIELDS = (
    "num_heads", "num_kv_heads", "head_dim", "kv_seq_len", "kv_capacity", "mask_type", "sliding_window", "ring_start",
    "codebook_bits", "fuse_fwht_pre", "nsg",
)  # fmt: skip
NOT_A_U32 = (-1, 2**32, 2**64, 1.5, NAN, "4", None)


@pytest.mark.parametrize("value", NOT_A_U32, ids=repr)
@pytest.mark.parametrize("name", INTEGER_FIELDS)
def test_attend_params_refuse_what_is_no_u32(name, value):
    call = AttendCall({name: value})

    with refusal(ATTEND_PARAMS, name, "got"):
        call.run()

    call.assert_untouched()


@pytest.mark.parametrize("value", ["1.0", None, 1j, [1.0]], ids=repr)
@pytest.mark.parametrize("name", ["scale", "softcap", "scale_factor_d512"])
def test_attend_params_refuse_what_is_no_number(name, value):
    with refusal(ATTEND_PARAMS, name, "got"):
        AttendCall({name: value}).run()


@pytest.mark.parametrize("value", [1e-46, -5e-324], ids=str)
@pytest.mark.parametrize("name", ["scale", "softcap", "scale_factor_d512"])
def test_a_number_does_not_become_0_unnoticed(name, value):
    p = tq_hb.FlashAttnVecTqHbParams(num_heads=1, num_kv_heads=1, head_dim=64, kv_seq_len=1, kv_capacity=1, scale=1.0)

    for change in (p.replace, lambda **values: setattr(p, *values.popitem())):
        with refusal(ATTEND_PARAMS, name, "must not round to 0 in float32, got", f"{value:g}"):
            change(**{name: value})


@pytest.mark.parametrize("name", INTEGER_FIELDS)
def test_assigning_a_field_refuses_what_the_constructor_refuses(name):
    p = tq_hb.FlashAttnVecTqHbParams(
        num_heads=4, num_kv_heads=2, head_dim=256, kv_seq_len=10, kv_capacity=12, scale=1.0
    )
    before = getattr(p, name)

    with refusal(ATTEND_PARAMS, name, "got"):
        setattr(p, name, -1)

    assert getattr(p, name) == before


@pytest.mark.parametrize("value", [np.int64(4), np.uint8(4), True + 3], ids=["int64", "uint8", "int"])
def test_integers_of_any_type_are_accepted(value):
    AttendCall({"num_heads": value, "nsg": value}).run()


@pytest.mark.parametrize(
    "given", [("num_heads",), ("num_kv_heads", "head_dim", "kv_seq_len", "kv_capacity", "scale"), ()], ids=str
)
def test_params_name_all_fields_that_are_missing(given):
    values = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 256, "kv_seq_len": 10, "kv_capacity": 12, "scale": 1.0}
    missing = ", ".join(name for name in values if name not in given)

    with pytest.raises(tq_hb.InvalidArgument) as caught:
        tq_hb.FlashAttnVecTqHbParams(**{name: values[name] for name in given})

    assert str(caught.value) == f"FlashAttnVecTqHbParams: {missing} must be given, got no value"


BAD_ATTEND_KEYWORDS = [
    ("nwg", 0, "1 to 32"),
    ("nwg", 33, "1 to 32"),
    ("nwg", -1, ""),
    ("nwg", 1.5, ""),
    ("v_bits", 4, "must be 5, 6 or 8"),
    ("v_bits", 7, "must be 5, 6 or 8"),
    ("codebook", "gaussian", "lloyd_max"),
    ("packing", "nibble", "byte"),
    ("precision", "fast", "default"),
    ("return_lse", 1, "True or False"),
    ("return_lse", None, "True or False"),
    ("return_lse", "yes", "True or False"),
]


@pytest.mark.parametrize(("name", "value", "rule"), BAD_ATTEND_KEYWORDS)
def test_attend_refuses_a_bad_keyword(name, value, rule):
    call = AttendCall(keywords={name: value})

    with refusal(ATTEND, name, rule, "got", str(value)):
        call.run()

    call.assert_untouched()


def changed(array: np.ndarray, how: str) -> np.ndarray:
    """A buffer that is wrong in one way."""
    match how:
        case "short":
            return array[:, :-1] if array.ndim > 1 else array[:-1]
        case "long":
            return np.concatenate([array, array])
        case "flat":
            return array.reshape(-1)
        case "int32":
            return array.astype(np.int32)
        case "complex":
            return array.astype(np.complex64)
    raise AssertionError(how)


@pytest.mark.parametrize("how", ["short", "long", "flat", "int32", "complex"])
@pytest.mark.parametrize("name", ["q", "k_packed", "k_norms", "v_packed", "v_norms"])
def test_attend_refuses_a_bad_buffer(name, how):
    call = AttendCall()
    call.arrays[name] = changed(call.arrays[name], how)

    with refusal(ATTEND, name, "got"):
        call.run()

    call.assert_untouched()


@pytest.mark.parametrize(
    ("sinks", "rule"),
    [
        (np.zeros(3, np.float32), "must have shape (4,)"),
        (np.zeros(5, np.float32), "must have shape (4,)"),
        (np.zeros((1, 4), np.float32), "must have shape (4,)"),
        (np.float32(0), "must have shape (4,)"),
        (np.zeros(4, np.int32), "dtype"),
        ([0.0] * 4, "array"),
        (1.0, "array"),
        (np.array([0, 0, 0, 1e300]), "must be finite or -inf"),
    ],
    ids=["short", "long", "2d", "scalar", "int32", "list", "number", "beyond float32"],
)
def test_attend_refuses_bad_sinks(sinks, rule):
    call = AttendCall(keywords={"sinks": sinks})

    with refusal(ATTEND, "sinks", rule, "got"):
        call.run()

    call.assert_untouched()


@pytest.mark.parametrize(
    "sinks", [np.zeros(4), np.zeros(8, np.float16)[::2], np.full(4, -np.inf)], ids=["float64", "float16", "-inf"]
)
def test_sinks_may_be_any_floating_array(sinks):
    AttendCall(keywords={"sinks": sinks}).run()


def test_attend_refuses_no_queries():
    call = AttendCall(buffers={"q": np.zeros((0, 4, 256), np.float32)}, keywords={"out": None})
    with refusal(ATTEND, "q", "at least one query", "got 0"):
        call.run()


def test_there_is_a_query_for_every_token_at_most():
    AttendCall(buffers={"q": np.zeros((10, 4, 256), np.float32)}, keywords={"out": None}).run()
    with refusal(ATTEND, "q", "at most 10 queries", "got 11"):
        AttendCall(buffers={"q": np.zeros((11, 4, 256), np.float32)}, keywords={"out": None}).run()


@pytest.mark.parametrize("name", ["k_packed", "v_packed"])
@pytest.mark.parametrize(("cbits", "row_bytes"), [(5, 160), (6, 192)])
def test_rows_have_the_size_of_their_packing(name, cbits, row_bytes):
    planes = np.zeros((2, 12, row_bytes), np.uint8)
    both = {"k_packed": planes, "v_packed": planes}
    AttendCall({"codebook_bits": cbits}, buffers=both, keywords={"packing": "plane"}).run()
    wrong_for_planes = AttendCall(
        {"codebook_bits": cbits},
        buffers={**both, name: np.zeros((2, 12, 256), np.uint8)},
        keywords={"packing": "plane"},
    )
    with refusal(ATTEND, name, f"must have shape (2, 12, {row_bytes})", "got (2, 12, 256)"):
        wrong_for_planes.run()
    with refusal(ATTEND, name, "must have shape (2, 12, 256)", f"got (2, 12, {row_bytes})"):
        AttendCall({"codebook_bits": cbits}, buffers={name: planes}).run()


@pytest.mark.parametrize("name", ["k_norms", "v_norms"])
def test_512_needs_two_norms_per_row(name):
    call = AttendCall({"head_dim": 512})
    call.run()
    call.arrays[name] = call.arrays[name][..., 0]

    with refusal(ATTEND, name, "got"):
        call.run()


@pytest.mark.parametrize("value", [[[0.0] * 256] * 4, "q", 3, None], ids=["list", "str", "int", "None"])
def test_attend_refuses_a_query_that_is_no_array(value):
    with refusal(ATTEND, "q", "got"):
        AttendCall(buffers={"q": value}).run()


@pytest.mark.parametrize("case", ["strided", "float64", "shape", "read-only", "list"])
def test_attend_refuses_a_bad_out(case):
    out = {
        "strided": np.zeros((4, 512), np.float32)[:, ::2],
        "float64": np.zeros((4, 256), np.float64),
        "shape": np.zeros((5, 256), np.float32),
        "read-only": np.zeros((4, 256), np.float32),
        "list": [[0.0] * 256] * 4,
    }[case]
    if case == "read-only":
        out.setflags(write=False)

    with refusal(ATTEND, "out", "got"):
        AttendCall(keywords={"out": out}).run()


def test_attend_refuses_an_out_that_overlaps_an_input():
    storage = np.zeros(5 * 256, np.float32)
    q = storage[: 4 * 256].reshape(4, 256)
    out = storage[256:].reshape(4, 256)

    with refusal(ATTEND, r"\w+ must not overlap"):
        AttendCall(buffers={"q": q}, keywords={"out": out}).run()

    assert not storage.any()


@dataclass
class EncodeCall:
    """A call of the encode op that is right until one thing is changed."""

    params: dict[str, Any] = field(default_factory=dict)
    src: Any = None
    packed: Any = None
    norms: Any = None
    keywords: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.src = np.ones((2, 256), np.float32) if self.src is None else self.src
        self.packed = np.full((2, 12, 256), 9, np.uint8) if self.packed is None else self.packed
        self.norms = np.full((2, 12), 9.0, np.float32) if self.norms is None else self.norms

    def run(self):
        values = {"head_dim": 256, "num_kv_heads": 2, "write_pos": 3, "cache_capacity": 12, **self.params}
        hp = tq_hb.HadamardQuantizeKvHbParams(**values)
        tq_hb.hadamard_quantize_kv_hb(self.src, self.packed, self.norms, hp, **self.keywords)

    def assert_untouched(self):
        assert (np.asarray(self.packed) == 9).all()
        assert (np.asarray(self.norms) == 9.0).all()


BAD_ENCODE_PARAMS = [
    ("head_dim", 0, "must be 64, 128, 256 or 512"),
    ("head_dim", 96, "must be 64, 128, 256 or 512"),
    ("num_kv_heads", 0, "must be > 0"),
    ("cache_capacity", 0, "must be > 0"),
    ("write_pos", 12, "cache_capacity"),
    ("write_pos", 2**32 - 1, "cache_capacity"),
    ("is_sliding", 2, "must be 0 or 1"),
    ("scale_factor_d512", 0.0, "must be finite and > 0"),
    ("scale_factor_d512", -2.0, "must be finite and > 0"),
    ("scale_factor_d512", NAN, "must be finite and > 0"),
    ("codebook_bits", 4, "must be 5, 6 or 8"),
    ("codebook_bits", 7, "must be 5, 6 or 8"),
]


@pytest.mark.parametrize(("name", "value", "rule"), BAD_ENCODE_PARAMS)
def test_encode_refuses_a_bad_field(name, value, rule):
    call = EncodeCall({name: value})

    with refusal(ENCODE, name, rule, "got", str(value).removesuffix(".0")):
        call.run()

    call.assert_untouched()


@pytest.mark.parametrize("value", NOT_A_U32, ids=repr)
@pytest.mark.parametrize(
    "name", ["head_dim", "num_kv_heads", "write_pos", "cache_capacity", "is_sliding", "codebook_bits"]
)
def test_encode_params_refuse_what_is_no_u32(name, value):
    call = EncodeCall({name: value})

    with refusal(ENCODE_PARAMS, name, "got"):
        call.run()

    call.assert_untouched()


def test_a_linear_run_must_fit_the_capacity():
    call = EncodeCall({"write_pos": 10}, src=np.ones((3, 2, 256), np.float32))

    with refusal(ENCODE, "write_pos", "cache_capacity", "got 10"):
        call.run()

    call.assert_untouched()


def test_a_run_of_no_tokens_may_lie_at_any_address():
    call = EncodeCall(src=np.ndarray((0, 2, 256), np.float32, buffer=bytearray(2), offset=1))
    call.run()
    call.assert_untouched()


def test_a_run_of_no_tokens_is_a_no_op():
    call = EncodeCall(src=np.ones((0, 2, 256), np.float32))

    call.run()

    call.assert_untouched()


@pytest.mark.parametrize("how", ["short", "long", "flat", "int32", "complex"])
@pytest.mark.parametrize("name", ["src", "packed", "norms"])
def test_encode_refuses_a_bad_buffer(name, how):
    call = EncodeCall()
    setattr(call, name, changed(getattr(call, name), how))

    with refusal(ENCODE, name, "got"):
        call.run()

    call.assert_untouched()


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in ("packed", "norms") for how in ("strided", "read-only", "fortran")]
    + [("norms", "byte-swapped"), ("norms", "unaligned")],
)
def test_encode_writes_only_into_contiguous_writable_native_arrays(name, how):
    call = EncodeCall()
    array = getattr(call, name)
    match how:
        case "strided":
            array = np.repeat(array, 2, axis=1)[:, ::2]
        case "read-only":
            array.setflags(write=False)
        case "fortran":
            array = np.asfortranarray(array)
        case "byte-swapped":
            array = array.astype(array.dtype.newbyteorder())
        case "unaligned":
            array = np.ndarray(array.shape, array.dtype, buffer=bytearray(b"\0" + array.tobytes()), offset=1)
    setattr(call, name, array)

    with refusal(ENCODE, name, "got"):
        call.run()

    call.assert_untouched()


def test_encode_refuses_overlapping_destinations():
    storage = np.zeros(2 * 12 * 256 + 2 * 12 * 4, np.uint8)
    packed = storage[: 2 * 12 * 256].reshape(2, 12, 256)
    norms = storage[2 * 12 * 256 - 8 : -8].view(np.float32).reshape(2, 12)

    with refusal(ENCODE, r"\w+ must not overlap"):
        EncodeCall(packed=packed, norms=norms).run()

    assert not storage.any()


def test_encode_refuses_a_source_inside_its_destination():
    packed = np.zeros((2, 12, 256), np.uint8)
    src = packed.reshape(-1)[: 2 * 256 * 4].view(np.float32).reshape(2, 256)

    with refusal(ENCODE, r"\w+ must not overlap"):
        EncodeCall(src=src, packed=packed).run()

    assert not packed.any()


def dual_arrays() -> dict[str, np.ndarray]:
    return {
        "src_k": np.ones((2, 256), np.float32),
        "src_v": np.ones((2, 256), np.float32),
        "k_packed": np.zeros((2, 4, 256), np.uint8),
        "v_packed": np.zeros((2, 4, 256), np.uint8),
        "k_norms": np.zeros((2, 4), np.float32),
        "v_norms": np.zeros((2, 4), np.float32),
    }


def run_dual(arrays: dict[str, np.ndarray], **keywords: Any) -> None:
    hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=2, write_pos=0, cache_capacity=4)
    tq_hb.hadamard_quantize_kv_hb_dual(*arrays.values(), hp, **keywords)


@pytest.mark.parametrize("pair", [("k_packed", "v_packed"), ("k_norms", "v_norms")])
def test_dual_encode_refuses_k_and_v_in_the_same_memory(pair):
    arrays = dual_arrays()
    arrays[pair[1]] = arrays[pair[0]]

    with refusal("hadamard_quantize_kv_hb_dual", r"\w+ must not overlap"):
        run_dual(arrays)

    assert not any(arrays[name].any() for name in ("k_packed", "v_packed", "k_norms", "v_norms"))


@pytest.mark.parametrize("name", ["src_k", "src_v", "k_packed", "v_packed", "k_norms", "v_norms"])
def test_dual_encode_names_the_buffer_it_refuses(name):
    arrays = dual_arrays()
    arrays[name] = arrays[name][:, :-1]

    with refusal("hadamard_quantize_kv_hb_dual", name, "got"):
        run_dual(arrays)

    assert not any(arrays[name].any() for name in ("k_packed", "v_packed", "k_norms", "v_norms"))


def test_dual_encode_refuses_a_bad_v_width():
    arrays = dual_arrays()

    with refusal("hadamard_quantize_kv_hb_dual", "v_bits", "must be 5, 6 or 8", "got 4"):
        run_dual(arrays, v_bits=4)

    assert not arrays["k_packed"].any()


@pytest.mark.parametrize("pos", [-1, 4, 1.5, 2**64])
def test_dequantize_op_refuses_a_position_outside_the_cache(pos):
    arrays = dual_arrays()
    hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=2, write_pos=0, cache_capacity=4)

    with refusal("tq_dequantize_hb_kv", "pos", "got"):
        tq_hb.tq_dequantize_hb_kv(arrays["k_packed"], arrays["k_norms"], hp, pos=pos)


def test_dequantize_op_refuses_heads_that_are_not_there():
    hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=2**31, write_pos=0, cache_capacity=4)
    with refusal("tq_dequantize_hb_kv", "packed", "got"):
        tq_hb.tq_dequantize_hb_kv(np.zeros((1, 4, 256), np.uint8), np.zeros((1, 4), np.float32), hp, pos=0)


class TestCodec:
    @pytest.mark.parametrize("cbits", [0, 4, 7, 9, -8, 5.5, "8"])
    @pytest.mark.parametrize("table", [tq_hb.codebook, tq_hb.boundaries], ids=["codebook", "boundaries"])
    def test_tables_refuse_an_unknown_width(self, table, cbits):
        with refusal(table.__name__, "bits", f"must be 5, 6 or 8, got {cbits!r}"):
            table(cbits)

    @pytest.mark.parametrize("table", [tq_hb.codebook, tq_hb.boundaries], ids=["codebook", "boundaries"])
    def test_tables_refuse_an_unknown_name(self, table):
        with refusal(table.__name__, "name", "lloyd_max", "got", "uniform"):
            table(8, "uniform")

    @pytest.mark.parametrize("name", [None, 8, np.array(["lloyd_max", "mlx_native"])], ids=["None", "8", "array"])
    @pytest.mark.parametrize("table", [tq_hb.codebook, tq_hb.boundaries], ids=["codebook", "boundaries"])
    def test_tables_refuse_what_is_no_name(self, table, name):
        with refusal(table.__name__, "name", "lloyd_max", "got"):
            table(8, name)

    @pytest.mark.parametrize("keyword", ["codebook", "packing", "device"])
    def test_names_are_strings(self, keyword):
        with refusal("quantize", keyword, "got"):
            tq_hb.quantize(np.ones(256, np.float32), 8, **{keyword: np.array(["cpu", "byte"])})

    @pytest.mark.parametrize("head_dim", [0, 1, 96, 255, 1024, -256, 2.5])
    def test_signs_refuse_an_unknown_size(self, head_dim):
        with refusal("signs", "head_dim", "got"):
            tq_hb.signs(head_dim)

    @pytest.mark.parametrize("op", [tq_hb.rotate, tq_hb.unrotate], ids=["rotate", "unrotate"])
    @pytest.mark.parametrize(
        "x", [np.ones(96, np.float32), np.float32(1), np.ones((2, 0), np.float32)], ids=["96", "scalar", "0"]
    )
    def test_rotations_refuse_a_bad_last_axis(self, op, x):
        with refusal(op.__name__, "\\w+", "got"):
            op(x)

    @pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.complex64, bool, object])
    def test_quantize_takes_floats_only(self, dtype):
        with refusal("quantize", "x", "got"):
            tq_hb.quantize(np.ones((2, 256), dtype), 8)

    @pytest.mark.parametrize("cbits", [4, 7, -8, 8.5])
    def test_quantize_refuses_an_unknown_width(self, cbits):
        with refusal("quantize", "bits", f"must be 5, 6 or 8, got {cbits!r}"):
            tq_hb.quantize(np.ones((2, 256), np.float32), cbits)

    @pytest.mark.parametrize(
        ("changes", "name", "rule"),
        [
            ({"bits": 7}, "bits", "5, 6 or 8"),
            ({"bits": 5.5}, "bits", ""),
            ({"head_dim": 96}, "head_dim", "64, 128, 256 or 512"),
            ({"head_dim": 512}, "codes", "512"),
            ({"source": "nibble"}, "source", "byte, plane"),
            ({"target": None}, "target", "byte, plane"),
            ({"source": "plane"}, "codes", "160"),
            ({"codes": np.zeros((3, 256), np.int8)}, "codes", "uint8"),
            ({"codes": np.uint8(3)}, "codes", "last axis"),
            ({"codes": "codes"}, "codes", "array"),
        ],
        ids=str,
    )
    def test_convert_packing_refuses_what_does_not_fit(self, changes, name, rule):
        good = {"codes": np.zeros((3, 256), np.uint8), "bits": 5, "head_dim": 256, "source": "byte", "target": "plane"}
        values = {**good, **changes}
        with refusal("convert_packing", name, rule, "got"):
            tq_hb.convert_packing(values.pop("codes"), values.pop("bits"), **values)

    def test_dequantize_refuses_rows_of_the_other_packing(self):
        norms = np.zeros(3, np.float32)
        with refusal("dequantize", "codes", "160 bytes", "got (3, 256)"):
            tq_hb.dequantize(np.zeros((3, 256), np.uint8), norms, 5, head_dim=256, packing="plane")
        with refusal("dequantize", "codes", "256 bytes", "got (3, 160)"):
            tq_hb.dequantize(np.zeros((3, 160), np.uint8), norms, 5, head_dim=256)

    @pytest.mark.parametrize(
        ("codes", "norms"),
        [
            (np.zeros((3, 256), np.uint8), np.zeros(4, np.float32)),
            (np.zeros((3, 256), np.uint8), np.zeros((3, 2), np.float32)),
            (np.zeros((3, 512), np.uint8), np.zeros(3, np.float32)),
            (np.zeros((3, 128), np.uint8), np.zeros(3, np.float32)),
            (np.zeros((3, 256), np.int32), np.zeros(3, np.float32)),
            (np.zeros((3, 256), np.uint8), np.zeros(3, np.int32)),
        ],
        ids=["count", "norms of 512", "norms of 256", "width", "codes dtype", "norms dtype"],
    )
    def test_dequantize_refuses_arrays_that_do_not_fit(self, codes, norms):
        with refusal("dequantize", "(codes|norms)", "got"):
            tq_hb.dequantize(codes, norms, 8, head_dim=512 if codes.shape[-1] == 512 else 256)

    @pytest.mark.parametrize("factor", [0.0, -1.0, NAN, INF])
    def test_dequantize_refuses_a_bad_scale_factor(self, factor):
        with refusal("dequantize", "scale_factor_d512", "got"):
            tq_hb.dequantize(
                np.zeros((3, 512), np.uint8), np.zeros((3, 2), np.float32), 8, head_dim=512, scale_factor_d512=factor
            )

    @pytest.mark.parametrize("packing", ["byte", "plane"])
    @pytest.mark.parametrize("head_dim", tq_hb.supported_head_dims())
    def test_empty_leading_shapes_give_empty_results(self, head_dim, packing):
        x = np.zeros((3, 0, head_dim), np.float32)

        codes, norms = tq_hb.quantize(x, 6, packing=packing)

        assert codes.shape == (3, 0, head_dim if packing == "byte" else head_dim * 6 // 8)
        assert codes.dtype == np.uint8
        assert norms.shape == ((3, 0, 2) if head_dim == 512 else (3, 0))
        assert tq_hb.dequantize(codes, norms, 6, head_dim=head_dim, packing=packing).shape == x.shape
        assert tq_hb.rotate(x).shape == tq_hb.unrotate(x).shape == x.shape
        other = tq_hb.convert_packing(codes, 6, head_dim=head_dim, source=packing, target="byte")
        assert other.shape == x.shape

    @pytest.mark.parametrize("packing", ["byte", "plane"])
    @pytest.mark.parametrize("head_dim", tq_hb.supported_head_dims())
    def test_a_single_vector_needs_no_leading_axis(self, head_dim, packing):
        codes, norms = tq_hb.quantize(np.ones(head_dim, np.float32), 5, packing=packing)

        assert codes.shape == (head_dim if packing == "byte" else head_dim * 5 // 8,)
        assert norms.shape == ((2,) if head_dim == 512 else ())
        assert tq_hb.dequantize(codes, norms, 5, head_dim=head_dim, packing=packing).shape == (head_dim,)
        assert tq_hb.convert_packing(codes, 5, head_dim=head_dim, source=packing, target="byte").shape == (head_dim,)


class TestTmpBufferBytes:
    def test_sizes(self):
        assert tq_hb.tmp_buffer_bytes(16, 256) == 528_384
        assert tq_hb.tmp_buffer_bytes(16, 512) == 1_052_672
        assert tq_hb.tmp_buffer_bytes(16, 256, num_queries=3, splits=1) == 3 * 16 * 258 * 4

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("num_heads", {"num_heads": 0}),
            ("num_heads", {"num_heads": -1}),
            ("num_heads", {"num_heads": 1.5}),
            ("head_dim", {"head_dim": 96}),
            ("num_queries", {"num_queries": 0}),
            ("splits", {"splits": 0}),
            ("size", {"num_heads": 2**32 - 1, "num_queries": 2**32 - 1}),
        ],
        ids=str,
    )
    def test_refusals(self, name, arguments):
        values = {"num_heads": 16, "head_dim": 256, **arguments}
        with refusal("tmp_buffer_bytes", name):
            tq_hb.tmp_buffer_bytes(values.pop("num_heads"), values.pop("head_dim"), **values)


class TestRecorded:
    """The recorded form checks the same rules when an op is recorded, and then records nothing."""

    @pytest.fixture
    def buffers(self, device):
        return {
            "q": device.array(np.ones((4, 256), np.float32)),
            "k_packed": device.empty((2, 12, 256), np.uint8),
            "k_norms": device.empty((2, 12), np.float32),
            "v_packed": device.empty((2, 12, 256), np.uint8),
            "v_norms": device.empty((2, 12), np.float32),
            "output": device.array(np.full((4, 256), 7.0, np.float32)),
            "tmp": device.empty((tq_hb.tmp_buffer_bytes(4, 256) // 4,), np.float32),
        }

    @staticmethod
    def params(**changes):
        values = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 256, "kv_seq_len": 10, "kv_capacity": 12, "scale": 1.0}
        return tq_hb.FlashAttnVecTqHbParams(**{**values, **changes})

    def refuse(self, device, buffers, *parts, **changes):
        enc = device.encoder()
        with refusal(ATTEND, *parts):
            enc.flash_attn_vec_tq_hb(*buffers.values(), self.params(**changes))
        enc.commit_and_wait()
        assert (buffers["output"].numpy() == 7.0).all()

    @pytest.mark.parametrize(("name", "value", "rule"), BAD_ATTEND_PARAMS[:12])
    def test_bad_fields(self, device, buffers, name, value, rule):
        self.refuse(device, buffers, name, rule, "got", **{name: value})

    @pytest.mark.parametrize("name", ["q", "k_packed", "k_norms", "v_packed", "v_norms", "tmp"])
    def test_a_buffer_of_another_dtype(self, device, buffers, name):
        buffers[name] = device.empty(buffers[name].shape, np.int32)
        self.refuse(device, buffers, name, "got")

    @pytest.mark.parametrize("name", ["q", "k_packed", "k_norms", "v_packed", "v_norms"])
    def test_a_buffer_of_another_shape(self, device, buffers, name):
        buffers[name] = buffers[name][:1]
        self.refuse(device, buffers, name, "got")

    def test_a_tmp_that_is_too_small(self, device, buffers):
        buffers["tmp"] = buffers["tmp"][1:]
        self.refuse(device, buffers, "tmp", str(tq_hb.tmp_buffer_bytes(4, 256)), "got")

    @pytest.mark.parametrize("name", ["q", "tmp"])
    def test_output_may_not_overlap(self, device, buffers, name):
        rows = tq_hb.tmp_buffer_bytes(4, 256) // 1024 + 4
        storage = device.array(np.full((rows, 256), 7.0, np.float32))
        buffers["output"] = storage[:4]
        buffers[name] = storage[3:7] if name == "q" else storage[3:]
        self.refuse(device, buffers, r"\w+ must not overlap")

    def test_slices_of_one_buffer_that_do_not_overlap_are_fine(self, device, buffers):
        storage = device.array(np.full((8, 256), 7.0, np.float32))
        buffers["q"], buffers["output"] = storage[:4], storage[4:]
        enc = device.encoder()

        enc.flash_attn_vec_tq_hb(*buffers.values(), self.params())
        enc.commit_and_wait()

        assert (storage.numpy()[:4] == 7.0).all()
        assert (storage.numpy()[4:] == 0.0).all()

    def test_tmp_may_be_left_to_the_encoder(self, device, buffers):
        buffers["tmp"] = None
        enc = device.encoder()

        enc.flash_attn_vec_tq_hb(*buffers.values(), self.params())
        enc.commit_and_wait()

        assert (buffers["output"].numpy() == 0.0).all()

    @pytest.mark.parametrize(("name", "dtype"), [("q", np.uint8), ("k_packed", np.int32), ("v_norms", np.uint8)])
    def test_arrays_of_another_dtype(self, device, buffers, name, dtype):
        wanted = "uint8" if name == "k_packed" else "float32"
        changed = buffers | {name: np.ones(buffers[name].shape, dtype)}
        self.refuse(device, changed, name, "dtype", wanted, "got")

    def test_what_is_written_must_be_a_buffer(self, device, buffers):
        buffers["output"] = np.zeros((4, 256), np.float32)
        with refusal(ATTEND, "output", "got"):
            device.encoder().flash_attn_vec_tq_hb(*buffers.values(), self.params())

    def test_return_lse_needs_a_buffer_to_write(self, device, buffers):
        enc = device.encoder()
        with refusal(ATTEND, "return_lse", "lse=", "got True"):
            enc.flash_attn_vec_tq_hb(*buffers.values(), self.params(), return_lse=True)
        with refusal(ATTEND, "lse", "must be a Buffer", "got ndarray"):
            enc.flash_attn_vec_tq_hb(*buffers.values(), self.params(), lse=np.zeros(4, np.float32))
        assert enc.kernels == ()

    @pytest.mark.parametrize("return_lse", [False, True])
    def test_lse_is_written_where_there_is_a_buffer(self, device, buffers, return_lse):
        lse = device.array(np.full(4, 7.0, np.float32))
        enc = device.encoder()
        enc.flash_attn_vec_tq_hb(*buffers.values(), self.params(), lse=lse, return_lse=return_lse)
        enc.commit_and_wait()
        np.testing.assert_allclose(lse.numpy(), np.log(10.0), rtol=1e-6)

    @pytest.mark.parametrize("name", ["sinks", "lse"])
    @pytest.mark.parametrize(
        ("shape", "dtype"), [((3,), np.float32), ((1, 4), np.float32), ((4,), np.int32)], ids=["short", "2d", "int32"]
    )
    def test_optional_buffers_that_do_not_fit(self, device, buffers, name, shape, dtype):
        enc = device.encoder()
        with refusal(ATTEND, name, "got"):
            enc.flash_attn_vec_tq_hb(*buffers.values(), self.params(), **{name: device.empty(shape, dtype)})
        assert enc.kernels == ()

    def test_lse_may_not_overlap(self, device, buffers):
        storage = device.array(np.full((3, 4), 7.0, np.float32))
        enc = device.encoder()
        with refusal(ATTEND, "lse", "must not overlap sinks", "got"):
            enc.flash_attn_vec_tq_hb(*buffers.values(), self.params(), sinks=storage[1], lse=storage[1])
        enc.flash_attn_vec_tq_hb(*buffers.values(), self.params(), sinks=storage[0], lse=storage[1])
        enc.commit_and_wait()
        assert (storage.numpy()[[0, 2]] == 7.0).all()

    def test_tmp_grows_with_the_queries(self, device, buffers):
        buffers["q"] = device.array(np.ones((3, 4, 256), np.float32))
        buffers["output"] = device.array(np.full((3, 4, 256), 7.0, np.float32))
        self.refuse(device, buffers, "tmp", str(tq_hb.tmp_buffer_bytes(4, 256, num_queries=3)), "got")

    def test_no_queries(self, device, buffers):
        buffers["q"] = device.empty((0, 4, 256))
        self.refuse(device, buffers, "q", "at least one query", "got 0")

    @pytest.mark.parametrize("op", ["fwht_sign_premult_f32", "fwht_sign_undo_f32"])
    def test_rotations_take_float32_rows_of_a_known_size(self, device, op):
        enc = device.encoder()
        with refusal(op, "head_dim", "got 96"):
            getattr(enc, op)(device.empty((4, 96), np.float32))
        with refusal(op, "x", "float32", "got"):
            getattr(enc, op)(device.empty((4, 256), np.int32))

    def test_encode_checks_ring_and_capacity(self, device, buffers):
        src = device.array(np.ones((3, 2, 256), np.float32))
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=2, write_pos=10, cache_capacity=12)
        enc = device.encoder()

        with refusal(ENCODE, "write_pos", "got 10"):
            enc.hadamard_quantize_kv_hb(src, buffers["k_packed"], buffers["k_norms"], hp)
        enc.commit_and_wait()

        assert not buffers["k_packed"].numpy().any()


def test_params_can_be_copied_and_pickled():
    hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=512, num_kv_heads=3, write_pos=7, cache_capacity=9, codebook_bits=5)
    for other in (copy.copy(hp), copy.deepcopy(hp), pickle.loads(pickle.dumps(hp))):
        assert other == hp
        other.write_pos = 1
        assert hp.write_pos == 7
