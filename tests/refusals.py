"""Arguments that are wrong in one way, and what the error must say."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tq_hb

ATTEND = "flash_attn_vec_tq_hb(_with_fused_undo)?"
ENCODE = "hadamard_quantize_kv_hb"
NAN, INF = float("nan"), float("inf")

NOT_A_U32 = (-1, 2**32, 2**64, 1.5, NAN, "4", None)
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


def refusal(op: str, field: str, *rest: str):
    """An InvalidArgument that says ``op: field rule, got value``, with ``rest`` in rule and value."""
    return pytest.raises(tq_hb.InvalidArgument, match=rf"^{op}: {field} .*" + ".*".join(map(re.escape, rest)))


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
