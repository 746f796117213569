"""Refuses arguments that no command can use, before any work is done."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import tq_hb
from tq_hb.options import one_of
from tq_hb.policy import MAX_THREADS

COUNTS = range(1, 2**31)
THREADS = range(1, MAX_THREADS + 1)
SEEDS = range(2**63)


def check_numbers(args: argparse.Namespace, **accepted: range | tuple[int, ...]) -> None:
    """Refuse the first option, of those named, that is given and not among the numbers accepted."""
    for name, numbers in accepted.items():
        value = getattr(args, name)
        if value is None or value in numbers:
            continue
        if isinstance(numbers, tuple):
            rule = one_of(numbers)
        else:
            rule = f"at least {numbers[0]}" if value < numbers[0] else f"at most {numbers[-1]}"
        raise tq_hb.InvalidArgument(f"--{name.replace('_', '-')} must be {rule}, got {value}")


def check_folder(option: str, path: Path) -> None:
    """Refuse a folder that files can't be written into, before the work whose results they are.

    It need not be there yet, and nothing is left behind.
    """
    _refuse(option, "folder", path, _obstacle(path))


def check_file(option: str, path: Path) -> None:
    """Refuse a file that can't be written, as `check_folder` does."""
    _refuse(option, "file", path, "it is a folder" if path.is_dir() else _obstacle(path.parent))


def _obstacle(folder: Path) -> str | None:
    try:
        there = next(each for each in (folder, *folder.parents) if each.exists())
        with tempfile.TemporaryDirectory(dir=there):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _refuse(option: str, kind: str, path: Path, why: str | None) -> None:
    if why is not None:
        raise tq_hb.InvalidArgument(f"{option} must be a {kind} that can be written, got {path} ({why})")
