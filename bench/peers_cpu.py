"""tq_hb's cpu backend against the attention of other libraries on the CPU, in one run, taking turns, caches cold.

``python -m bench.peers_cpu`` writes ``bench/results/peers_cpu.json`` and ``.png`` after every shape. A run that was
stopped goes on where it was, if the commit, the machine and the libraries are the same. ``bench/peers/`` has the
contenders; one that can't run here is skipped, and the file says why.

* A call is one token's attention over the whole cache, from Python. It reads the next of several copies of its cache,
  which are together larger than twice the last-level cache, or one that is much larger by itself.
* All contenders but MLX, which takes what it likes, have the same number of threads, and every one starts its sample
  when no other's threads are running.
* Before a kind of shape is timed, every contender's output over 1,024 tokens is compared with float64 attention over
  the unquantised cache. What exceeds the error of the contender's number type is not timed.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

import tq_hb
from bench import harness
from bench.peers import llama_cpp, mlx_cpu, onnxruntime_gqa, openvino_sdpa, tables, timing, torch_sdpa
from bench.peers.contender import Contender, Problem, Storage, UnavailableError, installed_version
from bench.peers.ours import Ours
from tq_hb.cli import _machine
from tq_hb.cli._cases import attention64, relative_l2
from tq_hb.cli._output import commit
from tq_hb.cli._sampling import PlainRead

HEADS = 16
KV_HEADS = (16, 8, 4, 2)
HEAD_DIMS = (256, 128, 512)
LENGTHS = (1024, 4096, 16384, 65536)
THREADS = (1, 2)
OURS = "tq_hb"

_CHECKED_TOKENS = 1024
_FEWEST_SECONDS = 1.0  # of a shape, in a file that the documents show
# About what a cached value takes in all contenders' forms together, and what else is needed, for libraries and copies.
_BYTES_PER_VALUE = 32
_SPARE_BYTES = 7 << 29


class WrongResultError(Exception):
    """What was computed is not attention, as exactly as the cache's number type allows."""


class Library(Protocol):
    """One library's contenders over one cache."""

    def contenders(self, threads: int) -> list[Contender]:
        """Return the calls, which use that many threads."""
        ...


Build: TypeAlias = Callable[[Problem, Storage], Library]

PEERS: dict[str, tuple[Callable[[], str], Build]] = {
    "llama.cpp": (llama_cpp.version, llama_cpp.LlamaCpp),
    "torch": (partial(installed_version, "torch"), torch_sdpa.TorchSdpa),
    "onnxruntime": (partial(installed_version, "onnxruntime", "onnx"), onnxruntime_gqa.OnnxRuntimeGqa),
    "mlx": (partial(installed_version, "mlx"), mlx_cpu.MlxCpu),
    "openvino": (partial(installed_version, "openvino"), openvino_sdpa.OpenVinoSdpa),
}
NOT_MEASURED = {"openvino TURBO": openvino_sdpa.TURBO_REASON}


@dataclass(frozen=True)
class Shape:
    """The query heads and the cache of one layer."""

    heads: int
    kv_heads: int
    head_dim: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads}/{self.head_dim}, {self.tokens:,} tokens"

    @property
    def problem(self) -> Problem:
        """Random numbers of this shape."""
        return Problem.random(self.heads, self.kv_heads, self.head_dim, self.tokens)


def parse_shape(text: str) -> Shape:
    """Return the shape written as heads/kv_heads/head_dim/tokens."""
    try:
        shape = Shape(*map(int, text.split("/")))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be heads/kv_heads/head_dim/tokens, got {text!r}") from error
    if min(shape.heads, shape.kv_heads, shape.tokens) < 1 or shape.heads % shape.kv_heads:
        raise argparse.ArgumentTypeError(f"heads must be a multiple of kv_heads, and all at least 1, got {text!r}")
    if shape.head_dim not in tq_hb.supported_head_dims():
        known = ", ".join(map(str, tq_hb.supported_head_dims()))
        raise argparse.ArgumentTypeError(f"head_dim must be one of {known}, got {text!r}")
    return shape


def grid(size: str) -> list[Shape]:
    """Return the shapes of a "quick", "default" or "full" run, in the order in which they are measured."""
    kv_heads = (8, 2) if size == "quick" else KV_HEADS
    longest = {
        "quick": {256: 4096},
        "default": {256: 16384, 128: 4096, 512: 4096},
        "full": dict.fromkeys(HEAD_DIMS, 65536),
    }[size]
    return [
        Shape(HEADS, kv, head_dim, tokens)
        for head_dim, most in longest.items()
        for kv in kv_heads
        for tokens in LENGTHS
        if tokens <= most
    ]


