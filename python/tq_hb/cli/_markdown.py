"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numeric_from: int = 1) -> str:
    """Return a table whose columns from `numeric_from` on are aligned to the right, the others to the left."""
    rule = ["---:" if i >= numeric_from else "---" for i in range(len(header))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *rows))
