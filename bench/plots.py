"""The plots of the documents, each from a report; that of the peers on the CPU is in ``bench.peers.tables``."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.markdown import Report
from bench.quality_tables import FLOAT_BYTES, MODELS, complete_texts, of_mean
from tq_hb.cli._plots import png

_HEAD_DIM = 128
_FORMATS: dict[str, dict[str, Any]] = {
    "tq_hb, lloyd_max, plane": {"color": "C0", "marker": "o", "linewidth": 2.5},
    "tq_hb, lloyd_max, byte": {"color": "C0", "marker": "o", "linestyle": ":", "fillstyle": "none"},
    "tq_hb, mlx_native, plane": {"color": "C9", "marker": "s", "markersize": 4},
    "tq_hb, mlx_native, byte": {"color": "C9", "marker": "s", "linestyle": ":", "fillstyle": "none", "markersize": 4},
    "llama.cpp q8_0, q5_0, q4_0": {"color": "C1", "marker": "^"},
    "llama.cpp q5_1": {"color": "C3", "marker": "v", "linestyle": "none"},
    "MLX affine, groups of 64": {"color": "C2", "marker": "D"},
    "FP8 E4M3": {"color": "C4", "marker": "*", "linestyle": "none", "markersize": 11},
}
_METAL_SHAPES = ("16 / 8 / 256", "24 / 4 / 256")
_METAL_GPUS = ("M1", "M4", "M4 Pro", "M1 Max", "M4 Max", "M5 Max", "M2 Ultra")
_FAR_AHEAD = 4  # times as long as tq_hb: more than a linear axis shows beside the rest


def rate_distortion(report: Report) -> bytes:
    """Draw the loss against the size, a line per family, a panel per data set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    results = [result for result in report["results"] if result["head_dim"] == _HEAD_DIM]
    panels = {
        "normal": "normal values",
        "outliers": "outlier channels",
        "outliers_rotated": "outlier channels, all formats rotated",
    }
    for axes, (data, title) in zip(figure.subplots(1, 3, sharex=True, sharey=True), panels.items(), strict=True):
        for family, style in _FORMATS.items():
            members = [result for result in results if result["family"] == family]
            line = sorted((m["bits_per_value"], m["nmse"].get(data, m["nmse"]["outliers"])) for m in members)
            axes.semilogy(*zip(*line, strict=True), label=family, **style)
        rates = np.array([4.25, 8.75])
        axes.semilogy(rates, 4.0**-rates, "--", color="0.4", label="bound for normal values, $2^{-2R}$")
        axes.set(title=title, xlabel="bits per value, scales and norms included")
        axes.grid(which="both", alpha=0.25)
    figure.axes[0].set_ylabel("squared error / square of the data")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return png(figure)


