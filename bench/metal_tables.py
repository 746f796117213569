"""The tables of docs/metal.md, from ``bench/results/metal_model.json``. All of it is a model: no GPU has run it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.markdown import Report, source
from tq_hb.cli._markdown import table

_MODEL = ": a model, not a measurement.\n"
_COUNTED = ": counted on the simulated device.\n"
_COMPUTED = ": computed, and for 8/8 bits what the simulated device was given.\n"
_PUBLISHED = ": published figures and what follows from them.\n"
_RESOURCES = ("arithmetic", "special", "exchange", "threadgroup", "load")


def gpus(report: Report) -> str:
    """Return what the bounds assume of each chip."""
    header = ("GPU", "cores", "GHz", "clock from", "FP32 TFLOPS", "GB/s", "bandwidth from")
    rows = [
        (
            gpu["name"],
            str(gpu["cores"]),
            f"{gpu['clock_ghz']:.3f}",
            gpu["clock_source"],
            f"{gpu['fp32_tflops']:.1f}",
            f"{gpu['bandwidth_gb_s']:g}",
            gpu["bandwidth_source"],
        )
        for gpu in _results(report, "gpu")
    ]
    return table(header, rows) + source(report) + _PUBLISHED


def threadgroup(report: Report) -> str:
    """Return the group kernel's threadgroup memory."""
    sizes = {(s["head_dim"], s["tile"], s["k_bits"], s["v_bits"]): s["bytes"] for s in _results(report, "threadgroup")}
    widths = list(dict.fromkeys((k_bits, v_bits) for _, _, k_bits, v_bits in sizes))
    header = ("D", "tile", *(f"K/V {k_bits}/{v_bits}" for k_bits, v_bits in widths))
    rows = [
        (str(head_dim), str(tile), *(f"{sizes[head_dim, tile, *width]:,}" for width in widths))
        for head_dim, tile in dict.fromkeys(key[:2] for key in sizes)
    ]
    return table(header, rows) + source(report) + _COMPUTED


def counts(report: Report) -> str:
    """Return what the simulated device counted in the attention kernels, per key where that has a meaning."""
    header = ("heads / KV heads / D", "kernel", "keys", "codes", "norms", "q", "partials", "SIMD ops", "barriers")
    rows = [
        (
            c["shape"],
            _kernel(c["plan"]),
            f"{c['keys']:,}",
            f"{c['code_bytes'] / c['keys']:,.0f}",
            f"{c['norm_bytes'] / c['keys']:,.0f}",
            f"{c['query_bytes']:,}",
            f"{c['written_bytes']:,}",
            f"{c['simd_operations'] / c['keys']:,.1f}",
            f"{c['threadgroup_barriers']:,}",
        )
        for c in _results(report, "counts")
        if c["keys"] % 32 == 0
    ]
    return table(header, rows) + source(report) + _COUNTED


def cost(report: Report) -> str:
    """Return what sharing the decode of a key buys, for D = 256."""
    header = ("query heads", "kernel", *_RESOURCES, "sets the bound")
    rows = []
    for c in _results(report, "cost"):
        if not c["shape"].endswith("256"):
            continue
        clocks = c["clocks"]
        most = max(_RESOURCES, key=lambda name: clocks[name])
        values = (f"{clocks[name]:,.0f}" for name in _RESOURCES)
        rows.append((str(c["group"]), _kernel(c["plan"]), *values, most))
    return table(header, rows) + source(report) + _MODEL


def reference(report: Report) -> str:
    """Return the bounds on an M5 Max beside what the reference system measured there."""
    header = ("heads / KV heads / D", "keys", "least, group", "least, per head", "measured with mlx-native")
    per_head = {(b["shape"], b["keys"]): b["us"]["M5 Max"] for b in _results(report, "bound") if b["per_head"]}
    rows = [
        (
            b["shape"],
            f"{b['keys']:,}",
            f"{b['us']['M5 Max']:,.1f}",
            f"{per_head[b['shape'], b['keys']]:,.1f}",
            ", ".join(f"{value:,.1f} ({what})" for what, value in b["reference_us"].items()),
        )
        for b in _results(report, "bound")
        if b["reference_us"] and not b["per_head"]
    ]
    return table(header, rows) + source(report) + _MODEL


def bounds(report: Report) -> str:
    """Return the group kernel's bound for every shape, length and chip."""
    names = [gpu["name"] for gpu in _results(report, "gpu")]
    rows = [
        (b["shape"], f"{b['keys']:,}", *(_bound(b["us"][name], b["set_by"][name]) for name in names))
        for b in _results(report, "bound")
        if not b["per_head"]
    ]
    return table(("heads / KV heads / D", "keys", *names), rows) + source(report) + _MODEL


def _results(report: Report, kind: str) -> Iterator[dict[str, Any]]:
    return (result for result in report["results"] if result["kind"] == kind)


def _kernel(plan: dict[str, Any]) -> str:
    return "per head" if plan["nsg"] else f"group, tile {plan['tile']}"


def _bound(microseconds: float, set_by: str) -> str:
    digits = 1 if microseconds < 100 else 0
    return f"{microseconds:,.{digits}f}" + ("" if set_by == "memory" else f" {set_by[0]}")
