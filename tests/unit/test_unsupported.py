"""What the signatures already name but no backend offers yet: refused by name, never ignored."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tq_hb


def unsupported(*parts: str):
    return pytest.raises(tq_hb.UnsupportedError, match=".*".join(map(re.escape, parts)))


def attend(head_dim: int = 256, q_shape: tuple[int, ...] | None = None, **keywords):
    p = tq_hb.FlashAttnVecTqHbParams(
        num_heads=2, num_kv_heads=1, head_dim=head_dim, kv_seq_len=1, kv_capacity=1, scale=1.0
    )
    packed, norms = np.zeros((1, 1, head_dim), np.uint8), np.zeros((1, 1), np.float32)
    q = np.zeros(q_shape or (2, head_dim), np.float32)
    return tq_hb.flash_attn_vec_tq_hb(q, packed, norms, packed, norms, p, **keywords)


def filled_cache(**keywords) -> tq_hb.KVCache:
    cache = tq_hb.KVCache(1, 256, **keywords)
    cache.append(np.ones((3, 1, 256), np.float32), np.ones((3, 1, 256), np.float32))
    return cache


def test_the_classes_of_errors():
    assert issubclass(tq_hb.InvalidArgument, ValueError)
    assert issubclass(tq_hb.UnsupportedError, NotImplementedError)
    assert issubclass(tq_hb.DeviceError, RuntimeError)
    assert issubclass(tq_hb.OutOfMemoryError, tq_hb.DeviceError)
    assert issubclass(tq_hb.OutOfMemoryError, MemoryError)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_small_heads(head_dim):
    x = np.zeros((2, head_dim), np.float32)
    name = f"head_dim {head_dim}"
    with unsupported("quantize", name):
        tq_hb.quantize(x, 8)
    with unsupported("rotate", name):
        tq_hb.rotate(x)
    with unsupported("signs", name):
        tq_hb.signs(head_dim)
    with unsupported("flash_attn_vec_tq_hb", name):
        attend(head_dim)
    with unsupported("KVCache", name):
        tq_hb.KVCache(1, head_dim)


def test_plane_packing():
    with unsupported("quantize", "plane"):
        tq_hb.quantize(np.zeros((2, 256), np.float32), 5, packing="plane")
    with unsupported("dequantize", "plane"):
        tq_hb.dequantize(np.zeros((2, 160), np.uint8), np.zeros(2, np.float32), 5, head_dim=256, packing="plane")
    with unsupported("flash_attn_vec_tq_hb", "plane"):
        attend(packing="plane")
    with unsupported("KVCache", "plane"):
        tq_hb.KVCache(1, 256, packing="plane")


def test_sinks_and_lse():
    with unsupported("flash_attn_vec_tq_hb", "sinks"):
        attend(sinks=np.zeros(2, np.float32))
    with unsupported("flash_attn_vec_tq_hb", "return_lse"):
        attend(return_lse=True)
    q = np.ones((2, 256), np.float32)
    with unsupported("attend", "sinks"):
        filled_cache().attend(q, sinks=np.zeros(2, np.float32))
    with unsupported("attend", "return_lse"):
        filled_cache().attend(q, return_lse=True)


def test_several_queries():
    with unsupported("flash_attn_vec_tq_hb", "quer"):
        attend(q_shape=(2, 2, 256))
    with unsupported("attend", "quer"):
        filled_cache().attend(np.ones((2, 2, 256), np.float32))


def test_no_queries_are_an_error_of_the_caller():
    with pytest.raises(tq_hb.InvalidArgument, match="q"):
        attend(q_shape=(0, 2, 256))
    with pytest.raises(tq_hb.InvalidArgument, match="q"):
        filled_cache().attend(np.ones((0, 2, 256), np.float32))


def test_query_offset():
    with unsupported("attend", "q_offset"):
        filled_cache().attend(np.ones((2, 256), np.float32), q_offset=1)


def test_mean_of_the_keys():
    with unsupported("KVCache", "k_mean"):
        tq_hb.KVCache(1, 256, k_mean=np.zeros((1, 256), np.float32))


def test_saving(tmp_path):
    with unsupported("save"):
        filled_cache().save(tmp_path / "cache")
    with unsupported("load"):
        tq_hb.KVCache.load(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["metal", "cuda"])
def test_a_backend_that_is_not_here_says_why(backend):
    info = next(d for d in tq_hb.devices() if d.backend == backend)
    if info.available:
        pytest.skip(f"backend {backend!r} is available here")
    assert info.reason
    with pytest.raises(tq_hb.DeviceError, match=f"{backend}.*{re.escape(info.reason)}"):
        tq_hb.Device(backend)
