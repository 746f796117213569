"""Shows what the gate measured: a report for JSON, tables for the terminal and for Markdown, and plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from tq_hb.cli import _markdown
from tq_hb.cli._gate_run import Job, Outcome, smallest
from tq_hb.cli._gate_stats import BLOCK, CONFIDENCE, RESAMPLES, layer_errors
from tq_hb.cli._plots import png

Report = dict[str, Any]

_COLUMNS = {
    "kl_mean": "mean KL\n/ 10⁻³",
    "kl_p99": "p99 KL\n/ 10⁻³",
    "flips": "argmax\nchanged",
    "perplexity_change": "PPL\nchange",
    "cosine_mean": "cosine\nmean",
    "cosine_p1": "cosine\np1",
    "cosine_min": "cosine\nmin",
    "run_cosine_mean": "run cosine\nmean",
    "run_cosine_p1": "run cosine\np1",
    "variation_mean": "weights'\nvariation",
}
"""Figures in the order of the tables, and what heads them."""

_SHOWN = ("kl_mean", "kl_p99", "flips", "perplexity_change", "cosine_mean", "cosine_p1")
"""Those that the terminal has room for."""

_MARKS = {"pass": "✓", "fail": "✗", "open": "?"}


def make_report(job: Job, outcomes: Sequence[Outcome]) -> Report:
    """Return everything measured, JSON-able."""
    first = outcomes[0]
    best = {gate.name: smallest(outcomes, gate) for gate in job.gates}
    return {
        "identity": job.identity,
        "layers": [asdict(layer) for layer in job.layers],
        "bootstrap": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "block_tokens": BLOCK},
        "gates": [asdict(gate) for gate in job.gates],
        "reference_needles": first.reference_needles,
        "settings": [_setting(outcome) for outcome in outcomes],
        "smallest": {name: outcome.setting.name if outcome else None for name, outcome in best.items()},
    }


def _setting(outcome: Outcome) -> Report:
    return {
        "name": outcome.setting.name,
        **outcome.setting.describe(),
        "bytes_per_token": outcome.bytes_per_token,
        "kernels": outcome.kernels,
        "worst": {name: asdict(figure) for name, figure in outcome.worst().items()},
        "texts": {
            text: {name: asdict(figure) for name, figure in figures.items()} for text, figures in outcome.texts.items()
        },
        "per_layer": outcome.layers,
        "needles": outcome.needles,
        "verdicts": {gate.name: outcome.verdict(gate) for gate in outcome.gates},
        "let_through": {gate.name: outcome.is_let_through(gate) for gate in outcome.gates},
    }


def sentences(report: Report) -> list[str]:
    """Return what the report comes to, a sentence per gate."""
    said = []
    by_name = {row["name"]: row for row in report["settings"]}
    for gate in report["gates"]:
        name = report["smallest"][gate["name"]]
        if name is None:
            said.append(f"Gate {gate['name']}: no setting passes.")
        else:
            nbytes = by_name[name]["bytes_per_token"]
            said.append(
                f"Gate {gate['name']}: the smallest that passes is {name}, {nbytes:,.0f} bytes per token, "
                f"{_how(by_name[name])}."
            )
    return said


def _how(setting: Report) -> str:
    """Say how to make a cache of a setting, all of which are plane packed."""
    if setting["exceptions"]:
        return 'with packing="plane"'  # a TqCache has the same widths in all layers
    k_mean = {None: "", "prefill": ', k_mean="prefill"'}.get(setting["k_mean"], ", k_mean=FILE")
    bits = f"k_bits={setting['k_bits']}, v_bits={setting['v_bits']}"
    return f'with TqCache(config, {bits}, packing="plane"{k_mean})'


def limits(gate: Report) -> str:
    """Return a gate's limits in words."""
    words = [
        f"{_heading(limit['figure']).removesuffix(' / 10⁻³')} {limit['sign']} {limit['bound']:g}"
        for limit in gate["limits"]
        if limit["figure"] != "needles_lost"
    ]
    words += ["no needle lost" for limit in gate["limits"] if limit["figure"] == "needles_lost"]
    return ", ".join(words) + (f", for the whole {CONFIDENCE:.0%} interval" if gate["by_interval"] else "")


def title(report: Report) -> str:
    """Return what the table for the terminal is of."""
    return f"{report['model']}: {_scope(report)}"


