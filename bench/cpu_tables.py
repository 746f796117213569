"""The tables of ``bench.cpu``, ``bench.cpu_kernels`` and ``bench.cpu_append``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.markdown import Report, machine, source
from tq_hb.cli._machine import threads_in_words
from tq_hb.cli._markdown import table

_TORCH = ("torch float32", "torch float16", "torch bfloat16")


def attend(report: Report) -> str:
    """Return one token's attention at 8 bits per shape, torch's dtypes beside it."""
    return _attend(report, lambda shape: shape["k_bits"] == shape["v_bits"] == 8)


def attend_narrow(report: Report) -> str:
    """Return one token's attention at fewer bits per shape, torch's dtypes beside it."""
    return _attend(report, lambda shape: shape["k_bits"] < 8)


def _attend(report: Report, wanted: Callable[[dict[str, Any]], bool]) -> str:
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
    return table(header, rows) + source(report) + machine(report)


def append(report: Report) -> str:
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
    return table(header, rows) + source(report) + machine(report)


def kernels(report: Report) -> str:
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
    return table(("heads / KV heads / D", "bits", *names), rows) + source(report) + machine(report)


def append_rate(report: Report) -> str:
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
    where, load = report["machine"], report["load_average"][0]
    end = f": {where['processor']}, {threads_in_words(where['threads'])}, load average {load:.1f}.\n"
    return table(("KV heads / D", "bits", *names), rows) + source(report) + end


def short(report: Report) -> str:
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
    return table(header, rows) + source(report) + machine(report)
