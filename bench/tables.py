"""Puts the tables made from ``bench/results`` into the documents that show them.

A document holds a table between ``<!-- table NAME -->`` and ``<!-- end -->``. With ``--check`` nothing is written, and
a table that is not the one the results give is an error.
"""

from __future__ import annotations

import math
import re
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from bench import gate_tables, harness, metal_tables, plots, quality_tables
from bench.markdown import Report, source, table
from bench.peers import tables as peers_tables
from tq_hb.cli._generate_plot import plot_replay
from tq_hb.cli._machine import threads_in_words

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


def attend_cpu(report: Report) -> str:
    """Return one token's attention at 8 bits per shape, torch's dtypes beside it."""
    return _attend_cpu(report, lambda shape: shape["k_bits"] == shape["v_bits"] == 8)


def attend_cpu_narrow(report: Report) -> str:
    """Return one token's attention at fewer bits per shape, torch's dtypes beside it."""
    return _attend_cpu(report, lambda shape: shape["k_bits"] < 8)


def _attend_cpu(report: Report, wanted: Callable[[dict[str, Any]], bool]) -> str:
    header = ("heads / KV heads / D", "tokens", "K/V bits", "tq_hb", "torch float32", "float16", "bfloat16", "of read")
    rows = []
    for result in report["results"]:
        if result["op"] != "attend" or not wanted(result["shape"]):
            continue
        shape, by_name = result["shape"], {row["name"]: row for row in result["rows"]}
        times = (by_name[name]["median_us"] / 1e3 if name in by_name else None for name in ("tq_hb", *_TORCH))
        rows.append(
            (
                f"{shape['heads']} / {shape['kv_heads']} / {shape['head_dim']}",
                f"{shape['kv_len']:,}",
                f"{shape['k_bits']}/{shape['v_bits']}" + (" in planes" if shape["packing"] == "plane" else ""),
                *("" if time is None else f"{time:.2f} ms" for time in times),
                f"{by_name['tq_hb']['share_of_read']:.0%}",
            )
        )
    return table(header, rows) + source(report) + _machine(report)


def replay(report: Report) -> str:
    """Return what every width does to a real model's predictions."""
    header = ("K/V bits", "bytes per token", "decode ms per token", "mean KL", "top-1 agreement", "perplexity")
    rows = [
        (
            row["setting"],
            f"{row['bytes_per_token']:,}",
            f"{row['decode_ms']:.1f}",
            f"{row['mean_kl']:.1e}" if row["mean_kl"] else "0",
            f"{row['top1_agreement']:.1%}",
            f"{row['perplexity']:.2f}",
        )
        for row in report["replay"]["settings"]
    ]
    # A report that names no command was written by this one.
    named = {"command": "tq-hb generate --out bench/results", **report}
    return table(header, rows) + source(named) + _machine(report)


def demo(report: Report) -> str:
    """Return what a real model wrote, behind the last sentence of its prompt, and what that took."""
    made = report["generated"]
    prompt = (harness.ROOT / "python" / "tq_hb" / "cli" / "data" / "prompt.txt").read_text(encoding="utf-8").rstrip()
    text = f"[...] {prompt.rsplit('. ', 1)[-1]}\n{made['text']}"
    quoted = "\n".join(textwrap.fill(line, 120) for line in text.split("\n"))
    # The last token is never fed back, so the cache does not see it.
    seen = made["prompt_tokens"] + made["new_tokens"] - 1
    kernels = ", ".join(f"`{kernel}`" for kernel in made["kernels"])
    return (
        f"```\n{quoted}\n```\n\n{report['model']}: {made['new_tokens']} tokens in {made['seconds']:.1f} s, the prompt "
        f"of {made['prompt_tokens']} tokens included, at {made['k_bits']}/{made['v_bits']} bits. The cache has seen "
        f"{seen} tokens and takes {made['cache_nbytes'] / 2**20:.1f} MiB. Attended on the codes by {kernels} "
        "(`bench/results/generate.json`).\n"
    )


