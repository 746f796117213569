"""Every rule about the arguments of attention: what is refused, in which words, and that nothing was written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import tq_hb
from refusals import ATTEND, BAD_ATTEND_PARAMS, NOT_A_U32, changed, refusal

ATTEND_PARAMS = "(flash_attn_vec_tq_hb|FlashAttnVecTqHbParams)"


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


@pytest.mark.parametrize("op", [None, 3, b"attend"])
def test_params_validate_in_the_name_of_a_string(op):
    params = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=0, cache_capacity=4)
    with refusal(r"HadamardQuantizeKvHbParams\.validate", "op", f"must be a string, got {op!r}"):
        params.validate(op)


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
