"""What each cpu kernel takes: every instruction set that runs here, in fixed point and in float32, in turns.

Writes ``bench/results/cpu_kernels.json``: times, and the share of a plain read of the same codes and norms; and what a
call takes where there is next to nothing to attend to. Before it is timed, every output is compared with float64
attention on the same codes. ``python -m bench.tables`` makes the tables of ``docs/cpu.md`` from it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

import tq_hb
from bench import cpu_tables, harness
from tq_hb import _core
from tq_hb.cli._cases import attention64, check_attention
from tq_hb.cli._sampling import PlainRead, buffers_to_stay_cold, sample

_TOKENS = 4096
_FEW_TOKENS = 32
# Query heads, KV heads, head size.
_SHAPES = ((16, 16, 256), (16, 8, 256), (16, 4, 256), (16, 2, 256), (16, 8, 128), (16, 2, 512))
_FORMS = ((5, "byte"), (5, "plane"), (6, "byte"), (6, "plane"), (8, "byte"))


def contenders(
    heads: int, kv_heads: int, head_dim: int, bits: int, packing: str
) -> tuple[dict[str, Callable[[int], object]], int]:
    """Return a call for every kernel, and the bytes that each reads."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((heads, head_dim), dtype=np.float32)
    k, v = rng.standard_normal((2, _TOKENS, kv_heads, head_dim), dtype=np.float32)
    calls: dict[str, Callable[[int], object]] = {}
    nbytes = 0
    for precision in ("default", "strict"):
        cache = tq_hb.KVCache(
            kv_heads, head_dim, k_bits=bits, v_bits=bits, packing=packing, precision=precision, device="cpu"
        )
        cache.append(k, v)
        nbytes = _TOKENS * cache.bytes_per_token
        want = attention64(q, *cache.dequantize())
        copies = [cache.copy() for _ in range(buffers_to_stay_cold(nbytes))]
        for isa in _core.cpu_isas():
            _core.set_cpu_isa("bench", "isa", isa)
            out, plan = cache.attend(q), cache.last_plan
            if plan is None or plan.precision != precision or (isa, precision) == ("avxvnni", "strict"):
                continue  # served by other kernels: strict, or those of avx2
            check_attention(out, want, precision)

            def call(i: int, isa: str = isa, copies: list[tq_hb.KVCache] = copies) -> object:
                _core.set_cpu_isa("bench", "isa", isa)
                return copies[i % len(copies)].attend(q)

            calls[f"{isa} {precision}"] = call
    return calls, nbytes


def short_call(heads: int, kv_heads: int, head_dim: int, samples: int) -> dict[str, float]:
    """Return what attending to few tokens takes at 8 bits: the op by itself, and a call of the cache."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((heads, head_dim), dtype=np.float32)
    k = rng.standard_normal((_FEW_TOKENS, kv_heads, head_dim), dtype=np.float32)
    cache = tq_hb.KVCache(kv_heads, head_dim, capacity=_FEW_TOKENS, device="cpu")
    cache.append(k, k)
    device = tq_hb.Device("cpu")
    codes, norms = (device.array(np.ascontiguousarray(x.swapaxes(0, 1))) for x in tq_hb.quantize(k, 8, device="cpu"))
    queries, output = device.array(q), device.empty(q.shape, np.float32)
    tmp = device.empty(tq_hb.tmp_buffer_bytes(heads, head_dim) // 4, np.float32)
    params = tq_hb.FlashAttnVecTqHbParams(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        kv_seq_len=_FEW_TOKENS,
        kv_capacity=_FEW_TOKENS,
        scale=head_dim**-0.5,
        fuse_fwht_pre=1,
    )
    inside: list[float] = []

    def op(_: int) -> None:
        encoder = device.encoder()
        encoder.flash_attn_vec_tq_hb_with_fused_undo(queries, codes, norms, codes, norms, output, tmp, params)
        encoder.commit_and_wait()
        inside.append(encoder.gpu_time)

    op(0)
    want = attention64(q, *cache.dequantize())
    for out in (output.numpy(), cache.attend(q)):
        check_attention(out, want, "default")
    call = sample({"op": op, "call": lambda _: cache.attend(q)}, samples)["call"]
    lower, median, upper = 1e6 * np.quantile(inside, (0.25, 0.5, 0.75))
    return {
        "op_us": float(median),
        "op_lower_us": float(lower),
        "op_upper_us": float(upper),
        "call_us": call.median_us,
        "call_lower_us": call.lower_us,
        "call_upper_us": call.upper_us,
    }


def main() -> None:
    """Measure every shape in every form, on one thread."""
    args = harness.parse(harness.measuring_parser("bench.cpu_kernels", __doc__, samples=30))
    tq_hb.set_num_threads(1)
    results: list[dict[str, Any]] = []
    for heads, kv_heads, head_dim in harness.track(_SHAPES, "short calls, {0[0]}/{0[1]}/{0[2]}".format):
        few = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "bits": 8, "tokens": _FEW_TOKENS}
        results.append({**few, **short_call(heads, kv_heads, head_dim, 10 * args.samples)})
    cases = list(itertools.product(_SHAPES, _FORMS))
    described = "{0[0][0]}/{0[0][1]}/{0[0][2]}, {0[1][0]} bits, {0[1][1]}".format
    for (heads, kv_heads, head_dim), (bits, packing) in harness.track(cases, described):
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "bits": bits, "packing": packing}
        calls, nbytes = contenders(heads, kv_heads, head_dim, bits, packing)
        timings = sample({**calls, "read": PlainRead(1)}, args.samples)
        read_gb_s = timings.pop("read").gb_s(PlainRead.nbytes)
        rows = {
            name: {**dataclasses.asdict(timing), "share_of_read": timing.gb_s(nbytes) / read_gb_s}
            for name, timing in timings.items()
        }
        results.append({**shape, "tokens": _TOKENS, "rows": rows})
    harness.finish("cpu_kernels", results, args.out, cpu_tables.kernels, cpu_tables.short)


if __name__ == "__main__":
    harness.run("bench.cpu_kernels", main)
