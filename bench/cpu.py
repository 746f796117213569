"""What attending and appending cost on the cpu, against torch's attention on float caches of the same shape.

Writes ``bench/results/cpu.json``. ``python -m bench.tables`` makes README's table from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from bench import cpu_tables, harness
from tq_hb.cli._cases import Shape, measure_append, measure_attend

_LENGTHS = (1024, 4096, 16384)
_HEADS = ((16, 8, 256), (32, 4, 256), (16, 2, 512), (32, 8, 128))
_BITS = ((8, 8, "byte"), (5, 5, "byte"), (5, 5, "plane"))
_APPEND_BITS = (8, 6, 5)


def main() -> None:
    """Measure the grid."""
    args = harness.parse(harness.measuring_parser("bench.cpu", __doc__, samples=40))
    cases: list[tuple[str, Shape]] = []
    for length, heads, (k_bits, v_bits, packing) in itertools.product(_LENGTHS, _HEADS, _BITS):
        cases.append(("attend", Shape(*heads, length, k_bits, v_bits, packing)))
    for heads, bits in itertools.product((_HEADS[0], _HEADS[2]), _APPEND_BITS):
        cases.append(("append", Shape(*heads, 4096, bits, bits)))
    measures: dict[str, Callable[..., dict[str, Any]]] = {"attend": measure_attend, "append": measure_append}
    results = [measures[op](shape, samples=args.samples, device="cpu") for op, shape in harness.track(cases, _describe)]
    harness.finish("cpu", results, args.out, cpu_tables.attend, cpu_tables.attend_narrow, cpu_tables.append)


def _describe(case: tuple[str, Shape]) -> str:
    op, shape = case
    heads = f"{shape.heads}/{shape.kv_heads}/{shape.head_dim}"
    packing = " in planes" if shape.packing == "plane" else ""
    return f"{op} {heads}, {shape.kv_len:,} tokens, {shape.k_bits}/{shape.v_bits} bits{packing}"


if __name__ == "__main__":
    harness.run("bench.cpu", main)
