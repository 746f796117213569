"""The plot of what ``tq-hb generate`` measured."""

from __future__ import annotations

from typing import Any

from tq_hb.cli._plots import png


def plot_replay(report: dict[str, Any]) -> bytes:
    """Draw KL against bytes as a PNG."""
    from matplotlib.figure import Figure

    reference, *rows = report["replay"]["settings"]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        axes.errorbar(
            row["bytes_per_token"],
            row["mean_kl"],
            row["mean_kl_standard_error"],
            fmt="o",
            capsize=4,
            color="C0",
        )
        place = (row["bytes_per_token"], row["mean_kl"])
        axes.annotate(f"{row['setting']} bits", place, (9, -4), textcoords="offset points")
    axes.set(
        title=f"{report['model']}: {report['replay']['scored_tokens']} tokens replayed",
        xlabel=f"bytes per token held, all layers (float32: {reference['bytes_per_token']:,})",
        ylabel="mean KL from the float32 cache, nats (log scale)",
        yscale="log",
    )
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    return png(figure)
