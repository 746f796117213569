"""Runs one attention call on the simulated Metal device and returns what the simulator counted."""

from __future__ import annotations

import ctypes
import json
import os
from typing import Any

import numpy as np

import tq_hb
from tq_hb import _core
from tq_hb.options import norms_shape

# Slots of csrc/core/abi.h, as the simulator names buffers without a label.
_QUERY, _WRITTEN = "<slot 1>", "<slot 6>"
_CODES, _NORMS = ("<slot 2>", "<slot 4>"), ("<slot 3>", "<slot 5>")


def simulated_device() -> tq_hb.Device | None:
    """Return the metal device if it is the simulated one, with every access counted."""
    os.environ["METAL_SIM_CHECK"] = "1"
    try:
        device = tq_hb.Device("metal")
    except (tq_hb.UnsupportedError, tq_hb.DeviceError):
        return None
    return device if device.is_simulated else None


def params(heads: int, kv_heads: int, head_dim: int, keys: int, *, k_bits: int = 8) -> tq_hb.FlashAttnVecTqHbParams:
    """Return the params of a call that sees `keys` keys in a cache of just that capacity."""
    return tq_hb.FlashAttnVecTqHbParams(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        kv_seq_len=keys,
        kv_capacity=keys,
        scale=head_dim**-0.5,
        codebook_bits=k_bits,
        nsg=tq_hb.compute_nsg(keys),
    )


def run(
    device: tq_hb.Device,
    p: tq_hb.FlashAttnVecTqHbParams,
    *,
    kernel: str,
    nwg: int | None,
    v_bits: int,
    packing: str,
) -> dict[str, int]:
    """Run one call on random codes; return the counts of the attention kernel, which must be `kernel`."""
    rng = np.random.default_rng(p.kv_seq_len)
    q = rng.standard_normal((p.num_heads, p.head_dim), dtype=np.float32)
    rows = (p.num_kv_heads, p.kv_capacity)
    k, v = (
        rng.integers(0, 256, (*rows, _core.row_bytes(packing, bits, p.head_dim)), dtype=np.uint8)
        for bits in (p.codebook_bits, v_bits)
    )
    norms = np.ones(norms_shape(rows, p.head_dim), np.float32)
    _statistics(reset=True)
    options: dict[str, Any] = {"nwg": nwg, "v_bits": v_bits, "packing": packing, "device": device}
    tq_hb.flash_attn_vec_tq_hb(q, k, norms, v, norms, p, **options)
    counts = _statistics()["kernels"][kernel]
    buffers = counts["buffers"]
    return {
        "code_bytes": sum(buffers[slot]["read"] for slot in _CODES),
        "norm_bytes": sum(buffers[slot]["read"] for slot in _NORMS),
        "query_bytes": buffers[_QUERY]["read"],
        "written_bytes": buffers[_WRITTEN]["written"],
        "simd_operations": counts["simd_operations"],
        "threadgroup_barriers": counts["threadgroup_barriers"],
        "threadgroup_bytes": counts["threadgroup_bytes"],
    }


def _statistics(*, reset: bool = False) -> dict[str, Any]:
    """Return the simulator's counts since the last reset."""
    module = ctypes.CDLL(_core.__file__)
    if reset:
        module.metal_sim_reset_statistics()
    module.metal_sim_statistics.restype = ctypes.c_size_t
    module.metal_sim_statistics.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    size = module.metal_sim_statistics(None, 0)
    text = ctypes.create_string_buffer(size + 1)
    module.metal_sim_statistics(text, size + 1)
    counted: dict[str, Any] = json.loads(text.value)
    return counted
