"""What ``bench/results/peers_cpu.json`` says, as tables and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from bench.markdown import Report, source
from bench.peers.ours import FORMS, name_of
from tq_hb.cli._machine import threads_in_words
from tq_hb.cli._markdown import table
from tq_hb.cli._plots import png

Result = dict[str, Any]

_NAMES = [name_of(*form) for form in FORMS]
_README_SHAPES = {"head_dim": 256, "tokens": 4096}
_FIVE_BITS = [name_of(5, packing, "default") for packing in ("byte", "plane")]
# Forms of a peer, how many times longer it is to take, and than which of ours: the faster counts on both sides.
_WANTED = (
    (["llama.cpp q8_0"], 3.0, [name_of(8, "byte", "default")]),
    (["llama.cpp q5_0"], 9.0, _FIVE_BITS),
    (["torch float32", "torch float32 enable_gqa"], 7.0, _FIVE_BITS),
)


def _measured(report: Report) -> list[Result]:
    return [result for result in report["results"][1:] if result["ratio"]]


def _header(name: str) -> str:
    """Return a form's name in words."""
    _, bits, *words = name.split()
    return f"{bits} bits" + " in planes" * ("plane" in words) + ", strict" * ("strict" in words)


def _heads(result: Result) -> str:
    return f"{result['heads']} / {result['kv_heads']} / {result['head_dim']}"


def every_shape(report: Report) -> str:
    """Return tq_hb's microseconds per shape, and in brackets how many times longer the fastest peer takes."""
    header = ("heads / KV heads / D", "tokens", "threads", "fastest peer", *map(_header, _NAMES), "8 bits, of read")
    rows = [
        (
            _heads(result),
            f"{result['tokens']:,}",
            str(result["threads"]),
            f"{result['fastest_peer']}, {result['rows'][result['fastest_peer']]['median_us']:,.0f}",
            *(f"{result['rows'][form]['median_us']:,.0f} ({result['ratio'][form]:.2f})" for form in _NAMES),
            f"{result['rows'][name_of(8, 'byte', 'default')]['share_of_read']:.2f}",
        )
        for result in _measured(report)
    ]
    return table(header, rows) + _source(report)


def every_peer(report: Report) -> str:
    """Return how many times longer each peer takes than tq_hb: the median over the shapes, in brackets the extremes."""
    results = _measured(report)
    peers = dict.fromkeys(name for result in results for name in result["rows"] if name not in _NAMES)
    forms = [name_of(*form) for form in FORMS if form[2] == "default"]
    rows = []
    for peer in peers:
        here = [result["rows"] for result in results if peer in result["rows"]]
        errors = [row[peer]["error"] for row in here]
        spans = [_span([row[peer]["median_us"] / row[form]["median_us"] for row in here]) for form in forms]
        rows.append((peer, f"{max(errors):.0e}", str(len(here)), *spans))
    own = {form: max(result["rows"][form]["error"] for result in results) for form in forms}
    of_forms = ", ".join(f"{_header(form)}: {error:.0e}" for form, error in own.items())
    header = ("peer", "error", "shapes", *(f"÷ {_header(form)}" for form in forms))
    return table(header, rows) + f"\nErrors of tq_hb: {of_forms}.\n" + _source(report) + _skipped(report)