def rich_table(report: Report) -> Any:
    """Return the table for the terminal: every setting on the text where each figure is worst."""
    from tq_hb.cli._output import table

    shown = [name for name in _SHOWN if name in report["settings"][0]["worst"]]
    gates = [gate["name"] for gate in report["gates"]]
    rows = table(
        "K/V bits",
        "bytes\nper token",
        *(_COLUMNS[name] for name in shown),
        *(["needles"] if report["reference_needles"] else []),
        *gates,
    )
    for row in report["settings"]:
        figures = (_figure(name, row["worst"][name]) for name in shown)
        found = [_needles(row["needles"])] if report["reference_needles"] else []
        rows.add_row(row["name"], f"{row['bytes_per_token']:,.0f}", *figures, *found, *(_mark(row, g) for g in gates))
    return rows


def markdown(report: Report, plots: dict[str, str]) -> str:
    """Return the report as Markdown; `plots` are file names by what they show."""
    gates = [gate["name"] for gate in report["gates"]]
    parts = [
        f"# Gate report: {report['model']}\n",
        f"Made by `{report['command']}`. Do not edit.\n",
        *(f"- {sentence}" for sentence in sentences(report)),
        "",
        f"{_about(report)}\n",
        _markdown.table(("gate", "wants"), ((gate["name"], limits(gate)) for gate in report["gates"]), numeric_from=2),
        "(✓) and (✗): lets it through or not, though an interval reaches over a limit, on either side.\n",
        f"## Every setting: {_scope(report)}\n",
        _table(report, None, [*(["needles"] if report["reference_needles"] else []), *gates]),
    ]
    for kind, file in plots.items():
        parts.append(f"![{kind}]({file})\n")
    texts = report["settings"][0]["texts"]
    if len(texts) > 1:
        parts.append("## Per text\n")
        for text in texts:
            reference = texts[text]["reference_perplexity"]["value"]
            parts += [f"### {text} (float32 perplexity {reference:.2f})\n", _table(report, text, [])]
    parts += ["## Per layer\n", _layer_table(report)]
    return "\n".join(parts)


def _scope(report: Report) -> str:
    texts = list(report["settings"][0]["texts"])
    return f"each figure on that of {len(texts)} texts where it is worst" if len(texts) > 1 else texts[0]


def _about(report: Report) -> str:
    texts = ", ".join(
        f"{text['name']} ({text['source']}, {text['tokens']:,} tokens)" for text in report.get("texts", ())
    )
    what = f"Texts: {texts}. " if texts else ""
    bootstrap = report["bootstrap"]
    return (
        f"{what}KL is in nats. In brackets: {bootstrap['confidence']:.0%} intervals by bootstrap, "
        f"{bootstrap['resamples']:,} resamples of blocks of {bootstrap['block_tokens']} tokens. *Cosine*: attention "
        "outputs against exact attention on the same queries, keys and values, all layers together; *run cosine*: "
        "against the float32 replay, what the layers before have done included. *Variation*: half the sum of the "
        "absolute differences of the attention weights."
    )


def _table(report: Report, text: str | None, more: Sequence[str]) -> str:
    """Return the settings' figures on a text, or each on the text where it is worst."""
    figures = {row["name"]: row["worst"] if text is None else row["texts"][text] for row in report["settings"]}
    names = [name for name in _COLUMNS if name in next(iter(figures.values()))]
    header = ["K/V bits", "bytes per token", *(_heading(name) for name in names), *more]
    rows = []
    for row in report["settings"]:
        cells = [_figure(name, figures[row["name"]][name], interval=True) for name in names]
        extra = [_needles(row["needles"]) if name == "needles" else _mark(row, name) for name in more]
        rows.append([row["name"], f"{row['bytes_per_token']:,.0f}", *cells, *extra])
    return _markdown.table(header, rows)


def _layer_table(report: Report) -> str:
    settings = [row for row in report["settings"] if not row["exceptions"]]
    errors = [layer_errors(row["per_layer"]) for row in settings]
    header = ["layer", "window", "D", *(row["name"] for row in settings)]
    rows = []
    for i, layer in enumerate(report["layers"]):
        cells = [f"{error[i]:.1e}" for error in errors]
        rows.append([str(layer["index"]), str(layer["window"] or "all"), str(layer["head_dim"]), *cells])
    table = _markdown.table(header, rows, numeric_from=0)
    return f"One minus the mean cosine on the same inputs, mean of the texts.\n\n{table}"


