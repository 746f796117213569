"""KVCache end to end: real vectors in, attention out, against the reference on the bytes of the format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import reference
import tolerance
import tq_hb
from cases import cover_pairs


@dataclass(frozen=True)
class Setting:
    """One cache, how it is filled, and the queries on it."""

    head_dim: int
    heads: tuple[int, int]
    bits: tuple[int, int]
    codebook: str
    packing: str
    k_mean: bool
    appends: tuple[int, ...]
    sliding_window: int | None
    spare: int | None  # capacity beyond what is needed; None lets the cache choose, where it can
    queries: int | None  # None: a query without that axis
    stand: str  # where the last query stands
    softcap: float
    sinks: bool
    scale: float | None

    def __str__(self) -> str:
        return ",".join(str(value).replace(" ", "") for value in vars(self).values())

    @property
    def total(self) -> int:
        return sum(self.appends)

    @property
    def num_queries(self) -> int:
        """No more than there are positions."""
        return min(self.queries or 1, self.total)

    @property
    def q_offset(self) -> int | None:
        """Position of the last query, as the caller gives it."""
        if self.stand == "newest":
            return None
        if self.stand == "back":
            return max(self.num_queries - 1, self.total - 3)
        return self.total + {"beyond": 2, "far beyond": 5000}[self.stand]

    @property
    def last(self) -> int:
        return self.total - 1 if self.q_offset is None else self.q_offset

    @property
    def capacity(self) -> int | None:
        needed = self.total
        if self.sliding_window is not None:
            oldest_seen = max(0, self.last - self.num_queries + 2 - self.sliding_window)
            needed = max(self.sliding_window, self.total - oldest_seen)
            if self.spare is None and needed == self.sliding_window:
                return None
        elif self.spare is None:
            return None
        return needed + (self.spare or 0)

    def ranges(self) -> list[tuple[int, int]]:
        """Positions that each query sees, the end left out."""
        positions = range(self.last - self.num_queries + 1, self.last + 1)
        ends = [min(position + 1, self.total) for position in positions]
        begins = [max(0, p + 1 - self.sliding_window) if self.sliding_window else 0 for p in positions]
        return [(min(begin, end), end) for begin, end in zip(begins, ends, strict=True)]

    def mean(self) -> np.ndarray | None:
        if not self.k_mean:
            return None
        shape = (self.heads[1], self.head_dim)
        return 2.0 * np.random.default_rng(2).standard_normal(shape).astype(np.float32)

    def make(self, device: tq_hb.Device, precision: str = "strict") -> tq_hb.KVCache:
        return tq_hb.KVCache(
            self.heads[1],
            self.head_dim,
            self.capacity,
            k_bits=self.bits[0],
            v_bits=self.bits[1],
            sliding_window=self.sliding_window,
            codebook=self.codebook,
            packing=self.packing,
            k_mean=self.mean(),
            precision=precision,
            device=device,
        )

    def query(self) -> np.ndarray:
        lead = () if self.queries is None else (self.num_queries,)
        shape = (*lead, self.heads[0], self.head_dim)
        return 3.0 * np.random.default_rng(1).standard_normal(shape).astype(np.float32)

    def keywords(self) -> dict[str, Any]:
        sinks = np.linspace(-3, 6, self.heads[0]).astype(np.float32) if self.sinks else None
        return {"scale": self.scale, "softcap": self.softcap, "sinks": sinks, "q_offset": self.q_offset}

    def decoded(self, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the bytes of the cache stand for, token-major, in float64."""
        mean = np.float32(0) if self.mean() is None else self.mean()
        (k_hat, v_hat) = (
            reference.unrotate(reference.decode(*reference.encode_float32(x, b, self.codebook), b, self.codebook))
            for x, b in ((k - mean, self.bits[0]), (v, self.bits[1]))
        )
        return k_hat + mean, v_hat

    def expected(self, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Output and lse."""
        k_hat, v_hat = (x.swapaxes(0, 1) for x in self.decoded(k, v))
        return reference.attend(
            self.query(),
            k_hat,
            v_hat,
            scale=self.head_dim**-0.5 if self.scale is None else self.scale,
            softcap=self.softcap,
            sinks=self.keywords()["sinks"],
            ranges=self.ranges(),
            return_lse=True,
        )


SETTINGS = [
    Setting(**row)
    for row in cover_pairs(
        {
            "head_dim": (64, 128, 256, 512),
            "heads": ((4, 1), (3, 3), (6, 2), (5, 1)),
            "bits": ((8, 8), (5, 5), (6, 6), (8, 6), (5, 8)),
            "codebook": ("lloyd_max", "mlx_native"),
            "packing": ("byte", "plane"),
            "k_mean": (False, True),
            "appends": ((1,), (31, 1), (33,), (20, 12, 1, 1), (513,), (300, 1, 700, 1)),
            "sliding_window": (None, 1, 31, 32, 64, 600),
            "spare": (None, 0, 7),
            "queries": (None, 1, 2, 8, 11),
            "stand": ("newest", "back", "beyond", "far beyond"),
            "softcap": (0.0, 5.0),
            "sinks": (False, True),
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


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    """Rows of queries that see nothing must be exactly zero, which a ratio of energies would not tell."""
    nothing = ~want.any(axis=-1)
    assert not got[nothing].any()
    if not nothing.all():
        assert tolerance.nmse(got, want) <= tolerance.ATTEND_NMSE


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_attend_matches_reference(device, setting):
    cache = setting.make(device)
    k, v = fill(cache, setting.appends, seed=setting.total)
    want, want_lse = setting.expected(k, v)

    got = cache.attend(setting.query(), **setting.keywords())
    again, lse = cache.attend(setting.query(), **setting.keywords(), return_lse=True)

    assert got.dtype == again.dtype == lse.dtype == np.float32
    assert_close(got, want)
    assert_close(again, want)
    assert tolerance.lse_error(lse, want_lse) <= tolerance.LSE_ERROR


# With a mean key scores have a standard deviation above 4, for which nothing is promised.
@pytest.mark.parametrize("setting", [s for s in SETTINGS if not s.k_mean], ids=str)
def test_attend_at_default_precision_keeps_its_promise(device, setting):
    cache = setting.make(device, "default")
    want, want_lse = setting.expected(*fill(cache, setting.appends, seed=setting.total))

    got, lse = cache.attend(setting.query(), **setting.keywords(), return_lse=True)

    sees = want.any(axis=-1)
    assert not got[~sees].any()
    if sees.any():
        assert tolerance.nmse(got[sees], want[sees]) ** 0.5 <= tolerance.PRECISION_L2["default"]
    assert tolerance.lse_error(lse, want_lse) <= tolerance.PRECISION_LSE["default"]


@pytest.mark.parametrize("setting", SETTINGS[::4], ids=str)
def test_dequantize_returns_what_is_held_oldest_first(device, setting):
    cache = setting.make(device)
    held = min(setting.total, cache.capacity)
    appended = fill(cache, setting.appends, seed=setting.total)

    assert len(cache) == held
    for got, want in zip(cache.dequantize(), setting.decoded(*appended), strict=True):
        assert got.dtype == np.float32
        assert tolerance.nmse(got, want[-held:]) <= tolerance.DECODE_UNROTATED_NMSE


@pytest.mark.parametrize("head_dim", tq_hb.supported_head_dims())
@pytest.mark.parametrize("bits", [(5, 6), (6, 5), (5, 8), (6, 6)], ids=str)
def test_the_packing_changes_no_bit_of_the_results(device, head_dim, bits):
    results = set()
    for packing in ("byte", "plane"):
        cache = tq_hb.KVCache(
            3, head_dim, k_bits=bits[0], v_bits=bits[1], sliding_window=40, packing=packing, device=device
        )
        fill(cache, (35, 1, 30), seed=4)
        q = np.random.default_rng(5).standard_normal((6, head_dim)).astype(np.float32)
        results.add(b"".join(x.tobytes() for x in (*cache.dequantize(), *cache.attend(q, return_lse=True))))
    assert len(results) == 1


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


@pytest.mark.parametrize("window", [None, 1, 20])
def test_several_queries_equal_decode_steps(device, window):
    """Each of several new tokens sees what it would have seen alone."""
    rng = np.random.default_rng(8)
    k, v = rng.standard_normal((2, 60, 2, 128)).astype(np.float32)
    q = rng.standard_normal((9, 4, 128)).astype(np.float32)
    capacity = None if window is None else window + 8
    stepwise, at_once = (tq_hb.KVCache(2, 128, capacity, sliding_window=window, device=device) for _ in range(2))
    stepwise.append(k[:51], v[:51])
    steps = []
    for t in range(9):
        stepwise.append(k[51 + t], v[51 + t])
        steps.append(stepwise.attend(q[t]))
    at_once.append(k, v)

    assert tolerance.nmse(at_once.attend(q), np.stack(steps)) <= tolerance.SPLIT_NMSE


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("sinks", [None, np.array([1.0, -np.inf, 30.0, -5.0], np.float32)], ids=["none", "sinks"])
def test_the_mean_key_makes_the_error_smaller_and_changes_nothing_else(device, softcap, sinks):
    """Keys with a large common part, of which 5 bits lose a lot."""
    rng = np.random.default_rng(9)
    mean = 4 * rng.standard_normal((2, 256)).astype(np.float32)
    k, v = rng.standard_normal((2, 200, 2, 256)).astype(np.float32)
    k += mean
    q = rng.standard_normal((4, 256)).astype(np.float32)
    want, want_lse = reference.attend(
        q, k.swapaxes(0, 1), v.swapaxes(0, 1), scale=1 / 16, softcap=softcap, sinks=sinks, return_lse=True
    )
    errors = {}
    for name, k_mean in (("with", mean), ("without", None)):
        cache = tq_hb.KVCache(2, 256, k_bits=5, v_bits=8, k_mean=k_mean, device=device)
        cache.append(k, v)
        got, lse = cache.attend(q, softcap=softcap, sinks=sinks, return_lse=True)
        errors[name] = tolerance.nmse(got, want), np.abs(lse - want_lse).max()

    assert errors["with"][0] < errors["without"][0] / 3
    assert errors["with"][1] < errors["without"][1]


@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_mean_key_a_hundred_times_the_rest_costs_no_accuracy(device, queries, with_sinks):
    """What is the same in all scores of a query must not swallow the last bits of what differs."""
    rng = np.random.default_rng(10)
    mean = 100 * rng.standard_normal((2, 256)).astype(np.float32)
    k, v = rng.standard_normal((2, 300, 2, 256)).astype(np.float32)
    q = rng.standard_normal((queries, 4, 256)).astype(np.float32)
    cache = tq_hb.KVCache(2, 256, k_mean=mean, precision="strict", device=device)
    cache.append(k + mean, v)
    shift = np.einsum("nghd,gd->ngh", q.reshape(queries, 2, 2, 256), mean, dtype=np.float64).reshape(queries, 4) / 16
    # Sinks that weigh about as much as the keys of the last query.
    sinks = (shift[-1] + 5).astype(np.float32) if with_sinks else None
    plain = tq_hb.KVCache(2, 256, device=device)
    plain.append((k + mean) - mean, v)
    k_hat, v_hat = (x.swapaxes(0, 1).astype(np.float64) for x in plain.dequantize())

    got, lse = cache.attend(q, sinks=sinks, return_lse=True)

    want, want_lse = reference.attend(
        q,
        k_hat,
        v_hat,
        scale=1 / 16,
        bias=shift,
        sinks=sinks,
        ranges=[(0, 300 - queries + 1 + i) for i in range(queries)],
        return_lse=True,
    )
    assert tolerance.nmse(got, want) <= tolerance.ATTEND_NMSE
    assert tolerance.lse_error(lse, want_lse) <= tolerance.LSE_ERROR
