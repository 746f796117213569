"""``tq-hb info``: what tq_hb can use on this machine, and why not the rest."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``info`` to the command line.

    >>> import argparse
    >>> from tq_hb.cli import info
    >>> parser = argparse.ArgumentParser()
    >>> info.add_parser(parser.add_subparsers())
    >>> parser.parse_args(["info", "--json"]).json
    True
    """
    parser = subparsers.add_parser("info", help="show devices, instruction set, threads and versions")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report.

    >>> import argparse
    >>> from tq_hb.cli import info
    >>> info.run(argparse.Namespace(json=True))  # doctest: +ELLIPSIS
    {
      "system": ...
    }
    0
    """
    from tq_hb.cli._output import print_json

    report = collect()
    if args.json:
        print_json(report)
    else:
        _print_tables(report)
    return 2 if report["errors"] else 0


def collect() -> dict[str, Any]:
    """Return everything that ``info`` shows.

    >>> from tq_hb.cli.info import collect
    >>> collect()["bits"]
    [5, 6, 8]
    """
    import tq_hb
    from tq_hb.cli import _machine

    errors: list[str] = []

    def ask(get: Callable[[], object]) -> object:
        """Return None where a variable has a value that can't be used: this is where one looks why."""
        try:
            return get()
        except (tq_hb.InvalidArgument, tq_hb.DeviceError) as error:
            if str(error) not in errors:
                errors.append(str(error))
            return None

    return {
        **_machine.describe(ask),
        "default_device": ask(lambda: tq_hb.Device("auto").backend),
        "errors": errors,
        "devices": [dataclasses.asdict(device) for device in tq_hb.devices()],
        "head_dims": list(tq_hb.supported_head_dims()),
        "bits": list(tq_hb.supported_bits()),
        "environment": {name: os.environ.get(name) for name in tq_hb.policy.VARIABLES},
    }


def _print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from tq_hb.cli._machine import threads_in_words
    from tq_hb.cli._output import SIMULATED, print_table, table

    facts = Table.grid(padding=(0, 2))
    facts.add_row("tq_hb", report["tq_hb"])
    usable = "" if report["isa"] is None else f", {report['isa']}, {threads_in_words(report['threads'])}"
    facts.add_row("processor", f"{report['processor']}{usable}")
    facts.add_row("system", f"{report['system']}, Python {report['python']}")
    facts.add_row("head dimensions", ", ".join(map(str, report["head_dims"])))
    facts.add_row("bits per value", ", ".join(map(str, report["bits"])))
    libraries = (f"{name} {version or 'not installed'}" for name, version in report["libraries"].items())
    facts.add_row("libraries", ", ".join(libraries))
    variables = (f"{name}={value}" for name, value in report["environment"].items() if value is not None)
    facts.add_row("environment", ", ".join(variables) or "no variable set")
    for error in report["errors"]:
        facts.add_row("error", error, style="red")

    devices = table("backend", "usable", "name", numeric_from=3)
    devices.columns[-1].no_wrap = False  # a reason may be longer than a line
    for device in report["devices"]:
        usable = "default" if device["backend"] == report["default_device"] else "yes"
        seen = (usable, device["name"]) if device["available"] else ("no", device["reason"])
        devices.add_row(device["backend"], *seen)

    console = Console(markup=False)
    console.print(facts)
    console.print()
    print_table(console, "devices", devices)
    for device in report["devices"]:
        if device["is_simulated"]:
            console.print(f"{device['backend']} is {SIMULATED}", soft_wrap=True)
