"""Writes what a benchmark measured, together with everything needed to read it and to run it again."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from tq_hb.cli import _machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the arguments of ``python -m module``."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def write(name: str, module: str, results: list[dict[str, Any]]) -> Path:
    """Write ``bench/results/<name>.json`` and return its path."""
    report = {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": commit(),
        "date": dt.date.today().isoformat(),
        "load_average": os.getloadavg(),
        "machine": _machine.describe(),
        "results": results,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def read(name: str) -> dict[str, Any]:
    """Return what was written as `name`."""
    report: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return report


def commit() -> str:
    """Return the commit that is measured, and whether what is built differs from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    measured = ("csrc", "python", "CMakeLists.txt")
    return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "--", *measured) else "")
