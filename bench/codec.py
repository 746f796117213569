"""What the format takes in memory, and what it loses, per width and codebook.

Writes ``bench/results/codec.json``. Nothing here depends on the machine: the losses are those of random normal data
with a fixed seed, the theoretical ones integrals over the normal density.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

import tq_hb
from bench import codec_tables, harness
from tq_hb.cli._cases import attention64, relative_l2

_CODEBOOKS = ("lloyd_max", "mlx_native")
_KV_HEADS, _HEADS, _TOKENS = 2, 8, 4096


def main() -> None:
    """Measure every combination."""
    args = harness.parse(harness.measuring_parser("bench.codec", __doc__))
    cases = list(itertools.product(_CODEBOOKS, tq_hb.supported_head_dims(), tq_hb.supported_bits()))
    results = [measure(*case) for case in harness.track(cases, "{0[0]}, D = {0[1]}, {0[2]} bits".format)]
    harness.finish("codec", results, args.out, codec_tables.codec)


def measure(codebook: str, head_dim: int, bits: int) -> dict[str, Any]:
    """Return bytes per token and KV head, and relative errors: squared for the codec, L2 for attention."""
    rng = np.random.default_rng(head_dim + bits)
    q = rng.standard_normal((_HEADS, head_dim), dtype=np.float32)
    k, v = rng.standard_normal((2, _TOKENS, _KV_HEADS, head_dim), dtype=np.float32)
    cache = new_cache(codebook, head_dim, bits, "byte")
    cache.append(k, v)
    out, stored = cache.attend(q), cache.dequantize()
    return {
        "codebook": codebook,
        "head_dim": head_dim,
        "bits": bits,
        "bytes_per_token_and_kv_head": {
            packing: new_cache(codebook, head_dim, bits, packing).bytes_per_token // _KV_HEADS
            for packing in ("byte", "plane")
        },
        "squared_error_in_theory": squared_error(codebook, bits),
        "squared_error": relative_l2(stored[0], k) ** 2,
        "attention_error": relative_l2(out, attention64(q, k, v)),
        "attention_error_on_the_same_codes": relative_l2(out, attention64(q, *stored)),
    }


def new_cache(codebook: str, head_dim: int, bits: int, packing: str) -> tq_hb.KVCache:
    """Return an empty cache of that format."""
    return tq_hb.KVCache(
        _KV_HEADS,
        head_dim,
        _TOKENS,
        k_bits=bits,
        v_bits=bits,
        codebook=codebook,
        packing=packing,
        device="cpu",
    )


def squared_error(codebook: str, bits: int) -> float:
    """Return the mean squared error of quantising a standard normal value, by integrating cell by cell."""
    levels = tq_hb.codebook(bits, codebook).astype(float)
    edges = [-math.inf, *tq_hb.boundaries(bits, codebook).astype(float), math.inf]
    return sum(_cell(level, *cell) for level, cell in zip(levels, itertools.pairwise(edges), strict=True))


def _cell(level: float, low: float, high: float) -> float:
    """Integrate ``(x - level)^2`` against the normal density from `low` to `high`."""

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def first_moment(x: float) -> float:
        return 0.0 if math.isinf(x) else x * density(x)

    # erfc of the side further from 0 keeps the digits that a difference of values near 1 would lose.
    if low >= 0:
        mass = (math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2))) / 2
    else:
        mass = (math.erfc(-high / math.sqrt(2)) - math.erfc(-low / math.sqrt(2))) / 2
    second = mass - first_moment(high) + first_moment(low)
    first = density(low) - density(high)
    return second - 2 * level * first + level * level * mass


if __name__ == "__main__":
    harness.run("bench.codec", main)