def memory(report: Report) -> str:
    """Return what the default codebook takes and loses at each width, for D = 256."""
    header = ("bits", "bytes per token and KV head", "in planes", "squared error", "attention error")
    rows = [
        (
            str(result["bits"]),
            *_bytes(result),
            f"{result['squared_error']:.1e}",
            f"{result['attention_error']:.1e}",
        )
        for result in report["results"]
        if result["codebook"] == "lloyd_max" and result["head_dim"] == 256
    ]
    return table(header, rows) + source(report) + ".\n"


def codec(report: Report) -> str:
    """Return what every codebook and head size takes and loses."""
    header = (
        *("codebook", "D", "bits", "bytes", "in planes"),
        *("squared error", "in theory", "attention error", "of the kernel"),
    )
    rows = [
        (
            f"`{result['codebook']}`",
            str(result["head_dim"]),
            str(result["bits"]),
            *_bytes(result),
            f"{result['squared_error']:.3e}",
            f"{result['squared_error_in_theory']:.3e}",
            f"{result['attention_error']:.1e}",
            f"{result['attention_error_on_the_same_codes']:.1e}",
        )
        for result in report["results"]
    ]
    return table(header, rows) + source(report) + ".\n"


def rate_distortion(report: Report) -> str:
    """Return every format's size and loss, a table per head size."""
    header = ("format", "bits per value", "above the bound", *_DATA.values())
    tables = []
    for head_dim in dict.fromkeys(result["head_dim"] for result in report["results"]):
        rows = [
            (
                result["format"],
                f"{result['bits_per_value']:.3f}",
                f"{result['bits_per_value'] + math.log2(result['nmse']['normal']) / 2:.2f}",
                *(f"{result['nmse'][data]:.2e}" if data in result["nmse"] else "" for data in _DATA),
            )
            for result in report["results"]
            if result["head_dim"] == head_dim
        ]
        tables.append(f"D = {head_dim}:\n\n{table(header, rows)}")
    return "\n".join(tables) + source(report) + ".\n"


def _bytes(result: dict[str, Any]) -> tuple[str, str]:
    """Return what a token takes with byte packing and with plane packing."""
    nbytes = result["bytes_per_token_and_kv_head"]
    return str(nbytes["byte"]), str(nbytes["plane"])


def cpu_kernels(report: Report) -> str:
    """Return how many microseconds every cpu kernel takes, and in brackets its share of a plain read."""
    results = [result for result in report["results"] if "rows" in result]
    names = list(results[0]["rows"])
    rows = [
        (
            f"{result['heads']} / {result['kv_heads']} / {result['head_dim']}",
            f"{result['bits']}" + (" in planes" if result["packing"] == "plane" else ""),
            *(f"{row['median_us']:,.0f} ({row['share_of_read']:.2f})" for row in map(result["rows"].get, names)),
        )
        for result in results
    ]
    return table(("heads / KV heads / D", "bits", *names), rows) + source(report) + _machine(report)


def cpu_append(report: Report) -> str:
    """Return how many thousand tokens a core appends in a second, with the op and with the method."""
    names = list(report["results"][0]["rows"])
    rows = [
        (
            f"{result['kv_heads']} / {result['head_dim']}",
            f"{result['bits']}" + (" in planes" if result["packing"] == "plane" else ""),
            *(f"{1e3 * result['tokens'] / result['rows'][row]['median_us']:,.0f}" for row in names),
        )
        for result in report["results"]
    ]
    machine, load = report["machine"], report["load_average"][0]
    where = f": {machine['processor']}, {threads_in_words(machine['threads'])}, load average {load:.1f}.\n"
    return table(("KV heads / D", "bits", *names), rows) + source(report) + where


def cpu_short(report: Report) -> str:
    """Return what attending to few tokens takes on the cpu."""
    results = [result for result in report["results"] if "op_us" in result]
    rows = [
        (
            f"{result['heads']} / {result['kv_heads']} / {result['head_dim']}",
            f"{result['op_us']:.1f} us",
            f"{result['call_us']:.1f} us",
        )
        for result in results
    ]
    header = ("heads / KV heads / D", f"the op over {results[0]['tokens']} tokens", "`KVCache.attend`")
    return table(header, rows) + source(report) + _machine(report)


