"""Refuses arguments that no command can use, before any work is done."""

from __future__ import annotations

import argparse

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
