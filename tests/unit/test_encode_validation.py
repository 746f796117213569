"""Every rule about the arguments of the ops that encode and decode a cache, and that nothing was written."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import tq_hb
from refusals import ENCODE, NAN, NOT_A_U32, changed, refusal

ENCODE_PARAMS = "(hadamard_quantize_kv_hb|HadamardQuantizeKvHbParams)"


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


def test_params_can_be_copied_and_pickled():
    hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=512, num_kv_heads=3, write_pos=7, cache_capacity=9, codebook_bits=5)
    for other in (copy.copy(hp), copy.deepcopy(hp), pickle.loads(pickle.dumps(hp))):
        assert other == hp
        other.write_pos = 1
        assert hp.write_pos == 7
