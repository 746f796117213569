"""How many tokens a core appends in a second: every instruction set that runs here, in turns.

Writes ``bench/results/cpu_append.json``, a row per instruction set: the op alone on floats of the device, and
``KVCache.append``, which checks and copies them as well. ``python -m bench.tables`` makes the table of ``docs/cpu.md``
from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

import tq_hb
from bench import cpu_tables, harness
from tq_hb import _core
from tq_hb.cli._sampling import sample
from tq_hb.options import norms_shape

_TOKENS = 512
# KV heads, head size.
_SHAPES = ((8, 256), (8, 128), (2, 512))
_FORMS = ((5, "byte"), (5, "plane"), (6, "byte"), (6, "plane"), (8, "byte"))

Floats = npt.NDArray[np.float32]


def main() -> None:
    """Measure every shape in every form, on one thread."""
    args = harness.parse(harness.measuring_parser("bench.cpu_append", __doc__, samples=30))
    tq_hb.set_num_threads(1)
    results = []
    cases = [(*shape, *form) for shape, form in itertools.product(_SHAPES, _FORMS)]
    for kv_heads, head_dim, bits, packing in harness.track(cases, "{0[0]}/{0[1]}, {0[2]} bits, {0[3]}".format):
        shape = {"kv_heads": kv_heads, "head_dim": head_dim, "bits": bits, "packing": packing}
        timings = sample(contenders(kv_heads, head_dim, bits, packing), args.samples)
        rows = {
            name: {"median_us": timing.median_us, "lower_us": timing.lower_us, "upper_us": timing.upper_us}
            for name, timing in timings.items()
        }
        results.append({**shape, "tokens": _TOKENS, "rows": rows})
    harness.finish("cpu_append", results, args.out, cpu_tables.append_rate)


def contenders(kv_heads: int, head_dim: int, bits: int, packing: str) -> dict[str, Callable[[int], object]]:
    """Return the op and the method on every instruction set; all have been seen to store the same."""
    k, v = np.random.default_rng(0).standard_normal((2, _TOKENS, kv_heads, head_dim), dtype=np.float32)
    cache = tq_hb.KVCache(
        kv_heads, head_dim, k_bits=bits, v_bits=bits, packing=packing, sliding_window=_TOKENS, device="cpu"
    )
    op = recorded_op(k, v, bits, packing)
    calls: dict[str, Callable[[int], object]] = {}
    stored: list[bytes] = []
    for isa in _core.cpu_isas():
        if isa == "avxvnni":
            continue  # encodes with the kernels of avx2

        def call(_: int, isa: str = isa) -> object:
            _core.set_cpu_isa("bench", "isa", isa)
            return op()

        def append(_: int, isa: str = isa) -> None:
            _core.set_cpu_isa("bench", "isa", isa)
            cache.append(k, v)

        append(0)
        stored.append(b"".join(part.tobytes() for part in cache.dequantize()))
        calls[f"{isa} op"], calls[f"{isa} append"] = call, append
    if len(set(stored)) > 1:
        raise RuntimeError(f"not all of {', '.join(_core.cpu_isas())} store the same")
    return calls


def recorded_op(k: Floats, v: Floats, bits: int, packing: str) -> Callable[[], object]:
    """Return a call that encodes K and V of all tokens from the device's own memory."""
    device = tq_hb.Device("cpu")
    tokens, kv_heads, head_dim = k.shape
    hp = tq_hb.HadamardQuantizeKvHbParams(
        head_dim=head_dim, num_kv_heads=kv_heads, write_pos=0, cache_capacity=tokens, codebook_bits=bits
    )
    row_bytes = _core.row_bytes(packing, bits, head_dim)
    src_k, src_v = device.array(k), device.array(v)
    k_packed, v_packed = (device.empty((kv_heads, tokens, row_bytes), np.uint8) for _ in range(2))
    k_norms, v_norms = (device.empty(norms_shape((kv_heads, tokens), head_dim)) for _ in range(2))

    def call() -> None:
        encoder = device.encoder()
        encoder.hadamard_quantize_kv_hb_dual(src_k, src_v, k_packed, v_packed, k_norms, v_norms, hp, packing=packing)
        encoder.commit_and_wait()

    return call


if __name__ == "__main__":
    harness.run("bench.cpu_append", main)
