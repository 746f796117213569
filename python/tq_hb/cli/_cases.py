"""The two jobs that `tq-hb bench` and ``bench/`` measure, each checked before it is timed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import tq_hb
from tq_hb.cli._sampling import Call, PlainRead, Timing, Track, buffers_to_stay_cold, sample

Array = npt.NDArray[np.float32]

# Relative L2 error against float64 attention on the same codes, as the precision promises.
_ATTEND_LIMIT = {"strict": 1e-5, "default": 5e-4}
# Relative squared error of a round trip of normal values: what the codebooks give in theory, with a quarter to spare.
_ROUND_TRIP_LIMIT = {5: 3.2e-3, 6: 8.2e-4, 8: 8.0e-5}
_APPEND_RUN_TOKENS = 256


@dataclass(frozen=True)
class Shape:
    """What one layer's cache holds, and how many heads query it."""

    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 256
    kv_len: int = 4096
    k_bits: int = 8
    v_bits: int = 8
    packing: str = "byte"

    @property
    def kv_values(self) -> int:
        """The number of values in K and V together."""
        return 2 * self.kv_len * self.kv_heads * self.head_dim


def measure_attend(
    shape: Shape,
    *,
    samples: int,
    device: str | tq_hb.Device | None = None,
    peers: bool = True,
    track: Track = iter,
) -> dict[str, Any]:
    """Time one token's attention on cold caches, against torch's attention on float caches of the same shape.

    Returns
    -------
    dict
        ``shape``, ``plan``, ``error``, ``read_gb_s`` and ``rows``, a row per contender.

    Raises
    ------
    RuntimeError
        If the output is not that of float64 attention on the same codes.
    """
    cache = _new_cache(shape, device)  # first: it refuses shapes that there is no room for
    rng = np.random.default_rng(shape.kv_len)
    q = rng.standard_normal((shape.heads, shape.head_dim), dtype=np.float32)
    k, v = rng.standard_normal((2, shape.kv_len, shape.kv_heads, shape.head_dim), dtype=np.float32)
    cache.append(k, v)
    out = cache.attend(q)
    plan = cache.last_plan
    assert plan is not None
    error = check_attention(out, attention64(q, *cache.dequantize()), plan.precision)

    nbytes = shape.kv_len * cache.bytes_per_token
    copies = [cache.copy() for _ in range(buffers_to_stay_cold(nbytes))]
    calls: dict[str, Call] = {"tq_hb": lambda i: copies[i % len(copies)].attend(q)}
    read_bytes = {"tq_hb": nbytes}
    if peers:
        for name, itemsize, call in _torch_attention(shape, q, k, v):
            calls[name] = call
            read_bytes[name] = shape.kv_values * itemsize
    timings, read_gb_s = _sample_with_read(calls, samples, track)
    return {
        "op": "attend",
        "shape": dataclasses.asdict(shape),
        "plan": dataclasses.asdict(plan),
        "error": {"same_codes": error, "unquantised": relative_l2(out, attention64(q, k, v))},
        "read_gb_s": read_gb_s,
        "rows": [_row(name, timing, read_bytes[name], read_gb_s) for name, timing in timings.items()],
    }


def measure_append(
    shape: Shape, *, samples: int, device: str | tq_hb.Device | None = None, track: Track = iter
) -> dict[str, Any]:
    """Time the encoding of one token and of a run of tokens into a ring of ``kv_len`` slots.

    Returns
    -------
    dict
        ``shape``, ``error``, ``read_gb_s`` and ``rows``, a row per run length; ``nbytes`` counts the floats read.

    Raises
    ------
    RuntimeError
        If what was stored is further from what was appended than the codebooks allow.
    """
    cache = _new_cache(shape, device, sliding_window=shape.kv_len)
    rng = np.random.default_rng(shape.kv_len)
    run = min(_APPEND_RUN_TOKENS, shape.kv_len)
    k, v = rng.standard_normal((2, run, shape.kv_heads, shape.head_dim), dtype=np.float32)
    cache.append(k, v)
    errors = {}
    for name, bits, stored, given in zip("kv", (shape.k_bits, shape.v_bits), cache.dequantize(), (k, v), strict=True):
        errors[name] = relative_l2(stored, given) ** 2
        _require(errors[name] <= _ROUND_TRIP_LIMIT[bits], f"append loses {errors[name]:.1e} of {name}'s energy")

    token_bytes = k[0].nbytes + v[0].nbytes
    calls: dict[str, Call] = {"1 token": lambda i: cache.append(k[i % run], v[i % run])}
    read_bytes = {"1 token": token_bytes}
    if run > 1:
        calls[f"{run} tokens"] = lambda _: cache.append(k, v)
        read_bytes[f"{run} tokens"] = run * token_bytes
    timings, read_gb_s = _sample_with_read(calls, samples, track)
    return {
        "op": "append",
        "shape": dataclasses.asdict(shape),
        "error": errors,
        "read_gb_s": read_gb_s,
        "rows": [_row(name, timing, read_bytes[name], read_gb_s) for name, timing in timings.items()],
    }


