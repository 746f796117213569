"""Attention problems to solve: shapes that cover the corners, and data with a seed."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

import reference
import tq_hb

SINKS = {
    "finite": lambda heads, rng: 3.0 * rng.standard_normal(heads),
    "some": lambda heads, rng: np.where(np.arange(heads) % 2, 3.0 * rng.standard_normal(heads), -np.inf),
    "off": lambda heads, rng: np.full(heads, -np.inf),
    "dominant": lambda heads, rng: 15.0 + rng.standard_normal(heads),
}


@dataclass(frozen=True)
class Case:
    """One call of the attention op, and the seed of its data."""

    head_dim: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    kv_seq_len: int = 70
    kv_capacity: int = 80
    ring_start: int = 0
    window: int = 0
    softcap: float = 0.0
    k_bits: int = 8
    v_bits: int = 8
    codebook: str = "lloyd_max"
    packing: str = "byte"
    precision: str = "strict"
    scale_factor_d512: float = 1.0
    fuse_fwht_pre: int = 0
    num_queries: int | None = None  # None: q is (H, D)
    sinks: str = "none"  # or a key of SINKS
    return_lse: bool = False
    nsg: int = 1
    nwg: int | None = 1  # None: the policy's kernel and split
    seed: int = 0

    def __str__(self) -> str:
        """All of it that is not the default, in the form that ``Case(...)`` takes."""
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(f"{name}={getattr(self, name)}" for name in changed) or "default"

    @property
    def visible(self) -> reference.Visible:
        return reference.Visible(self.kv_seq_len, self.kv_capacity, self.ring_start, self.window, self.num_queries or 1)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def params(self) -> tq_hb.FlashAttnVecTqHbParams:
        return tq_hb.FlashAttnVecTqHbParams(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            kv_seq_len=self.kv_seq_len,
            kv_capacity=self.kv_capacity,
            scale=self.scale,
            mask_type=2 if self.window else 0,
            sliding_window=self.window,
            softcap=self.softcap,
            ring_start=self.ring_start,
            scale_factor_d512=self.scale_factor_d512,
            codebook_bits=self.k_bits,
            fuse_fwht_pre=self.fuse_fwht_pre,
            nsg=self.nsg,
        )

    def keywords(self) -> dict[str, Any]:
        """What the op takes beside the buffers, the params and the sinks."""
        return {
            "nwg": self.nwg,
            "v_bits": self.v_bits,
            "codebook": self.codebook,
            "packing": self.packing,
            "precision": self.precision,
            "return_lse": self.return_lse,
        }


@dataclass(frozen=True)
class Problem:
    """The buffers of a case. Slots that no query sees hold NaN norms."""

    q: np.ndarray  # as the op takes it: rotated unless fuse_fwht_pre
    k_packed: np.ndarray
    k_norms: np.ndarray
    v_packed: np.ndarray
    v_norms: np.ndarray
    sinks: np.ndarray | None

    def buffers(self) -> tuple[np.ndarray, ...]:
        return self.q, self.k_packed, self.k_norms, self.v_packed, self.v_norms


def codes_of(case: Case, packed: np.ndarray, cbits: int) -> np.ndarray:
    """One byte per code, whatever the packing of the case."""
    return packed if case.packing == "byte" else reference.unpack_planes(packed, cbits, case.head_dim)


def make_problem(case: Case) -> Problem:
    """Codes of Gaussian keys and values, drawn in the rotated domain; read-only arrays."""
    rng = np.random.default_rng(case.seed)
    rows = (case.num_kv_heads, case.kv_capacity)
    norms_shape = reference.norms_shape(case.head_dim, *rows)
    typical_norm = reference.unit_norm(case.head_dim)
    unseen = np.ones(case.kv_capacity, bool)
    unseen[case.visible.slots()] = False

    def draw(cbits: int) -> tuple[np.ndarray, np.ndarray]:
        v = rng.standard_normal((*rows, case.head_dim)) * case.scale_factor_d512
        codes = np.searchsorted(reference.boundaries(cbits, case.codebook), v).astype(np.uint8)
        norms = (typical_norm * rng.uniform(0.5, 1.5, norms_shape)).astype(np.float32)
        norms[:, unseen] = np.nan
        return codes if case.packing == "byte" else reference.pack_planes(codes, cbits), norms

    k_packed, k_norms = draw(case.k_bits)
    v_packed, v_norms = draw(case.v_bits)
    # Threefold, so that a few keys dominate: a flat softmax would hide a wrong score.
    lead = (case.num_heads,) if case.num_queries is None else (case.num_queries, case.num_heads)
    q = (3.0 * rng.standard_normal((*lead, case.head_dim))).astype(np.float32)
    sinks = None if case.sinks == "none" else SINKS[case.sinks](case.num_heads, rng).astype(np.float32)
    problem = Problem(q, k_packed, k_norms, v_packed, v_norms, sinks)
    for array in problem.buffers():
        array.setflags(write=False)
    return problem


def expected_with_lse(case: Case, problem: Problem, *, unrotated: bool) -> tuple[np.ndarray, np.ndarray]:
    """The reference's answer on the same codes, in float64."""
    slots = case.visible.slots()
    k, v = (
        reference.decode(
            codes_of(case, packed[:, slots], bits), norms[:, slots], bits, case.codebook, case.scale_factor_d512
        )
        for packed, norms, bits in (
            (problem.k_packed, problem.k_norms, case.k_bits),
            (problem.v_packed, problem.v_norms, case.v_bits),
        )
    )
    q = reference.rotate(problem.q) if case.fuse_fwht_pre else problem.q
    out, lse = reference.attend(
        q,
        k,
        v,
        scale=case.scale,
        softcap=case.softcap,
        sinks=problem.sinks,
        ranges=case.visible.ranges(),
        return_lse=True,
    )
    return (reference.unrotate(out) if unrotated else out), lse


