"""What the commands share in how they print."""

from __future__ import annotations

import json
import sys
from typing import Any

SIMULATED = "simulated: runs the Metal sources on this CPU; says nothing about speed"
"""What is said of a simulated device."""


def print_json(report: object) -> None:
    """Print a report as JSON, alone on standard output."""
    json.dump(report, sys.stdout, indent=2)
    print()


def table(title: str, *columns: str, numeric_from: int = 1) -> Any:
    """Return an empty rich table whose columns from `numeric_from` on are right-aligned."""
    from rich.table import Table

    result = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        result.add_column(column, justify="right" if i >= numeric_from else "left", no_wrap=i > 0)
    return result
