"""Where the figures of a table come from, in Markdown."""

from __future__ import annotations

from typing import Any

from tq_hb.cli._machine import threads_in_words

Report = dict[str, Any]
"""What ``harness.read`` returns."""


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
