"""Writes what a benchmark measured, together with everything needed to read it and to run it again."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tq_hb.cli import _machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FEWEST_SAMPLES = 15  # in a file that the documents show


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the arguments of ``python -m module``."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def measuring_parser(module: str, description: str | None, *, samples: int | None = None) -> argparse.ArgumentParser:
    """Return one of a module that writes results, with ``--samples`` if it has a default."""
    measuring = parser(module, description)
    measuring.add_argument(
        "--out", type=Path, default=RESULTS, metavar="FOLDER", help="for the results (default: bench/results)"
    )
    if samples is not None:
        measuring.add_argument(
            "--samples", type=int, default=samples, metavar="N", help="of each contender (default: %(default)s)"
        )
    return measuring


def parse(
    measuring: argparse.ArgumentParser, *, is_partial: Callable[[argparse.Namespace], object] = lambda _: False
) -> argparse.Namespace:
    """Return the arguments, and make the folder for the results.

    A run that measures less than what the documents show ends here unless it goes to a folder of its own.
    """
    args = measuring.parse_args()
    has_few = getattr(args, "samples", FEWEST_SAMPLES) < FEWEST_SAMPLES
    if (has_few or is_partial(args)) and args.out.resolve() == RESULTS:
        more = f", or take at least {FEWEST_SAMPLES} samples" if has_few else ""
        measuring.error(
            "this measures less than the documents show of bench/results, and would replace it: "
            f"name another folder, as in --out build/bench{more}"
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        measuring.error(f"argument --out: {error}")
    return args


def write(name: str, results: list[dict[str, Any]], out: Path) -> Path:
    """Write what ``bench.<name>`` measured into a folder, and return the file's path."""
    report = {
        "command": shlex.join(["python", "-m", f"bench.{name}", *sys.argv[1:]]),
        "commit": commit(),
        "date": dt.date.today().isoformat(),
        "load_average": os.getloadavg(),
        "machine": _machine.describe(),
        "results": results,
    }
    path = out / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def read(name: str, folder: Path | None = None) -> dict[str, Any]:
    """Return what was written as `name` into a folder, by default that of the documents' results."""
    report: dict[str, Any] = json.loads(((folder or RESULTS) / f"{name}.json").read_text())
    return report


def commit() -> str:
    """Return the commit that is measured, and whether what is built differs from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    measured = ("csrc", "python", "CMakeLists.txt")
    return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "--", *measured) else "")