def _span(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


def at_one_length(report: Report) -> str:
    """Return the ratios at D = 256 and 4,096 tokens, and where tq_hb is slower than the fastest peer."""
    results = _measured(report)
    forms = [name_of(*form) for form in FORMS if form[2] == "default"]
    header = (
        "heads / KV heads / D",
        "tokens",
        "threads",
        "fastest peer",
        *(f"÷ {_header(form)}" for form in forms),
    )
    rows = [
        (
            _heads(result),
            f"{result['tokens']:,}",
            str(result["threads"]),
            result["fastest_peer"],
            *(f"{result['ratio'][form]:.2f}" for form in forms),
        )
        for result in results
        if all(result[name] == value for name, value in _README_SHAPES.items())
    ]
    return table(header, rows) + "\n" + losses(results) + _source(report)


def losses(results: Sequence[Result]) -> str:
    """Return at how many shapes the better packing of each width is slower than the fastest peer."""
    groups = sorted({_group(result) for result in results})
    rows = []
    for bits in dict.fromkeys(form[0] for form in FORMS):
        forms = [name_of(*form) for form in FORMS if form[0] == bits and form[2] == "default"]
        lost = [result for result in results if max(result["ratio"][form] for form in forms) < 1]
        for threads in sorted({result["threads"] for result in results}):
            counts = (f"{_count(lost, group, threads)} of {_count(results, group, threads)}" for group in groups)
            rows.append((f"{bits} bits, {threads_in_words(threads)}", *counts))
    return table(("slower than the fastest peer", *map(_query_heads, groups)), rows)


def bounds(report: Report) -> str:
    """Return the ratios to the fastest peer, and those of a call that would take as long as a read of its bytes."""
    results = _measured(report)
    forms = [*_FIVE_BITS, name_of(8, "byte", "default")]
    rows = []
    for group in sorted({_group(result) for result in results}):
        here = [result for result in results if _group(result) == group]
        cells = []
        for form in forms:
            cells += [
                _span([result["ratio"][form] for result in here]),
                _span([_read(result, form) for result in here]),
            ]
        rows.append((_query_heads(group), str(len(here)), *cells))
    header = ("", "rows", *(cell for form in forms for cell in (f"÷ {_header(form)}", "÷ a read of them")))
    return table(header, rows) + f"\n{_far_ahead(results)}{_ahead_of_each(results)}\n" + _source(report)


def _read(result: Result, form: str) -> float:
    """How many times longer the fastest peer takes than a plain read of a form's bytes."""
    return float(result["ratio"][form] / result["rows"][form]["share_of_read"])


def _far_ahead(results: Sequence[Result]) -> str:
    """Return at how many shapes the fastest peer is left far behind, and where it would be by a read alone."""
    narrow = [name_of(*form) for form in FORMS if form[0] < 8 and form[2] == "default"]

    def count(ratio: Callable[[Result], float]) -> int:
        return sum(ratio(result) >= (5.0 if _group(result) >= 4 else 2.5) for result in results)

    ours = count(lambda result: max(result["ratio"][form] for form in narrow))
    in_bytes, in_planes = (count(partial(_read, form=form)) for form in _FIVE_BITS)
    return (
        "The fastest peer takes at least 2.5 times as long as 5 or 6 bits (with four or more query heads per KV head, "
        f"5 times) at {ours} of {len(results)} rows. It would at {in_bytes} if a call took as long as a read of 5 "
        f"bits, and at {in_planes} if it took as long as a read of 5 bits in planes."
    )


def _ahead_of_each(results: Sequence[Result]) -> str:
    """Return at how many shapes some peers are left as far behind as wanted, and at how many by a read alone."""
    text = ""
    for peers, wanted, forms in _WANTED:
        here = [result["rows"] for result in results if peers[0] in result["rows"]]
        if not here:
            continue

        def ratio(rows: Result, form: str, peers: Sequence[str] = peers) -> float:
            fastest = min(rows[peer]["median_us"] for peer in peers if peer in rows)
            return float(fastest / rows[form]["median_us"])

        ours = sum(max(ratio(rows, form) for form in forms) >= wanted for rows in here)
        # Where a call is faster than the read, it stays so.
        read = sum(
            max(ratio(rows, form) / min(1.0, rows[form]["share_of_read"]) for form in forms) >= wanted for rows in here
        )
        text += (
            f" {peers[0]} takes at least {wanted:.0f} times as long as {_header(forms[0])} at {ours} of {len(here)}, "
            f"and would at {read}."
        )
    return text


def _query_heads(group: int) -> str:
    return f"{group} query head{'s' * (group != 1)} per KV head"


def _group(result: Result) -> int:
    return int(result["heads"] // result["kv_heads"])


def _count(results: Sequence[Result], group: int, threads: int) -> int:
    return sum(_group(result) == group and result["threads"] == threads for result in results)


def _source(report: Report) -> str:
    machine, account = report["machine"], report["results"][0]
    versions = ", ".join(account["libraries"].values())
    where = f"{machine['processor']}, {machine['isa']}, load average {report['load_average'][0]:.1f}, {versions}"
    return f"{source(report)}: {where}.\n"


def _skipped(report: Report) -> str:
    """Return a list of what was not measured, or only at some shapes, and why."""
    reasons: dict[str, str] = dict(report["results"][0]["skipped"])
    for result in report["results"][1:]:
        for name, reason in result["skipped"].items():
            shape = f"{_heads(result)}, {result['tokens']:,} tokens"
            reasons.setdefault(f"{name} at {shape}" if name == "all" else name, reason)
    return "".join(f"\nNot measured: {name}: {reason}.\n" for name, reason in reasons.items())


def plot(report: Report) -> bytes:
    """Draw the fastest peer's time over tq_hb's against the length, a panel per head size and number of threads."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    results = _measured(report)
    head_dims = sorted({result["head_dim"] for result in results})
    threads = sorted({result["threads"] for result in results})
    groups = sorted({_group(result) for result in results})
    lengths = sorted({result["tokens"] for result in results})
    figure = Figure(figsize=(1 + 3.3 * max(2, len(head_dims)), 1 + 2.8 * len(threads)), layout="constrained")
    panels = figure.subplots(len(threads), len(head_dims), sharex=True, sharey=True, squeeze=False)
    for row, count in enumerate(threads):
        for column, head_dim in enumerate(head_dims):
            axes = panels[row, column]
            here = [r for r in results if r["threads"] == count and r["head_dim"] == head_dim]
            for color, group in enumerate(groups):
                points = sorted((r for r in here if _group(r) == group), key=lambda r: int(r["tokens"]))
                tokens = [r["tokens"] for r in points]
                for (marker, line), form in _LINES.items():
                    ratios = [r["ratio"][form] for r in points]
                    axes.plot(tokens, ratios, color=f"C{color}", marker=marker, linestyle=line, markersize=4)
            axes.axhline(1, color="0.4", linewidth=0.8)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
            axes.minorticks_off()
            axes.set_title(f"D = {head_dim}, {threads_in_words(count)}", fontsize="medium")
            axes.grid(alpha=0.25)
        panels[row, 0].set_ylabel("fastest peer's time / tq_hb's, log scale")
    low, high = axes.get_ylim()
    ratios = [ratio for ratio in _RATIOS if low <= ratio <= high]
    axes.set_yticks(ratios, [f"{ratio:g}" for ratio in ratios])
    for axes in panels[-1]:
        axes.set_xlabel("tokens in the cache")
    keys = [Line2D([], [], color=f"C{color}", label=_query_heads(group)) for color, group in enumerate(groups)]
    for (marker, line), form in _LINES.items():
        keys.append(Line2D([], [], color="0.2", marker=marker, linestyle=line, label=_header(form)))
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return png(figure)


_RATIOS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
_LINES = {
    ("o", "-"): name_of(5, "plane", "default"),
    ("s", "--"): name_of(8, "byte", "default"),
}
