"""What attending and appending cost on the cpu, against torch's attention on float caches of the same shape.

Writes ``bench/results/cpu.json``. ``python -m bench.tables`` makes README's table from it.
"""

from __future__ import annotations

import itertools

from bench import harness
from tq_hb.cli._cases import Shape, measure_append, measure_attend

_LENGTHS = (1024, 4096, 16384)
_HEADS = ((16, 8, 256), (32, 4, 256), (16, 2, 512), (32, 8, 128))
_BITS = ((8, 8, "byte"), (5, 5, "byte"), (5, 5, "plane"))
_APPEND_BITS = (8, 6, 5)


def main() -> None:
    """Measure the grid."""
    args = harness.parse(harness.measuring_parser("bench.cpu", __doc__, samples=40))
    results = []
    grid = itertools.product(_LENGTHS, _HEADS, _BITS)
    for length, (heads, kv_heads, head_dim), (k_bits, v_bits, packing) in grid:
        shape = Shape(heads, kv_heads, head_dim, length, k_bits, v_bits, packing)
        print(shape, flush=True)
        results.append(measure_attend(shape, samples=args.samples, device="cpu"))
    for (heads, kv_heads, head_dim), bits in itertools.product((_HEADS[0], _HEADS[2]), _APPEND_BITS):
        shape = Shape(heads, kv_heads, head_dim, 4096, bits, bits)
        print("append", shape, flush=True)
        results.append(measure_append(shape, samples=args.samples, device="cpu"))
    print(harness.write("cpu", results, args.out))


if __name__ == "__main__":
    main()
