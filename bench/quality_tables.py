"""The tables of docs/quality.md and docs/mean-keys.md that are made of ``bench.quality`` and ``bench.hard_keys``."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.markdown import Report, source
from tq_hb.cli._markdown import table

MODELS = {"smollm2-135m": "SmolLM2 135M", "gemma-3-270m": "Gemma 3 270M"}
FLOAT_BYTES = {"smollm2-135m": 30 * 3 * 64 * 2 * 4, "gemma-3-270m": 18 * 256 * 2 * 4}  # of a token, in float32
_MEANS = {
    "plain": "no mean",
    "prefill mean": "of the first 256 tokens",
    "short mean": "calibrated for 2,048 positions",
    "whole mean": "calibrated for the model's context",
    "turning mean, 1": "before RoPE, turned to each position",
    "turning mean, 64": "the same, one per 64 positions",
    "turning mean, 256": "the same, one per 256 positions",
}
_POSITIONED = ("short mean", "whole mean", "turning mean, 1", "turning mean, 64", "turning mean, 256")


def formats(report: Report) -> str:
    """Return KL of tq_hb's widths and of other formats per model and text, the rest over the texts that all have."""
    rows = []
    texts = dict.fromkeys(row["text"] for row in _results(report, "formats"))
    for name, model in MODELS.items():
        complete = complete_texts(_results(report, "formats", name))
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in _results(report, "formats", name):
            groups.setdefault((row["setting"], row["variant"]), []).append(row)
        for (setting, variant), group in sorted(groups.items(), key=lambda item: -item[1][0]["bytes_per_token"]):
            if group[0]["family"] == "tq_hb":
                what = f"tq_hb {setting}" + of_mean(variant)
            else:
                what = setting + ("" if variant == "plain" else ", rotated")
            whole = [row for row in group if row["text"] in complete]
            rows.append(
                (
                    f"{model}: {what}",
                    f"{32 * group[0]['bytes_per_token'] / FLOAT_BYTES[name]:.3g}",
                    *(next((f"{1e3 * r['mean_kl']:.3g}" for r in group if r["text"] == text), "") for text in texts),
                    f"{1e3 * _mean(row['p99_kl'] for row in whole):.3g}",
                    f"{_mean(row['top1_agreement'] for row in whole):.1%}",
                    f"{_mean(row['perplexity'] / row['reference_perplexity'] - 1 for row in whole):+.2%}",
                )
            )
    header = ("K and V", "bits", *(f"KL, {text}" for text in texts), "p99 KL", "top-1", "perplexity")
    return _table(report, header, rows)


def gain(report: Report) -> str:
    """Return the KL with each kind of mean, per width, model and text."""
    cells: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in _results(report, "formats"):
        if row["family"] == "tq_hb":
            cells.setdefault((row["model"], row["setting"], row["text"]), {})[row["variant"]] = row["mean_kl"]
    variants = ("plain", "prefill mean", "short mean", "whole mean")
    rows = [
        (
            f"{MODELS[name]}, {setting}, {text}",
            f"{1e3 * kl['plain']:.3g}",
            *(
                f"{1e3 * kl[variant]:.3g} ({kl[variant] / kl['plain'] - 1:+.0%})" if variant in kl else ""
                for variant in variants[1:]
            ),
        )
        for (name, setting, text), kl in cells.items()
        if len(kl) > 1
    ]
    return _table(report, ("model, K/V bits, text", *(_MEANS[variant] for variant in variants)), rows)


def layers(report: Report) -> str:
    """Return what the means do to each layer's own attention, at 6/6, over the texts."""
    rows = []
    for name, model in MODELS.items():
        losses: dict[str, list[list[float]]] = {}
        for row in _results(report, "formats", name):
            if row["family"] == "tq_hb" and row["setting"] == "6/6":
                losses.setdefault(row["variant"], []).append(row["layer_loss"])
        by_variant = {
            variant: [_mean(column) for column in zip(*texts, strict=True)] for variant, texts in losses.items()
        }
        for layer, plain in enumerate(by_variant["plain"] if len(by_variant) > 1 else ()):
            ratios = (
                f"{by_variant[variant][layer] / plain:.2f}" if variant in by_variant else ""
                for variant in ("prefill mean", "short mean", "whole mean")
            )
            kind = ", full" if name == "gemma-3-270m" and layer % 6 == 5 else ""
            rows.append((f"{model}, layer {layer}{kind}", f"{plain:.1e}", *ratios))
    header = ("1 - cosine with exact attention", "no mean", "first 256: of that", "2,048", "model's context")
    return _table(report, header, rows)


