"""What benchmarks share: their arguments, how far they are, and their files.

A file has what was measured, together with everything needed to read it and to run it again.
"""

from __future__ import annotations

import argparse
import datetime as dt
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tq_hb
from bench.markdown import Report
from tq_hb.cli import _machine
from tq_hb.cli._output import commit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
Case = TypeVar("Case")

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
            "--samples",
            type=sample_count,
            default=samples,
            metavar="N",
            help="of each contender (default: %(default)s)",
        )
    return measuring


def sample_count(text: str) -> int:
    """Return how many samples to take: quartiles and deciles need two."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be a number of at least 2, got {text!r}")
    return int(text)


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


def run(module: str, main: Callable[[], None]) -> None:
    """Run ``python -m module``; what the arguments or the machine don't allow is said in a line."""
    try:
        main()
    except (tq_hb.InvalidArgument, tq_hb.UnsupportedError, tq_hb.DeviceError, ModuleNotFoundError) as error:
        print(f"python -m {module}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def write(name: str, results: list[dict[str, Any]], out: Path) -> None:
    """Write what ``bench.<name>`` measured into a folder."""
    report = {
        "command": shlex.join(["python", "-m", f"bench.{name}", *sys.argv[1:]]),
        "commit": commit(ROOT),
        "date": dt.date.today().isoformat(),
        "load_average": os.getloadavg(),
        "machine": _machine.describe(),
        "results": results,
    }
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


def read(name: str, folder: Path | None = None) -> Report:
    """Return what was written as `name` into a folder, by default that of the documents' results, and its ``path``."""
    path = (folder or RESULTS) / f"{name}.json"
    report: Report = json.loads(path.read_text())
    shown = path.resolve()
    report["path"] = str(shown.relative_to(ROOT) if shown.is_relative_to(ROOT) else path)
    return report


def finish(
    name: str,
    results: list[dict[str, Any]],
    out: Path,
    *tables: Callable[[Report], str],
    plot: Callable[[Report], bytes] | None = None,
) -> None:
    """Write what ``bench.<name>`` measured into a folder, with its plot if it has one, and show it."""
    write(name, results, out)
    if plot is not None:
        draw(name, out, plot)
    show(name, out, *tables)


def draw(name: str, folder: Path, plot: Callable[[Report], bytes]) -> None:
    """Draw the plot of what was written as `name` into a folder, beside it; without matplotlib say so."""
    try:
        (folder / f"{name}.png").write_bytes(plot(read(name, folder)))
    except ModuleNotFoundError as error:
        print(f"no plot: {error}", file=sys.stderr)


def show(name: str, folder: Path, *tables: Callable[[Report], str]) -> None:
    """Print tables of what was written as `name` into a folder, headed by what their functions return, and its path."""
    from rich.console import Console
    from rich.markdown import Markdown

    report = read(name, folder)
    # Where there is no terminal, nothing has to fit into 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables:
        what = (inspect.getdoc(table) or "").removeprefix("Return ")
        console.print(Markdown(f"**{what[:1].upper()}{what[1:]}**\n\n{table(report)}"))
    print(folder / f"{name}.json")


def track(cases: Sequence[Case], describe: Callable[[Case], str] = str) -> Iterator[Case]:
    """Pass on what is to be measured, and show how far the run is."""
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn between measurements only, not by a thread of its own.
    with Progress(*columns, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(cases))
        for done, case in enumerate(cases):
            progress.update(task, description=describe(case), completed=done, refresh=True)
            yield case
        progress.update(task, description="done", completed=len(cases), refresh=True)