def expected(case: Case, problem: Problem, *, unrotated: bool) -> np.ndarray:
    """The output alone."""
    return expected_with_lse(case, problem, unrotated=unrotated)[0]


def cover_pairs(factors: dict[str, tuple], seed: int = 0) -> list[dict[str, Any]]:
    """A few dozen combinations in which any two values of any two factors meet at least once."""
    rng = random.Random(seed)
    names = list(factors)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }

    def pairs(row: dict[str, int]) -> set:
        return set(itertools.combinations(row.items(), 2))

    rows = []
    while missing:
        # Start from a pair that is still missing, so that every round makes progress.
        first = dict(min(missing))
        candidates = [{n: first.get(n, rng.randrange(len(factors[n]))) for n in names} for _ in range(50)]
        best = max(candidates, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        rows.append({n: factors[n][i] for n, i in best.items()})
    return rows


def attend_cases() -> list[Case]:
    """Cases over every boundary that the kernels have."""
    rows = cover_pairs(
        {
            "head_dim": (64, 128, 256, 512),
            "bits": tuple(itertools.product((5, 6, 8), repeat=2)),
            "packing": ("byte", "plane"),
            "kv_seq_len": (1, 31, 32, 33, 63, 65, 511, 512, 513, 1025),
            "heads": ((8, 2), (3, 1), (6, 3), (5, 5), (16, 8)),
            "num_queries": (None, 1, 2, 3, 8, 9),
            "window": ("none", "one", "shorter", "same", "longer"),
            "ring": ("linear", "unwrapped", "inside a block", "at the last slot"),
            "softcap": (0.0, 1.5, 30.0),
            "sinks": ("none", *SINKS),
            "return_lse": (False, True),
            "codebook": ("lloyd_max", "mlx_native"),
            "scale_factor_d512": (1.0, 0.75),
            "fuse_fwht_pre": (0, 1),
            "nsg": (1, 2, 4),
            "nwg": (1, 7, 16, 32, None),
        }
    )
    cases = []
    for seed, row in enumerate(rows):
        kv_len = row["kv_seq_len"]
        k_bits, v_bits = row.pop("bits")
        num_heads, num_kv_heads = row.pop("heads")
        window = {"none": 0, "one": 1, "shorter": (kv_len + 1) // 2, "same": kv_len, "longer": kv_len + 5}
        # Only a full ring may start anywhere but at slot 0; an odd start splits a block of 32.
        ring_start = {"linear": 0, "unwrapped": 0, "inside a block": kv_len // 2 | 1, "at the last slot": kv_len - 1}
        ring = row.pop("ring")
        queries = row.pop("num_queries")
        case = Case(
            **{**row, "window": window[row["window"]]},
            k_bits=k_bits,
            v_bits=v_bits,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            num_queries=queries and min(queries, kv_len),  # a query for every token at most
            kv_capacity=kv_len + 9 if ring == "linear" else kv_len,
            ring_start=ring_start[ring] % kv_len,
            seed=seed,
        )
        cases.append(case)
    return cases