def metal_model(report: Report) -> bytes:
    """Draw the bounds against the length, a panel per shape."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle("Least time of one attention call at 8 bits: a model, not a measurement")
    bounds = [result for result in report["results"] if result["kind"] == "bound"]
    for axes, name in zip(figure.subplots(1, 2, sharey=True), _METAL_SHAPES, strict=True):
        for i, chip in enumerate(_METAL_GPUS):
            for per_head, style in ((False, "-"), (True, ":")):
                line = [b for b in bounds if b["shape"] == name and b["per_head"] == per_head]
                keys, times = [b["keys"] for b in line], [b["us"][chip] for b in line]
                label = None if per_head else chip
                axes.loglog(keys, times, style, marker="." if not per_head else None, color=f"C{i}", label=label)
        axes.set(title=f"heads / KV heads / D = {name}", xlabel="keys (dotted: the per-head kernel)")
        axes.grid(which="both", alpha=0.3)
    figure.axes[0].set_ylabel("lower bound, microseconds")
    figure.axes[0].legend()
    return png(figure)


def peers_cuda(report: Report) -> bytes:
    """Draw the peers' times over tq_hb's against the number of keys, and below how close tq_hb is to the floor."""
    from matplotlib.figure import Figure

    results = [result for result in report["results"] if result.get("bits") == 8]
    shapes = list(dict.fromkeys((r["heads"], r["kv_heads"], r["head_dim"]) for r in results))
    lengths = sorted({r["keys"] for r in results})
    figure = Figure(figsize=(1 + 2.8 * len(shapes), 6), layout="constrained")
    panels = figure.subplots(2, len(shapes), sharex=True, squeeze=False)
    for (above, below), shape in zip(panels.T, shapes, strict=True):
        rows = [r for r in results if (r["heads"], r["kv_heads"], r["head_dim"]) == shape]
        peers = {
            "torch float16": [r["sdpa_seconds"] for r in rows],
            "FlashInfer float16": [r["flashinfer"] and r["flashinfer"]["float16"]["seconds"] for r in rows],
            "FlashInfer float8": [r["flashinfer"] and r["flashinfer"]["float8"]["seconds"] for r in rows],
        }
        title = " / ".join(map(str, shape))
        for name, seconds in peers.items():
            points = [(r["keys"], s / r["seconds"]) for r, s in zip(rows, seconds, strict=True) if s]
            above.plot(*(zip(*points, strict=True) if points else ((), ())), ".-", label=name)
            if points and max(ratio for _, ratio in points) > _FAR_AHEAD:
                ticks = (1, 2, 5, 10, 20, 50, 100)
                above.set_yscale("log")
                above.set_yticks(ticks, map(str, ticks))
                above.minorticks_off()
                title += ", log scale"
        if above.get_yscale() == "linear":
            above.set_ylim(0.8, 2.3)
        above.axhline(1, color="0.4", linewidth=0.8)
        above.set_title(title, fontsize="medium")
        below.plot([r["keys"] for r in rows], [r["share_of_floor"] for r in rows], ".-", color="0.2")
        below.set_ylim(0, 1.05)
        below.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        below.set_xscale("log", base=2)
        below.set_xticks(lengths, [f"{keys // 1024}k" for keys in lengths])
        below.set_xlabel("keys")
        for axes in (above, below):
            axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("peer's time / tq_hb's at 8 bits")
    panels[1, 0].set_ylabel("tq_hb, of the floor")
    figure.suptitle(f"One token's attention on {report['results'][0]['gpu']}: heads / KV heads / D")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return png(figure)


def quality(report: Report) -> bytes:
    """Draw KL against bits per value, a panel per model, the geometric mean over the texts that all settings have."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(12, 6), layout="constrained")
    keys: dict[str, Any] = {}
    for axes, (name, model) in zip(
        figure.subplots(1, len(MODELS), sharex=True, sharey=True), MODELS.items(), strict=True
    ):
        rows = [row for row in report["results"] if row["part"] == "formats" and row["model"] == name]
        complete = complete_texts(rows)
        own: dict[str, dict[float, list[float]]] = {}
        rivals: dict[str, dict[str, tuple[float, list[float]]]] = {}
        for row in (row for row in rows if row["text"] in complete):
            bits = 32 * row["bytes_per_token"] / FLOAT_BYTES[name]
            if row["family"] == "tq_hb":
                points = own.setdefault(f"tq_hb{of_mean(row['variant'])}", {})
                points.setdefault(bits, []).append(row["mean_kl"])
            else:
                forms = rivals.setdefault(row["setting"], {})
                forms.setdefault(row["variant"], (bits, []))[1].append(row["mean_kl"])
        for i, (label, points) in enumerate(own.items()):
            kls = [_geometric_mean(values) for values in points.values()]
            (keys[label],) = axes.plot(list(points), kls, "o-", color=f"C{i}", zorder=3)
        for i, (form, variants) in enumerate(rivals.items(), len(own)):
            for variant, (bits, values) in variants.items():
                filled = "none" if variant == "plain" else "full"
                axes.plot(bits, _geometric_mean(values), "^", color=f"C{i}", fillstyle=filled, zorder=4)
            bits, values = variants["plain"]
            place = (bits, _geometric_mean(values))
            axes.annotate(form, place, (8, -3), textcoords="offset points", color=f"C{i}", fontsize="small")
        axes.set(title=model, xlabel="bits per value of K and V, scales and norms included", yscale="log")
        axes.grid(alpha=0.3)
    axes.set_xlim(right=axes.get_xlim()[1] + 0.9)  # for what the last formats are called
    figure.axes[0].set_ylabel("KL from the float32 cache, nats (log scale)")
    keys["other formats"] = Line2D([], [], color="0.3", marker="^", linestyle="none", fillstyle="none")
    keys["the same, rotated"] = Line2D([], [], color="0.3", marker="^", linestyle="none")
    figure.legend(keys.values(), keys.keys(), loc="outside lower center", ncols=3, frameon=False)
    return png(figure)


def _geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))
