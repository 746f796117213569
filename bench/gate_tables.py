"""The tables and plots of docs/quality.md, from the reports that ``tq-hb gate`` wrote into docs/gates."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from bench import harness
from tq_hb.cli._markdown import table

GATES = harness.ROOT / "docs" / "gates"
_MODELS = {
    "gate_gemma": "gemma-3-270m",
    "gate_gemma_mean_key": "gemma-3-270m-mean-key",
    "gate_smollm2": "smollm2-135m",
}
_FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "kl_mean": ("mean KL / 10⁻³", lambda value: f"{1e3 * value:.2g}"),
    "kl_p99": ("p99 KL / 10⁻³", lambda value: f"{1e3 * value:.2g}"),
    "flips": ("argmax changed", lambda value: f"{value:.1%}"),
    "perplexity_change": ("perplexity change", lambda value: f"{value:+.2%}"),
    "run_cosine_mean": ("run cosine mean", lambda value: f"{value:.4f}"),
    "run_cosine_p1": ("run cosine p1", lambda value: f"{value:.4f}"),
}


def gate(folder: str) -> str:
    """Return one model's settings on the text where each figure is worst, and which gates they pass."""
    report = _read(folder)
    gates = [gate["name"] for gate in report["gates"]]
    wanted = report["reference_needles"]
    rows = []
    for row in report["settings"]:
        cells = [show(row["worst"][name]["value"]) for name, (_, show) in _FIGURES.items()]
        if wanted:
            lost = sum(had and not has for had, has in zip(wanted, row["needles"], strict=True))
            cells.append(f"{lost} of {sum(wanted)}")
        passed = ["yes" if row["let_through"][name] else "no" for name in gates]
        rows.append([row["name"], f"{row['bytes_per_token']:,.0f}", *cells, *passed])
    headings = [heading for heading, _ in _FIGURES.values()] + (["needles lost"] if wanted else [])
    header = ["K/V bits", "bytes per token", *headings, *gates]
    source = f"`docs/gates/{folder}/gate.json`, written by `{report['command']}`"
    return f"{table(header, rows)}\n{source}; [gate.md](gates/{folder}/gate.md) has every text and layer.\n"


def draw() -> None:
    """Draw the plots beside the reports again."""
    from tq_hb.cli import _gate_report

    for folder in _MODELS.values():
        report = _read(folder)
        (GATES / folder / "gate.png").write_bytes(_gate_report.plot_error(report))
        (GATES / folder / "layers.png").write_bytes(_gate_report.plot_layers(report))


def _read(folder: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((GATES / folder / "gate.json").read_text())
    return report


TABLES: dict[str, Callable[[], str]] = {name: partial(gate, folder) for name, folder in _MODELS.items()}