def plot_error(report: Report) -> bytes:
    """Draw the error against bytes per token: KL, or without predictions one minus the cosine; a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    has_kl = "kl_mean" in report["settings"][0]["worst"]
    texts = list(report["settings"][0]["texts"])
    for i, text in enumerate(texts):
        for row in report["settings"]:
            own = row["texts"][text]["kl_mean" if has_kl else "cosine_mean"]
            values = (
                [own["value"], own["low"], own["high"]] if has_kl else [1 - own[k] for k in ("value", "high", "low")]
            )
            value, low, high = values
            # Texts side by side, so that their intervals can be told apart.
            x = row["bytes_per_token"] * (1 + 0.004 * (i - (len(texts) - 1) / 2))
            label = text if row is report["settings"][0] else None
            axes.errorbar(
                x, value, [[value - low], [high - value]], fmt="o", markersize=4, capsize=2, color=f"C{i}", label=label
            )
    for row in report["settings"]:
        highest = max(each["kl_mean" if has_kl else "cosine_mean"]["value"] for each in row["texts"].values())
        place = highest if has_kl else 1 - min(each["cosine_mean"]["value"] for each in row["texts"].values())
        axes.annotate(row["name"], (row["bytes_per_token"], place), (7, 3), textcoords="offset points", fontsize=8)
    if has_kl:
        bound = next(li["bound"] for g in report["gates"] for li in g["limits"] if li["figure"] == "kl_mean")
        axes.axhline(bound, color="black", linestyle="--", linewidth=1, label=f"gate KL: {bound:g}")
    axes.set(
        title=report["model"],
        xlabel="bytes per token, all layers",
        ylabel="mean KL from float32 keys and values, nats" if has_kl else "1 - mean cosine of attention outputs",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    _make_room(figure, axes)
    return png(figure)


def _make_room(figure: Any, axes: Any) -> None:
    """Move the right end of the axes so far that every annotation ends before it."""
    figure.draw_without_rendering()
    left, right = axes.get_xlim()
    width = axes.bbox.width
    for text in axes.texts:
        x = text.xy[0]
        taken = text.get_window_extent().x1 - axes.transData.transform(text.xy)[0]
        right = max(right, left + (x - left) * width / (width - taken))
    axes.set_xlim(left, right)


def plot_layers(report: Report) -> bytes:
    """Draw one minus the mean cosine of every layer and setting as a heat map; a PNG."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    rows = [row for row in report["settings"] if not row["exceptions"]]
    error = np.maximum([layer_errors(row["per_layer"]) for row in rows], 1e-9)
    figure = Figure(figsize=(2 + 0.35 * len(report["layers"]), 1.5 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(error, norm=LogNorm(), aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    kinds = [f"{layer['index']}{'' if layer['window'] else '*'}" for layer in report["layers"]]
    axes.set_xticks(range(len(kinds)), kinds, fontsize=7)
    axes.set(title=f"{report['model']}: attention outputs on the same inputs", xlabel="layer (*: full attention)")
    figure.colorbar(image, label="1 - mean cosine")
    return png(figure)


def _heading(name: str) -> str:
    return _COLUMNS[name].replace("\n", " ")


def _figure(name: str, figure: Report, *, interval: bool = False) -> str:
    ends = [figure["value"]]
    if interval and figure["low"] is not None:
        ends += [figure["low"], figure["high"]]
    value, *around = (_number(name, end) for end in ends)
    return f"{value} ({around[0]}…{around[1]})" if around else value


def _number(name: str, value: float) -> str:
    if name.startswith("kl"):
        return f"{1e3 * value:.3g}"
    if name in ("flips", "perplexity_change"):
        return f"{value:+.2%}" if name == "perplexity_change" else f"{value:.2%}"
    if "cosine" in name:
        return f"{value:.5f}"
    return f"{value:.4f}"


def _needles(found: Sequence[bool] | None) -> str:
    return f"{sum(found)} of {len(found)}" if found else "-"


def _mark(row: Report, gate: str) -> str:
    mark = _MARKS[row["verdicts"][gate]]
    if mark != "?":
        return mark
    return "(✓)" if row["let_through"][gate] else "(✗)"