def cuda_attend(report: Report) -> str:
    """Return attention on an NVIDIA GPU per shape, the best of torch's beside it."""
    rows = [
        (
            f"{result['heads']} / {result['kv_heads']} / {result['head_dim']}",
            f"{result['keys']:,}",
            f"{result['bits']}" + (" in planes" if result["bits"] < 8 else ""),
            f"{1e6 * result['seconds']:.1f} us",
            f"{result['share_of_floor']:.0%}",
            f"{result['error']:.0e}",
            *(f"{seconds / result['seconds']:.2f}" if seconds is not None else "" for seconds in _cuda_peers(result)),
        )
        for result in report["results"]
        if "keys" in result
    ]
    peers = ("torch float16 ÷ ours", "FlashInfer float16 ÷ ours", "float8 ÷ ours")
    header = ("heads / KV heads / D", "keys", "bits", "time", "of the floor", "error", *peers)
    # Without the reports that it was given.
    return table(header, rows) + source(report, options=False) + f": {report['results'][0]['gpu']}.\n"


def _cuda_peers(result: dict[str, Any]) -> list[float | None]:
    """Seconds of torch, and of FlashInfer over float16 and float8, or None where they were not measured."""
    flashinfer = result["flashinfer"] or {}
    of_flashinfer = (flashinfer.get(name) for name in ("float16", "float8"))
    return [result["sdpa_seconds"], *(row and row["seconds"] for row in of_flashinfer)]


def append_cpu(report: Report) -> str:
    """Return the cost of appending, per token."""
    rows = []
    for result in report["results"]:
        if result["op"] != "append":
            continue
        shape, (one, run) = result["shape"], result["rows"]
        tokens = int(run["name"].split()[0])
        rows.append(
            (
                f"{shape['kv_heads']} / {shape['head_dim']}",
                f"{shape['k_bits']}/{shape['v_bits']}",
                f"{one['median_us']:.1f} us",
                f"{run['median_us'] / tokens:.1f} us",
            )
        )
    header = ("KV heads / D", "bits", "one token", f"a token of a run of {tokens}")
    return table(header, rows) + source(report) + _machine(report)


_DATA = {
    "normal": "normal",
    "student_t": "Student's t",
    "outliers": "outlier channels",
    "outliers_rotated": "these rotated first",
}
_TORCH = ("torch float32", "torch float16", "torch bfloat16")
# What a table is made from, and by which function.
_TABLES: dict[str, tuple[str, Callable[[Report], str]]] = {
    "attend_cpu": ("cpu", attend_cpu),
    "attend_cpu_narrow": ("cpu", attend_cpu_narrow),
    "append_cpu": ("cpu", append_cpu),
    "codec": ("codec", codec),
    "cpu_append": ("cpu_append", cpu_append),
    "cpu_kernels": ("cpu_kernels", cpu_kernels),
    "cpu_short": ("cpu_kernels", cpu_short),
    # Of another machine, whose files were copied here under these names.
    "cpu_append_avx512": ("cpu_append_avx512", cpu_append),
    "cpu_kernels_avx512": ("cpu_kernels_avx512", cpu_kernels),
    "cpu_short_avx512": ("cpu_kernels_avx512", cpu_short),
    "peers_cpu_avx512": ("peers_cpu_avx512", peers_tables.every_shape),
    "peers_cpu_bounds_avx512": ("peers_cpu_avx512", peers_tables.bounds),
    "cuda_attend": ("peers_cuda", cuda_attend),
    "demo": ("generate", demo),
    "memory": ("codec", memory),
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
    "rate_distortion": ("rate_distortion", rate_distortion),
    "replay": ("generate", replay),
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


def _machine(report: Report) -> str:
    machine = report["machine"]
    torch = machine["libraries"]["torch"]
    peer = f"torch {torch}" if torch else "no torch"
    return f": {machine['processor']}, {threads_in_words(machine['threads'])}, {machine['isa']}, {peer}.\n"


if __name__ == "__main__":
    harness.run("bench.tables", main)
