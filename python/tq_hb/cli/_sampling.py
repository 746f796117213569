"""Timing that short runs and warm caches can't flatter.

The calls to compare take turns, one sample each per round, so that a slow minute of the machine hits all of them. Every
call works on the next of several buffers, which together exceed the last-level cache: as in a real decode, where the
other layers' caches were read in between.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Call: TypeAlias = Callable[[int], object]
"""Runs once, on the buffer that its argument, a running number, selects."""

Track: TypeAlias = Callable[[range], Iterable[int]]
"""Passes on the numbers of the rounds, and may show how far they are."""

_SHORTEST_SAMPLE_S = 1e-3
_WARMUP_ROUNDS = 3
_MOST_BUFFERS = 512


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median and quartiles of the samples."""

    median_us: float
    lower_us: float
    upper_us: float
    samples: int
    calls_per_sample: int

    def gb_s(self, nbytes: int) -> float:
        """Return the rate at which a call went through `nbytes` bytes."""
        return nbytes / self.median_us / 1e3


def sample(calls: Mapping[str, Call], samples: int, track: Track = iter) -> dict[str, Timing]:
    """Time each call `samples` times, taking turns.

    Parameters
    ----------
    calls : mapping of str to callable
        What to time, by name.
    samples : int
        How many samples each call gets. A sample of a short call is the mean of several.
    track : callable, optional
        Wraps the range of rounds, to show progress.

    Returns
    -------
    dict of str to Timing
    """
    timers = {name: _Timer(call) for name, call in calls.items()}
    for _ in track(range(samples)):
        for timer in timers.values():
            timer.take_sample()
    return {name: timer.timing() for name, timer in timers.items()}


class _Timer:
    def __init__(self, call: Call) -> None:
        self._call = call
        self._next_buffer = 0
        shortest_s = min(self._run(1) for _ in range(_WARMUP_ROUNDS))
        self._calls_per_sample = max(1, math.ceil(_SHORTEST_SAMPLE_S / shortest_s))
        self._samples_s: list[float] = []

    def take_sample(self) -> None:
        self._run(1)  # Wakes this call's threads and outlasts the previous call's, which may still be spinning.
        self._samples_s.append(self._run(self._calls_per_sample) / self._calls_per_sample)

    def timing(self) -> Timing:
        lower, median, upper = statistics.quantiles(self._samples_s, n=4, method="inclusive")
        return Timing(
            median_us=median * 1e6,
            lower_us=lower * 1e6,
            upper_us=upper * 1e6,
            samples=len(self._samples_s),
            calls_per_sample=self._calls_per_sample,
        )

    def _run(self, count: int) -> float:
        start = time.perf_counter()
        for buffer in range(self._next_buffer, self._next_buffer + count):
            self._call(buffer)
        elapsed = time.perf_counter() - start
        self._next_buffer += count
        return elapsed


def buffers_to_stay_cold(nbytes: int) -> int:
    """Return how many buffers of `nbytes` to rotate so that none is still in a processor cache when its turn comes."""
    return min(_MOST_BUFFERS, 1 + math.ceil(2 * _last_level_cache_bytes() / nbytes))


def _last_level_cache_bytes() -> int:
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kib = (int(size.read_text().strip().removesuffix("K")) for size in sizes)
    return 1024 * max(kib, default=32 * 1024)


class PlainRead:
    """Reads memory and does nothing else with it: the floor under any op that has to read as much.

    numpy's maximum of bytes runs at several times memory speed when its data is in cache, so what it shows on cold
    data is the memory.
    """

    nbytes = 64 << 20

    def __init__(self, threads: int) -> None:
        count = buffers_to_stay_cold(self.nbytes)
        self._slices = [np.array_split(np.ones(self.nbytes, np.uint8), threads) for _ in range(count)]
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self, buffer: int) -> object:
        """Read the selected buffer, a slice per thread."""
        slices = self._slices[buffer % len(self._slices)]
        return list(self._pool.map(_read, slices))


def _read(part: npt.NDArray[np.uint8]) -> np.uint8:
    result: np.uint8 = part.max()
    return result
