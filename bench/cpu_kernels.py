"""What each cpu kernel takes: every instruction set that runs here, in fixed point and in float32, in turns.

Prints a table of times, and in brackets the share of a plain read of the same codes and norms. Shapes are
heads/kv_heads/head_dim/kv_len.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

import tq_hb
from tq_hb import _core
from tq_hb.cli._sampling import PlainRead, buffers_to_stay_cold, sample

_SHAPES = ("16/16/256/4096", "16/8/256/4096", "16/4/256/4096", "16/2/256/4096", "16/8/128/4096", "16/2/512/4096")
_FORMS = ((5, "byte"), (5, "plane"), (6, "byte"), (6, "plane"), (8, "byte"))


def contenders(shape: str, bits: int, packing: str) -> tuple[dict[str, Callable[[int], object]], int]:
    """Return a call for every kernel, and the bytes that each reads."""
    heads, kv_heads, head_dim, kv_len = map(int, shape.split("/"))
    rng = np.random.default_rng(0)
    q = rng.standard_normal((heads, head_dim), dtype=np.float32)
    k, v = rng.standard_normal((2, kv_len, kv_heads, head_dim), dtype=np.float32)
    calls: dict[str, Callable[[int], object]] = {}
    nbytes = 0
    for precision in ("default", "strict"):
        cache = tq_hb.KVCache(
            kv_heads, head_dim, k_bits=bits, v_bits=bits, packing=packing, precision=precision, device="cpu"
        )
        cache.append(k, v)
        nbytes = kv_len * cache.bytes_per_token
        copies = [cache.copy() for _ in range(buffers_to_stay_cold(nbytes))]
        for isa in _core.cpu_isas():
            _core.set_cpu_isa("bench", "isa", isa)
            cache.attend(q)
            plan = cache.last_plan
            if plan is None or plan.precision != precision:
                continue

            def call(i: int, isa: str = isa, copies: list[tq_hb.KVCache] = copies) -> object:
                _core.set_cpu_isa("bench", "isa", isa)
                return copies[i % len(copies)].attend(q)

            calls[f"{isa} {precision}"] = call
    return calls, nbytes


def main() -> None:
    """Measure every shape in every form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("shapes", nargs="*", default=_SHAPES)
    arguments = parser.parse_args()
    tq_hb.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads; median us, and share of the read")
    for shape in arguments.shapes:
        for bits, packing in _FORMS:
            calls, nbytes = contenders(shape, bits, packing)
            timings = sample({**calls, "read": PlainRead(arguments.threads)}, arguments.samples)
            read_gb_s = timings.pop("read").gb_s(PlainRead.nbytes)
            cells = (f"{n} {t.median_us:.0f} ({t.gb_s(nbytes) / read_gb_s:.2f})" for n, t in timings.items())
            print(f"{shape:15} {bits} {packing:5}", "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
