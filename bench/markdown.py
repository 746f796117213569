"""Tables in Markdown, and where their figures come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tq_hb.cli._machine import threads_in_words

Report = dict[str, Any]
"""What ``harness.read`` returns."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is aligned to the left, the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def source(report: Report, *, options: bool = True) -> str:
    """Return the beginning of a sentence that names the report's file and its command, with or without its options."""
    command = report["command"] if options else report["command"].split(" --")[0]
    return f"\n`{report['path']}`, written by `{command}`"


def machine(report: Report) -> str:
    """Return the end of that sentence: the machine, its threads and instruction set, and torch's version."""
    where = report["machine"]
    torch = where["libraries"]["torch"]
    peer = f"torch {torch}" if torch else "no torch"
    return f": {where['processor']}, {threads_in_words(where['threads'])}, {where['isa']}, {peer}.\n"
