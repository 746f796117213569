"""Timing of calls that differ a hundredfold, taking turns, within a given time."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

_SHORTEST_SAMPLE_S = 1e-3
_FEWEST_SAMPLES = 3
_LONG_CALL_S = 10e-3
_IDLE_WINDOW_S = 1e-3
_LONGEST_WAIT_S = 0.25


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median and the lower decile of the samples."""

    median_us: float
    lower_decile_us: float
    samples: int


class Timer:
    """Times one contender's calls, after a few that show about how long one takes.

    Parameters
    ----------
    call : callable
        What to time.
    awake : callable, optional
        Returns what surrounds the calls of a sample.
    """

    def __init__(
        self, call: Callable[[], Any], awake: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self._call, self._awake = call, awake
        self._samples_s: list[float] = []
        wait_for_idle_threads()
        with awake():
            self._run(1)
            self.call_s = self._run(1)
            if self.call_s < _LONG_CALL_S:
                self.call_s = min(self.call_s, self._run(1))
        self._calls = max(1, math.ceil(_SHORTEST_SAMPLE_S / self.call_s))

    @property
    def sample_s(self) -> float:
        """What a sample takes, about."""
        return self.call_s * (self._calls + (self.call_s < _LONG_CALL_S)) + 2 * _IDLE_WINDOW_S

    def take_sample(self) -> None:
        """Time as many calls as the clock needs, when no other thread of this process runs."""
        wait_for_idle_threads()
        with self._awake():
            if self.call_s < _LONG_CALL_S:
                self._run(1)  # Wakes this call's threads.
            self._samples_s.append(self._run(self._calls) / self._calls)

    def timing(self) -> Timing:
        """Return what the samples say."""
        deciles = statistics.quantiles(self._samples_s, n=10, method="inclusive")
        return Timing(deciles[4] * 1e6, deciles[0] * 1e6, len(self._samples_s))

    def _run(self, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            self._call()
        return time.perf_counter() - start


def wait_for_idle_threads() -> None:
    """Wait until no thread of this process runs: those of the previous call may go on spinning for a while."""
    deadline = time.perf_counter() + _LONGEST_WAIT_S
    while time.perf_counter() < deadline:
        before = time.process_time()
        time.sleep(_IDLE_WINDOW_S)
        if time.process_time() - before < _IDLE_WINDOW_S / 4:
            return


def shares(costs_s: Mapping[str, float], budget_s: float, most: int) -> dict[str, int]:
    """Return how many samples each contender gets.

    Every contender may use the same part of the budget. What short ones leave of theirs goes to the others.

    Parameters
    ----------
    costs_s : mapping of str to float
        Seconds that a sample takes, by name.
    budget_s : float
        Seconds for all samples together; the fewest samples that a median takes may exceed it.
    most : int
        The number of samples that is enough for anyone.
    """
    counts: dict[str, int] = {}
    left_s = budget_s
    for done, (name, cost_s) in enumerate(sorted(costs_s.items(), key=lambda item: item[1])):
        part_s = max(0.0, left_s) / (len(costs_s) - done)
        counts[name] = min(most, max(_FEWEST_SAMPLES, int(part_s / cost_s)))
        left_s -= counts[name] * cost_s
    return counts


def takes_turn(round_number: int, rounds: int, count: int) -> bool:
    """Return whether a contender with `count` samples takes one in this round: they are spread evenly."""
    return (round_number + 1) * count // rounds > round_number * count // rounds


def sample(timers: Mapping[str, Timer], budget_s: float, most: int) -> dict[str, Timing]:
    """Take samples in turns, within about `budget_s` seconds and at most `most` of each.

    The order changes from round to round, so that what one contender leaves behind does not always meet the same other.
    """
    counts = shares({name: timer.sample_s for name, timer in timers.items()}, budget_s, most)
    rounds = max(counts.values())
    order, shuffled = list(timers), random.Random(0)
    for round_number in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            if takes_turn(round_number, rounds, counts[name]):
                timers[name].take_sample()
    return {name: timer.timing() for name, timer in timers.items()}