def find_peers(peers: dict[str, tuple[Callable[[], str], Build]]) -> tuple[dict[str, Build], dict[str, Any]]:
    """Return those that are usable, and an account of all: ``libraries`` with versions, ``skipped`` with reasons."""
    usable: dict[str, Build] = {}
    versions: dict[str, str] = {}
    skipped = dict(NOT_MEASURED)
    for name, (version, build) in peers.items():
        try:
            versions[name] = version()
            usable[name] = build
        except UnavailableError as reason:
            skipped[name] = str(reason)
    return usable, {"libraries": versions, "skipped": skipped}


def finished(report: dict[str, Any], commit: str | None, machine: dict[str, Any], account: dict[str, Any]) -> list[Any]:
    """Return the shapes of an earlier report that this run would measure in the same way, else none."""
    if commit is None or "with changes" in commit:
        return []
    same = report["commit"] == commit and report["machine"] == machine and report["results"][:1] == [account]
    return report["results"][1:] if same else []


def key(result: dict[str, Any]) -> tuple[int, ...]:
    """Return what tells a result from others."""
    return tuple(result[name] for name in ("heads", "kv_heads", "head_dim", "tokens", "threads"))


def attempt(skipped: dict[str, str], name: str, action: Callable[[], Any]) -> Any:
    """Return the action's result, or None with its error as the reason why `name`, if it is a peer, is skipped."""
    try:
        return action()
    except Exception as error:  # whatever a peer raises: the others are measured all the same
        if name.startswith(OURS):
            raise
        skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        return None


class Entrants:
    """All contenders over one cache; the peers that fail are in `skipped`, by name, with the reason."""

    def __init__(self, problem: Problem, peers: dict[str, Build]) -> None:
        self.skipped: dict[str, str] = {}
        self._ours = Ours(problem)
        storage = Storage(problem)
        self._peers: dict[str, Library] = {}
        for name, build in peers.items():
            library = attempt(self.skipped, name, partial(build, problem, storage))
            if library is not None:
                self._peers[name] = library

    def contenders(self, threads: int) -> list[Contender]:
        """Return the calls, tq_hb's first."""
        lists = [self._ours.contenders(threads)]
        for name, library in self._peers.items():
            lists.append(attempt(self.skipped, name, partial(library.contenders, threads)) or [])
        return [contender for contenders in lists for contender in contenders]


def check(contenders: Iterable[Contender], problem: Problem, skipped: dict[str, str]) -> dict[str, float]:
    """Return the errors against float64 attention over the unquantised cache, by name; wrong peers are skipped.

    Raises
    ------
    WrongResultError
        If tq_hb's own error is larger than quantising explains.
    """
    want = attention64(problem.q, problem.k.transpose(1, 0, 2), problem.v.transpose(1, 0, 2))
    found = {c.name: attempt(skipped, c.name, partial(_error, c, want)) for c in contenders}
    return {name: error for name, error in found.items() if error is not None}


def _error(contender: Contender, want: npt.NDArray[np.float64]) -> float:
    with contender.awake():
        error = relative_l2(contender.output(contender.call()), want)
    if not error <= contender.error_limit:
        raise WrongResultError(f"off by {error:.1e}, where {contender.error_limit:.1e} is explained")
    return error


class Checks:
    """The errors of every kind of shape, found on first use."""

    def __init__(self, peers: dict[str, Build]) -> None:
        self._peers = peers
        self._found: dict[tuple[int, int, int, int], tuple[dict[str, float], dict[str, str]]] = {}

    def __call__(self, shape: Shape, threads: int) -> tuple[dict[str, float], dict[str, str]]:
        """Return the errors of those that are right, and reasons to skip others."""
        family = (shape.heads, shape.kv_heads, shape.head_dim, threads)
        if family not in self._found:
            problem = Problem.random(shape.heads, shape.kv_heads, shape.head_dim, _CHECKED_TOKENS)
            entrants = Entrants(problem, self._peers)
            contenders = entrants.contenders(threads)
            self._found[family] = (check(contenders, problem, entrants.skipped), entrants.skipped)
        return self._found[family]


def measure(
    shape: Shape, threads: int, entrants: Entrants, checks: Checks, seconds: float, most: int
) -> dict[str, Any]:
    """Time the contenders over one cache."""
    errors, wrong = checks(shape, threads)
    contenders = {c.name: c for c in entrants.contenders(threads) if c.name in errors}
    skipped = wrong | entrants.skipped
    read = PlainRead(threads)
    turns = iter(range(1 << 62))
    timers = {"read": timing.Timer(lambda: read(next(turns)))}
    for name, contender in contenders.items():
        timer = attempt(skipped, name, partial(timing.Timer, contender.call, contender.awake))
        if timer is not None:
            timers[name] = timer
    timings = timing.sample(timers, seconds, most)
    floor = timings.pop("read")
    read_gb_s = PlainRead.nbytes / floor.median_us / 1e3
    rows = {
        name: {
            "median_us": round(timed.median_us, 1),
            "lower_decile_us": round(timed.lower_decile_us, 1),
            "samples": timed.samples,
            "nbytes": contenders[name].nbytes,
            "share_of_read": round(contenders[name].nbytes / timed.median_us / 1e3 / read_gb_s, 3),
            "error": float(f"{errors[name]:.1e}"),
        }
        for name, timed in timings.items()
    }
    return {**asdict(shape), "threads": threads, "read_gb_s": round(read_gb_s, 2), "skipped": skipped} | compare(rows)


