"""What the commands share in how they print, and in how they write files."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

SIMULATED = "simulated: runs the Metal sources on this CPU; says nothing about speed"
"""What is said of a simulated device."""

_BUILT = ("csrc", "python", "CMakeLists.txt")
"""What of a checkout a measurement depends on."""


def print_json(report: object) -> None:
    """Print a report as JSON, alone on standard output."""
    json.dump(report, sys.stdout, indent=2)
    print()


def table(*columns: str, numeric_from: int = 1) -> Any:
    """Return an empty rich table whose columns from `numeric_from` on are right-aligned."""
    from rich.table import Table

    result = Table()
    for i, column in enumerate(columns):
        result.add_column(column, justify="right" if i >= numeric_from else "left", no_wrap=True)
    return result


def print_table(console: Console, title: str, rows: Any) -> None:
    """Print a table below its title, which rich's own titles would wrap at the table's width."""
    console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(rows)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a file to write that takes the place of `path` once it is whole, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        file = Path(scratch) / path.name
        yield file
        file.replace(path)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with whole(path) as file:
        file.write_bytes(content)


def is_checkout(root: Path) -> bool:
    """Tell whether a folder is a checkout of this project."""
    return (root / "python" / "tq_hb" / "__init__.py").exists()


def has_results_of_documents(folder: Path) -> bool:
    """Tell whether a folder is ``bench/results`` of a checkout, which the documents show."""
    results = folder.resolve()
    return results.parts[-2:] == ("bench", "results") and is_checkout(results.parents[1])


def commit(root: Path) -> str | None:
    """Return the commit of a checkout of this project, and whether what is built differs from it; None elsewhere."""
    if not is_checkout(root):
        return None

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    try:
        head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", *_BUILT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + (" with changes" if changes else "")
