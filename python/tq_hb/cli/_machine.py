"""What this machine and its installed libraries are."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import tq_hb

_LIBRARIES = ("numpy", "torch", "transformers", "mlx", "ml_dtypes")


def processor_name() -> str:
    """Return the processor's marketing name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def threads_in_words(count: int) -> str:
    """Return "1 thread", "2 threads" and so on."""
    return f"{count} thread" + "s" * (count != 1)


def library_versions() -> dict[str, str | None]:
    """Return the versions of the libraries that tq_hb can work with; None for those not installed."""
    versions: dict[str, str | None] = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def describe(ask: Callable[[Callable[[], object]], object] = lambda get: get()) -> dict[str, object]:
    """Return what a measurement has to be read with: the machine, the threads and the versions.

    What the environment can make fail is got by `ask`.
    """
    return {
        "system": platform.platform(),
        "processor": processor_name(),
        "isa": ask(tq_hb.cpu_isa),
        "threads": ask(tq_hb.num_threads),
        "python": platform.python_version(),
        "tq_hb": tq_hb.__version__,
        "libraries": library_versions(),
    }
