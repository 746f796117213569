"""KVCache end to end: real vectors in, attention out, against the reference on the bytes of the format."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

import reference
import tolerance
import tq_hb
from cases import cover_pairs


@dataclass(frozen=True)
class Setting:
    """One cache, how it is filled, and the query on it."""

    head_dim: int
    heads: tuple[int, int]
    bits: tuple[int, int]
    codebook: str
    appends: tuple[int, ...]
    sliding_window: int | None
    spare: int | None  # capacity beyond what is needed; None lets the cache choose
    softcap: float
    scale: float | None

    def __str__(self) -> str:
        return ",".join(str(value).replace(" ", "") for value in vars(self).values())


SETTINGS = [
    Setting(**row)
    for row in cover_pairs(
        {
            "head_dim": (256, 512),
            "heads": ((4, 1), (3, 3), (6, 2), (5, 1)),
            "bits": ((8, 8), (5, 5), (6, 6), (8, 6), (5, 8)),
            "codebook": ("lloyd_max", "mlx_native"),
            "appends": ((1,), (31, 1), (33,), (20, 12, 1, 1), (513,), (300, 1, 700, 1)),
            "sliding_window": (None, 1, 31, 32, 64, 600),
            "spare": (None, 0, 7),
            "softcap": (0.0, 5.0),
            "scale": (None, 0.02),
        }
    )
]


def fill(cache: tq_hb.KVCache, appends: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Appends runs of Gaussian tokens and returns all of them."""
    rng = np.random.default_rng(seed)
    runs = [rng.standard_normal((2, n, cache.num_kv_heads, cache.head_dim)).astype(np.float32) for n in appends]
    for k, v in runs:
        cache.append(k, v)
    k, v = np.concatenate(runs, axis=1)
    return k, v


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_attend_matches_reference(device, setting):
    num_heads, num_kv_heads = setting.heads
    k_bits, v_bits = setting.bits
    total, window = sum(setting.appends), setting.sliding_window
    capacity = None if setting.spare is None else setting.spare + (window or total)
    cache = tq_hb.KVCache(
        num_kv_heads,
        setting.head_dim,
        capacity,
        k_bits=k_bits,
        v_bits=v_bits,
        sliding_window=window,
        codebook=setting.codebook,
        device=device,
    )
    k, v = fill(cache, setting.appends, seed=total)
    q = 3.0 * np.random.default_rng(1).standard_normal((num_heads, setting.head_dim)).astype(np.float32)

    got = cache.attend(q, scale=setting.scale, softcap=setting.softcap)

    def decoded(x: np.ndarray, cbits: int) -> np.ndarray:
        visible = x[-window:] if window else x
        codes, norms = reference.encode_float32(visible.swapaxes(0, 1), cbits, setting.codebook)
        return reference.unrotate(reference.decode(codes, norms, cbits, setting.codebook))

    scale = setting.head_dim**-0.5 if setting.scale is None else setting.scale
    want = reference.attend(q, decoded(k, k_bits), decoded(v, v_bits), scale=scale, softcap=setting.softcap)
    assert got.dtype == np.float32
    assert tolerance.nmse(got, want) <= tolerance.ATTEND_NMSE


@pytest.mark.parametrize("setting", SETTINGS[::4], ids=str)
def test_dequantize_returns_what_is_held_oldest_first(device, setting):
    num_kv_heads = setting.heads[1]
    k_bits, v_bits = setting.bits
    total, window = sum(setting.appends), setting.sliding_window
    capacity = None if setting.spare is None else setting.spare + (window or total)
    cache = tq_hb.KVCache(
        num_kv_heads, setting.head_dim, capacity, k_bits=k_bits, v_bits=v_bits, sliding_window=window,
        codebook=setting.codebook, device=device,
    )  # fmt: skip
    held = min(total, cache.capacity) if window else total
    appended = fill(cache, setting.appends, seed=total)

    assert len(cache) == held
    for got, x, cbits in zip(cache.dequantize(), appended, (k_bits, v_bits), strict=True):
        codes, norms = reference.encode_float32(x[-held:], cbits, setting.codebook)
        want = reference.unrotate(reference.decode(codes, norms, cbits, setting.codebook))
        assert got.dtype == np.float32
        assert tolerance.nmse(got, want) <= tolerance.DECODE_UNROTATED_NMSE


@pytest.mark.parametrize("nsg", ["1", "2", "4"])
@pytest.mark.parametrize("nwg", ["1", "7", "32"])
def test_the_split_chosen_by_the_environment_serves_the_call(device, environment, nsg, nwg):
    cache = tq_hb.KVCache(2, 256, sliding_window=100, device=device)
    fill(cache, (150,), seed=5)
    q = np.random.default_rng(6).standard_normal((4, 256)).astype(np.float32)
    by_policy = cache.attend(q)
    environment(HF2Q_TQ_NSG=nsg, HF2Q_TQ_NWG=nwg)

    got = cache.attend(q)

    assert (cache.last_plan.nsg, cache.last_plan.nwg) == (int(nsg), int(nwg))
    assert cache.last_plan.backend == device.backend
    assert tolerance.nmse(got, by_policy) <= tolerance.SPLIT_NMSE


def test_prefill_of_a_run_then_decode_steps_equals_one_long_run(device):
    """A prefill must reach the cache that decode steps read."""
    rng = np.random.default_rng(7)
    k, v = rng.standard_normal((2, 80, 2, 256)).astype(np.float32)
    q = rng.standard_normal((4, 256)).astype(np.float32)
    stepwise, at_once = tq_hb.KVCache(2, 256, device=device), tq_hb.KVCache(2, 256, device=device)
    stepwise.append(k[:70], v[:70])
    for t in range(70, 80):
        stepwise.append(k[t], v[t])
    at_once.append(k, v)

    assert np.array_equal(stepwise.attend(q), at_once.attend(q))