def compare(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the rows, the fastest peer, and how many times longer than each form of tq_hb it takes, by the medians."""
    peers = [name for name in rows if not name.startswith(OURS)]
    if not peers:
        return {"rows": rows, "fastest_peer": None, "ratio": {}}
    fastest = min(peers, key=lambda name: float(rows[name]["median_us"]))
    fastest_us = rows[fastest]["median_us"]
    ratio = {name: round(fastest_us / row["median_us"], 3) for name, row in rows.items() if name.startswith(OURS)}
    return {"rows": rows, "fastest_peer": fastest, "ratio": ratio}


def too_large(shape: Shape, available_bytes: int) -> str | None:
    """Return why the memory does not suffice, or None."""
    values = 2 * shape.kv_heads * shape.head_dim * shape.tokens
    needed = values * _BYTES_PER_VALUE + _SPARE_BYTES
    if needed <= available_bytes:
        return None
    return f"takes about {needed / 2**30:.0f} GiB of memory, {available_bytes / 2**30:.0f} are available"


def _available_bytes() -> int:
    try:
        with Path("/proc/meminfo").open() as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _write(results: list[dict[str, Any]], account: dict[str, Any], out: Path) -> None:
    tq_hb.set_num_threads(max(THREADS))  # what the file says of the machine is the same whenever it is written
    ordered = sorted(results, key=lambda r: (r["head_dim"], -r["kv_heads"], r["tokens"], r["threads"]))
    harness.write("peers_cpu", [account, *ordered], out)


def _run(
    shapes: Sequence[Shape], account: dict[str, Any], peers: dict[str, Build], results: list[dict[str, Any]], out: Path
) -> None:
    """Measure what `results` lacks, and write it."""
    done = {key(result) for result in results}
    missing = {shape: [n for n in THREADS if (*asdict(shape).values(), n) not in done] for shape in shapes}
    checks = Checks(peers)
    for shape in harness.track([shape for shape in shapes if missing[shape]]):
        reason = too_large(shape, _available_bytes())
        if reason is not None:
            row = {"skipped": {"all": reason}} | compare({})
            results += [{**asdict(shape), "threads": threads, **row} for threads in missing[shape]]
        else:
            entrants = Entrants(shape.problem, peers)
            for threads in missing[shape]:
                results.append(measure(shape, threads, entrants, checks, account["seconds"], account["samples"]))
            del entrants
            gc.collect()  # contenders refer to their caches in circles
        _write(results, account, out)


def main() -> None:
    """Measure the grid."""
    parser = harness.measuring_parser("bench.peers_cpu", __doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_const", dest="size", const="quick", help="4 shapes (with --out): a minute"
    )
    size.add_argument(
        "--full",
        action="store_const",
        dest="size",
        const="full",
        help="up to 65,536 tokens: an hour or more",
    )
    size.add_argument("--shapes", type=parse_shape, nargs="+", metavar="HEADS/KV_HEADS/HEAD_DIM/TOKENS")
    parser.add_argument("--seconds", type=float, default=4.0, help="for the samples of a shape (default: %(default)s)")
    parser.add_argument(
        "--samples",
        type=harness.sample_count,
        metavar="N",
        default=30,
        help="at most, of one contender (default: %(default)s)",
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has")
    args = harness.parse(
        parser, is_partial=lambda args: args.size == "quick" or args.shapes or args.seconds < _FEWEST_SECONDS
    )

    peers, account = find_peers(PEERS)
    account |= {"seconds": args.seconds, "samples": args.samples}
    for name, reason in account["skipped"].items():
        print(f"{name} is skipped: {reason}")
    tq_hb.set_num_threads(max(THREADS))
    results: list[dict[str, Any]] = []
    if not args.fresh and (args.out / "peers_cpu.json").exists():
        results = finished(harness.read("peers_cpu", args.out), commit(harness.ROOT), _machine.describe(), account)
    _run(args.shapes or grid(args.size or "default"), account, peers, results, args.out)
    _write(results, account, args.out)
    compared = any(result["ratio"] for result in results)
    if compared:
        harness.draw("peers_cpu", args.out, tables.plot)
    harness.show("peers_cpu", args.out, *([tables.every_shape, tables.every_peer] if compared else []))


if __name__ == "__main__":
    harness.run("bench.peers_cpu", main)
