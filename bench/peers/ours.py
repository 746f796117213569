"""tq_hb's own cpu backend."""

from __future__ import annotations

from functools import partial

import tq_hb
from bench.peers.contender import Contender, Problem, Rotation

# Bits, packing, precision.
FORMS = (
    (5, "byte", "default"),
    (5, "plane", "default"),
    (6, "byte", "default"),
    (6, "plane", "default"),
    (8, "byte", "default"),
    (5, "byte", "strict"),
    (8, "byte", "strict"),
)
# The error that quantising normal values with so many bits explains.
_ERROR_LIMITS = {5: 0.1, 6: 5e-2, 8: 1.3e-2}


def name_of(bits: int, packing: str, precision: str) -> str:
    """Return what a form is called in results and tables."""
    words = [
        f"tq_hb {bits}",
        *(["plane"] if packing == "plane" else []),
        *(["strict"] if precision == "strict" else []),
    ]
    return " ".join(words)


class Ours:
    """The contenders of tq_hb over one cache."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._rotations: dict[str, tuple[Rotation[tq_hb.KVCache], float]] = {}
        for bits, packing, precision in FORMS:
            first = tq_hb.KVCache(
                problem.kv_heads,
                problem.head_dim,
                problem.tokens,
                k_bits=bits,
                v_bits=bits,
                packing=packing,
                precision=precision,
                device="cpu",
            )
            first.append(problem.k.transpose(1, 0, 2), problem.v.transpose(1, 0, 2))
            nbytes = problem.tokens * first.bytes_per_token
            rotation = Rotation(first, lambda cache: cache.copy(), nbytes)
            self._rotations[name_of(bits, packing, precision)] = (rotation, _ERROR_LIMITS[bits])

    def contenders(self, threads: int) -> list[Contender]:
        """Return a call per form; all later calls use as many threads."""
        tq_hb.set_num_threads(threads)
        return [
            Contender(name, rotation.nbytes, partial(self._attend, rotation), lambda out: out, limit)
            for name, (rotation, limit) in self._rotations.items()
        ]

    def _attend(self, rotation: Rotation[tq_hb.KVCache]) -> object:
        return rotation.next().attend(self._problem.q)
