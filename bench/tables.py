"""Puts the tables made from ``bench/results`` into the documents that show them.

A document holds a table between ``<!-- table NAME -->`` and ``<!-- end -->``. With ``--check`` nothing is written, and
a table that is not the one the results give is an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

from bench import (
    codec_tables,
    cpu_tables,
    cuda_tables,
    gate_tables,
    generate_tables,
    harness,
    metal_tables,
    plots,
    quality_tables,
)
from bench.markdown import Report
from bench.peers import tables as peers_tables
from tq_hb.cli._generate_plot import plot_replay

_DOCUMENTS = (
    "README.md",
    "docs/cpu.md",
    "docs/cuda.md",
    "docs/mean-keys.md",
    "docs/measurements.md",
    "docs/metal.md",
    "docs/quality.md",
)
_BLOCK = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

# What a table is made from, and by which function.
_TABLES: dict[str, tuple[str, Callable[[Report], str]]] = {
    "attend_cpu": ("cpu", cpu_tables.attend),
    "attend_cpu_narrow": ("cpu", cpu_tables.attend_narrow),
    "append_cpu": ("cpu", cpu_tables.append),
    "codec": ("codec", codec_tables.codec),
    "cpu_append": ("cpu_append", cpu_tables.append_rate),
    "cpu_kernels": ("cpu_kernels", cpu_tables.kernels),
    "cpu_short": ("cpu_kernels", cpu_tables.short),
    # Of another machine, whose files were copied here under these names.
    "cpu_append_avx512": ("cpu_append_avx512", cpu_tables.append_rate),
    "cpu_kernels_avx512": ("cpu_kernels_avx512", cpu_tables.kernels),
    "cpu_short_avx512": ("cpu_kernels_avx512", cpu_tables.short),
    "peers_cpu_avx512": ("peers_cpu_avx512", peers_tables.every_shape),
    "peers_cpu_bounds_avx512": ("peers_cpu_avx512", peers_tables.bounds),
    "cpu_kernels_avx512_amd": ("cpu_kernels_avx512_amd", cpu_tables.kernels),
    "peers_cpu_avx512_amd": ("peers_cpu_avx512_amd", peers_tables.every_shape),
    "peers_cpu_bounds_avx512_amd": ("peers_cpu_avx512_amd", peers_tables.bounds),
    "cuda_attend": ("peers_cuda", cuda_tables.attend),
    "demo": ("generate", generate_tables.demo),
    "memory": ("codec", codec_tables.memory),
    "metal_bounds": ("metal_model", metal_tables.bounds),
    "metal_cost": ("metal_model", metal_tables.cost),
    "metal_counts": ("metal_model", metal_tables.counts),
    "metal_gpus": ("metal_model", metal_tables.gpus),
    "metal_reference": ("metal_model", metal_tables.reference),
    "metal_threadgroup": ("metal_model", metal_tables.threadgroup),
    "peers_cpu": ("peers_cpu", peers_tables.every_shape),
    "peers_cpu_bounds": ("peers_cpu", peers_tables.bounds),
    "peers_cpu_each": ("peers_cpu", peers_tables.every_peer),
    "peers_cpu_short": ("peers_cpu", peers_tables.at_one_length),
    "rate_distortion": ("rate_distortion", codec_tables.rate_distortion),
    "replay": ("generate", generate_tables.replay),
    **quality_tables.TABLES,
}

PLOTS: dict[str, Callable[[Report], bytes]] = {
    "generate": plot_replay,
    "metal_model": plots.metal_model,
    "peers_cpu": peers_tables.plot,
    "peers_cuda": plots.peers_cuda,
    "quality": plots.quality,
    "rate_distortion": plots.rate_distortion,
}


def main() -> None:
    """Write the tables, or check them."""
    parser = harness.parser("bench.tables", __doc__)
    parser.add_argument("--check", action="store_true", help="fail if a document's table is out of date")
    parser.add_argument("--plots", action="store_true", help="draw the plots beside the results again as well")
    args = parser.parse_args()
    if args.plots:
        for name, plot in PLOTS.items():
            harness.draw(name, harness.RESULTS, plot)
        gate_tables.draw()
    stale = []
    for name in _DOCUMENTS:
        path = harness.ROOT / name
        text = path.read_text()
        fresh = _BLOCK.sub(lambda block: block[1] + _made(block[2]) + block[3], text)
        if fresh != text:
            stale.append(name)
            if not args.check:
                path.write_text(fresh)
    if args.check and stale:
        sys.exit(f"out of date, run `python -m bench.tables`: {', '.join(stale)}")


def _made(name: str) -> str:
    if name in gate_tables.TABLES:
        return gate_tables.TABLES[name]()
    file, make = _TABLES[name]
    return make(harness.read(file))


if __name__ == "__main__":
    harness.run("bench.tables", main)