def check_attention(out: Array, want: npt.NDArray[np.float64], precision: str) -> float:
    """Return how far attention is from float64 attention on the same codes; raise if further than the class allows."""
    error = relative_l2(out, want)
    _require(error <= _ATTEND_LIMIT[precision], f"attend is off by {error:.1e} from float64 attention")
    return error


def attention64(q: Array, k: Array, v: Array) -> npt.NDArray[np.float64]:
    """Return softmax(q k^T / sqrt(D)) v in float64; q is (heads, D), k and v are (tokens, kv_heads, D)."""
    group = q.shape[0] // k.shape[1]
    out = np.empty(q.shape, np.float64)
    for head in range(k.shape[1]):
        rows = slice(head * group, (head + 1) * group)
        keys, values = k[:, head].astype(np.float64), v[:, head].astype(np.float64)
        scores = q[rows] @ keys.T * q.shape[1] ** -0.5
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[rows] = weights @ values / weights.sum(axis=1, keepdims=True)
    return out


def relative_l2(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> float:
    """Return ``|got - want| / |want|``."""
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


def _new_cache(shape: Shape, device: str | tq_hb.Device | None, sliding_window: int | None = None) -> tq_hb.KVCache:
    return tq_hb.KVCache(
        shape.kv_heads,
        shape.head_dim,
        shape.kv_len,
        k_bits=shape.k_bits,
        v_bits=shape.v_bits,
        sliding_window=sliding_window,
        packing=shape.packing,
        device=device,
    )


def _torch_attention(shape: Shape, q: Array, k: Array, v: Array) -> list[tuple[str, int, Call]]:
    """Return torch's attention per dtype as (name, bytes per value, call); none without torch.

    The query heads of a KV head go in as rows of one query, which was faster than ``enable_gqa`` wherever we tried.
    """
    try:
        import torch
    except ImportError:
        return []
    torch.set_num_threads(tq_hb.num_threads())
    attend = torch.nn.functional.scaled_dot_product_attention
    query = torch.from_numpy(q).view(1, shape.kv_heads, -1, shape.head_dim)
    keys, values = (torch.from_numpy(x).permute(1, 0, 2).unsqueeze(0).contiguous() for x in (k, v))

    def contender(dtype: torch.dtype) -> Call:
        count = buffers_to_stay_cold(shape.kv_values * dtype.itemsize)
        copies = [(keys.to(dtype, copy=True), values.to(dtype, copy=True)) for _ in range(count)]
        typed_query = query.to(dtype)

        def call(i: int) -> object:
            with torch.inference_mode():
                return attend(typed_query, *copies[i % count])

        return call

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return [(f"torch {name}", dtype.itemsize, contender(dtype)) for name, dtype in dtypes.items()]


def _sample_with_read(calls: dict[str, Call], samples: int, track: Track) -> tuple[dict[str, Timing], float]:
    timings = sample({**calls, "read": PlainRead(tq_hb.num_threads())}, samples, track)
    return timings, timings.pop("read").gb_s(PlainRead.nbytes)


def _row(name: str, timing: Timing, nbytes: int, read_gb_s: float) -> dict[str, Any]:
    gb_s = timing.gb_s(nbytes)
    return {
        "name": name,
        **dataclasses.asdict(timing),
        "nbytes": nbytes,
        "gb_s": gb_s,
        "share_of_read": gb_s / read_gb_s,
    }


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"the result is wrong, so it was not timed: {message}")