def positions(report: Report) -> str:
    """Return the KL with means of every kind at the first positions and far into the context."""
    rows = []
    for name, model in MODELS.items():
        cells: dict[int, dict[str, float]] = {}
        # At the first position, what does not turn has been measured among the formats.
        fixed = [row for row in _results(report, "formats", name) if row["setting"] == "6/6" and row["text"] == "code"]
        for row in [*fixed, *_results(report, "positions", name)]:
            cells.setdefault(row["first_position"], {})[row["variant"]] = row["mean_kl"]
        for first, kl in sorted(cells.items()):
            if "plain" not in kl or len(kl) < 2:
                continue
            values = (f"{1e3 * kl[v]:.3g} ({kl[v] / kl['plain'] - 1:+.0%})" if v in kl else "" for v in _POSITIONED)
            rows.append((f"{model}, from position {first:,}", f"{1e3 * kl['plain']:.3g}", *values))
    header = ("6/6 bits, text: code", "no mean", *(_MEANS[variant] for variant in _POSITIONED))
    return _table(report, header, rows)


def signs(report: Report) -> str:
    """Return the KL under several sign vectors, without and with a mean."""
    rows = []
    for name, model in MODELS.items():
        cells: dict[str, list[float]] = {}
        for row in _results(report, "signs", name):
            cells.setdefault(row["variant"], []).append(row["mean_kl"])
        for variant, values in cells.items() if all(len(values) > 1 for values in cells.values()) else ():
            spread = statistics.stdev(values) / _mean(values)
            figures = (f"{1e3 * value:.3g}" for value in values)
            rows.append((f"{model}, {_MEANS[variant]}", *figures, f"{1e3 * _mean(values):.3g}", f"{spread:.0%}"))
    seeds = dict.fromkeys(row["seed"] for row in _results(report, "signs"))
    header = ("6/6 bits, text: code", *("tq_hb's signs" if s == 0 else f"seed {s}" for s in seeds), "mean", "spread")
    return _table(report, header, rows)


def hard_synthetic(report: Report) -> str:
    """Return where widths hold on synthetic keys."""
    return _hard(report, lambda case: not case.startswith("layer"))


def hard_real(report: Report) -> str:
    """Return where widths hold on the keys of Gemma's full layers."""
    return _hard(report, lambda case: case.startswith("layer"))


def _hard(report: Report, wanted: Callable[[str], bool]) -> str:
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report["results"]:
        if wanted(row["case"]):
            cells.setdefault((row["case"], row["k_mean"]), []).append(row)
    rows = []
    for (case, k_mean), group in cells.items():
        keys = group[0]["statistics"]
        rows.append(
            (
                f"{case}{'' if k_mean == 'none' else f', {k_mean} mean'}",
                f"{keys['row_norm']:.0f}",
                f"{keys['kurtosis']:.0f}",
                f"{keys['mean_energy']:.0%}",
                *(f"{row['cosine']['mean']:.5f}{'' if row['holds'] else ' ✗'}" for row in group),
            )
        )
    bits = (f"cosine, {bits}/{bits}" for bits in (5, 6, 8))
    return _table(report, ("keys", "row norm", "kurtosis", "energy of the mean", *bits), rows)


def of_mean(variant: str) -> str:
    """Return what is added to a setting's name for its mean key."""
    return "" if variant == "plain" else f", mean {_MEANS[variant]}"


def complete_texts(rows: Sequence[dict[str, Any]]) -> set[str]:
    """Return the texts that most settings have been measured on: only there can they be compared."""
    counts = Counter(row["text"] for row in rows)
    return {text for text, count in counts.items() if count == max(counts.values())}


TABLES: dict[str, tuple[str, Callable[[Report], str]]] = {
    "quality_formats": ("quality", formats),
    "mean_keys_gain": ("quality", gain),
    "mean_keys_layers": ("quality", layers),
    "mean_keys_positions": ("quality", positions),
    "mean_keys_signs": ("quality", signs),
    "hard_keys_synthetic": ("hard_keys", hard_synthetic),
    "hard_keys_real": ("hard_keys", hard_real),
}


def _results(report: Report, part: str, model: str | None = None) -> list[dict[str, Any]]:
    return [row for row in report["results"] if row["part"] == part and model in (None, row["model"])]


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _table(report: Report, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with its source, or that there's nothing for it."""
    if not rows:
        return f"Not measured by `{report['command']}`.\n"
    return table(header, rows) + source(report, options=False) + ".\n"
