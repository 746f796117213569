"""The command line: ``tq-hb info | bench | generate | gate | calibrate``.

A command is a module with ``add_parser(subparsers)`` and ``run(args) -> int``. Modules import rich, torch and the like
inside `run`, so that ``--help`` and ``info`` stay fast and work without the optional libraries.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

import tq_hb
from tq_hb.cli import bench, calibrate, gate, generate, info

__all__ = ["main"]

_COMMANDS = (info, bench, generate, gate, calibrate)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, without the program's name. Default ``sys.argv[1:]``.

    Returns
    -------
    int
        0, or 2 when the arguments or the machine don't allow what was asked (argparse's own code for that).

    Examples
    --------
    >>> from tq_hb.cli import main
    >>> main(["--version"])
    Traceback (most recent call last):
    SystemExit: 0
    >>> main(["bench", "--samples", "1"])  # the reason goes to standard error
    2
    """
    parser = argparse.ArgumentParser(prog="tq-hb", description="KV caches at 5, 6 or 8 bits per value.")
    parser.add_argument("--version", action="version", version=f"tq_hb {tq_hb.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subparsers)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.command_line = shlex.join(["tq-hb", *argv])
    try:
        code: int = args.run(args)
    except (tq_hb.InvalidArgument, tq_hb.UnsupportedError, tq_hb.DeviceError, OSError, MemoryError) as error:
        print(f"tq-hb {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code
