"""The comparison with others on the CPU: who takes part, how often, what is kept of an earlier run, what tables say."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import peers_cpu
from bench.peers import contender, llama_cpp, tables, timing
from bench.peers.contender import Contender, Problem, Rotation, Storage, UnavailableError
from bench.peers_cpu import Shape

import tq_hb
from tq_hb.cli._cases import attention64

SHAPE = Shape(2, 1, 64, 33)


@pytest.fixture(autouse=True)
def three_copies(monkeypatch):
    """Keeps caches of a few bytes from being copied until they fill a processor cache, and settings from leaking."""
    monkeypatch.setattr(contender, "buffers_to_stay_cold", lambda nbytes: 3)
    threads = tq_hb.num_threads()
    torch_threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    tq_hb.set_num_threads(threads)
    if torch_threads is not None:
        sys.modules["torch"].set_num_threads(torch_threads)


class Numpy:
    """A peer that multiplies its result."""

    def __init__(self, factor: float, problem: Problem) -> None:
        self._out = factor * attention64(problem.q, *(x.transpose(1, 0, 2) for x in (problem.k, problem.v)))

    def contenders(self, threads: int) -> list[Contender]:
        return [Contender("numpy", 1000, lambda: self._out, lambda out: out, 1e-5)]


def peer(factor: float = 1.0):
    return lambda problem, storage: Numpy(factor, problem)


def broken(problem: Problem, storage: Storage) -> Numpy:
    raise ValueError("no such kernel\nand a long story")


def test_a_peer_that_is_not_there_is_named_with_the_reason():
    def absent() -> str:
        raise UnavailableError("not installed")

    usable, account = peers_cpu.find_peers({"here": (lambda: "here 1", peer()), "gone": (absent, peer())})

    assert list(usable) == ["here"]
    assert account == {"libraries": {"here": "here 1"}, "skipped": {**peers_cpu.NOT_MEASURED, "gone": "not installed"}}


def test_a_version_is_that_of_the_package():
    assert contender.installed_version("numpy") == f"numpy {np.__version__}"
    with pytest.raises(UnavailableError, match="^not installed: no-such-package$"):
        contender.installed_version("numpy", "no-such-package")


def test_llama_cpp_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr(llama_cpp, "_LIBRARY", tmp_path / "absent.so")
    llama_cpp._library.cache_clear()

    with pytest.raises(UnavailableError, match=r"not built, run `python -m bench\.peers\.llama_cpp`"):
        llama_cpp.version()


@pytest.mark.parametrize("name", peers_cpu.PEERS)
def test_what_a_peer_computes_is_attention(name):
    version, build = peers_cpu.PEERS[name]
    try:
        version()
    except UnavailableError as reason:
        pytest.skip(str(reason))
    problem, skipped = Shape(8, 2, 128, 600).problem, {}

    errors = peers_cpu.check(build(problem, Storage(problem)).contenders(2), problem, skipped)

    assert not skipped
    assert len(errors) >= 2
    assert all(error > 0 for error in errors.values())


def test_a_peer_that_fails_leaves_the_others_measured():
    peers = {"numpy": peer(), "broken": broken}

    result = peers_cpu.measure(
        SHAPE, 1, peers_cpu.Entrants(SHAPE.problem, peers), peers_cpu.Checks(peers), seconds=0.01, most=4
    )

    assert result["skipped"] == {"broken": "ValueError: no such kernel"}
    assert result["fastest_peer"] == "numpy"
    assert [result[name] for name in ("heads", "kv_heads", "head_dim", "tokens", "threads")] == [2, 1, 64, 33, 1]
    assert set(result["rows"]) == set(result["ratio"]) | {"numpy"}
    for name, ratio in result["ratio"].items():
        assert ratio == pytest.approx(
            result["rows"]["numpy"]["median_us"] / result["rows"][name]["median_us"], abs=1e-3
        )
    assert all(row["samples"] >= 3 for row in result["rows"].values())


def test_a_wrong_result_is_not_timed():
    checks = peers_cpu.Checks({"numpy": peer(1.001)})

    errors, wrong = checks(SHAPE, 1)

    assert "numpy" not in errors
    assert "tq_hb 8" in errors
    assert wrong == {"numpy": "WrongResultError: off by 1.0e-03, where 1.0e-05 is explained"}


def test_what_could_not_be_checked_is_not_timed():
    def short_only(problem: Problem, storage: Storage) -> Numpy:
        return broken(problem, storage) if problem.tokens > SHAPE.tokens else Numpy(1.0, problem)

    peers = {"numpy": short_only}
    result = peers_cpu.measure(
        SHAPE, 1, peers_cpu.Entrants(SHAPE.problem, peers), peers_cpu.Checks(peers), seconds=0.01, most=3
    )

    assert result["skipped"] == {"numpy": "ValueError: no such kernel"}
    assert result["fastest_peer"] is None
    assert result["ratio"] == {}


def test_a_wrong_result_of_ours_is_an_error():
    ours = Contender("tq_hb 8", 1, lambda: 2 * SHAPE.problem.q, lambda out: out, 1e-2)

    with pytest.raises(peers_cpu.WrongResultError, match=r"off by .*, where 1\.0e-02 is explained"):
        peers_cpu.check([ours], SHAPE.problem, {})


@pytest.fixture
def report() -> dict[str, Any]:
    account = {"libraries": {"numpy": "numpy 2"}, "skipped": {"gone": "not installed"}, "seconds": 4.0, "samples": 30}
    results = [
        result(kv_heads, threads, ours_us, {"numpy": 30.0, "slow": 300.0})
        for kv_heads, threads, ours_us in ((16, 1, 10.0), (16, 2, 40.0), (2, 1, 20.0))
    ]
    missing = {**results[0], "tokens": 65536, "skipped": {"all": "too large"}} | peers_cpu.compare({})
    return {
        "command": "python -m bench.peers_cpu",
        "path": "peers_cpu.json",
        "commit": "abc",
        "machine": {"processor": "Abacus", "isa": "beads"},
        "load_average": [1.25, 1, 1],
        "results": [account, *results, missing],
    }


def result(kv_heads: int, threads: int, ours_us: float, peers_us: dict[str, float]) -> dict[str, Any]:
    times = dict.fromkeys(tables._NAMES, ours_us) | peers_us
    rows = {
        name: {"median_us": us, "lower_decile_us": us, "samples": 3, "nbytes": 1, "share_of_read": 0.5, "error": 1e-3}
        for name, us in times.items()
    }
    shape = {"heads": 16, "kv_heads": kv_heads, "head_dim": 256, "tokens": 4096, "threads": threads}
    return {**shape, "read_gb_s": 1.0, "skipped": {}} | peers_cpu.compare(rows)


def test_a_run_goes_on_where_it_was(report):
    account, *shapes = report["results"]

    assert peers_cpu.finished(report, "abc", report["machine"], account) == shapes


@pytest.mark.parametrize("changed", ["commit", "machine", "libraries", "seconds"])
def test_a_run_starts_over_where_something_has_changed(report, changed):
    now = {"commit": "abc", "machine": report["machine"], "account": report["results"][0]}
    if changed in ("commit", "machine"):
        now[changed] = {"commit": "abd", "machine": {"processor": "Abacus", "isa": "stones"}}[changed]
    else:
        now["account"] = {**now["account"], changed: None}

    assert peers_cpu.finished(report, now["commit"], now["machine"], now["account"]) == []


def test_a_run_of_changed_sources_starts_over(report):
    report["commit"] = "abc with changes"

    assert peers_cpu.finished(report, "abc with changes", report["machine"], report["results"][0]) == []


def test_only_what_is_missing_is_measured(report, monkeypatch, tmp_path):
    monkeypatch.setattr(peers_cpu, "_write", lambda results, account, out: None)
    monkeypatch.setattr(peers_cpu, "_available_bytes", lambda: 0)
    results = report["results"][1:3]
    shapes = [Shape(16, 16, 256, 4096), Shape(16, 8, 256, 4096)]

    peers_cpu._run(shapes, report["results"][0], {}, results, tmp_path)

    assert [peers_cpu.key(r) for r in results[2:]] == [(16, 8, 256, 4096, 1), (16, 8, 256, 4096, 2)]
    assert "0 are available" in results[2]["skipped"]["all"]


def test_the_grid_is_the_same_each_time_and_grows_with_its_size():
    sizes = [peers_cpu.grid(size) for size in ("quick", "default", "full")]

    assert [len(shapes) for shapes in sizes] == [4, 28, 48]
    assert set(sizes[0]) < set(sizes[1]) < set(sizes[2])
    assert sizes == [peers_cpu.grid(size) for size in ("quick", "default", "full")]


def test_shapes_are_read_from_the_command_line():
    assert peers_cpu.parse_shape("16/8/256/4096") == Shape(16, 8, 256, 4096)
    for text in ("16/8/256", "16/8/256/4k"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be heads/kv_heads/head_dim/tokens, got"):
            peers_cpu.parse_shape(text)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("16/8/100/10", "head_dim must be one of 64, 128, 256, 512"),
        ("16/3/256/10", "heads must be a multiple of kv_heads"),
        ("16/8/256/0", "all at least 1"),
        ("16/0/256/10", "all at least 1"),
    ],
)
def test_shapes_that_cannot_be_measured_are_refused_at_once(text, rule):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{rule}.*, got '{text}'"):
        peers_cpu.parse_shape(text)


@pytest.mark.parametrize(
    ("costs", "budget", "counts"),
    [
        ({"short": 0.001, "long": 0.1}, 1.0, {"short": 30, "long": 9}),
        ({"short": 0.001, "long": 10.0}, 1.0, {"short": 30, "long": 3}),
        ({"short": 0.001, "long": 0.002}, 1.0, {"short": 30, "long": 30}),
        ({"short": 1.0}, 0.0, {"short": 3}),
    ],
)
def test_long_calls_get_fewer_samples(costs, budget, counts):
    assert timing.shares(costs, budget, most=30) == counts


@pytest.mark.parametrize("count", [1, 3, 7, 29, 30])
def test_turns_are_spread_evenly(count):
    turns = [i for i in range(30) if timing.takes_turn(i, 30, count)]

    assert len(turns) == count
    gaps = np.diff([*turns, turns[0] + 30])
    assert gaps.max() - gaps.min() <= 1


def test_samples_are_taken_while_threads_are_awake():
    log: list[str] = []

    class Awake(nullcontext[None]):
        def __enter__(self) -> None:
            log.append("wake")

        def __exit__(self, *exc: object) -> None:
            log.append("sleep")

    timings = timing.sample({"a": timing.Timer(lambda: log.append("call"), Awake)}, budget_s=0.1, most=4)

    assert timings["a"].samples == 4
    assert log.count("wake") == log.count("sleep") == 5  # once to find out how long a call takes
    assert 0 < timings["a"].lower_decile_us <= timings["a"].median_us


def test_the_order_of_turns_changes():
    log: list[str] = []
    timers = {name: timing.Timer(lambda name=name: log.append(name)) for name in "abc"}
    log.clear()

    timing.sample(timers, budget_s=1.0, most=6)

    predecessors = {a for a, b in pairwise(log) if b == "a" and a != "a"}
    assert predecessors == {"b", "c"}


def test_copies_take_turns_whoever_calls():
    rotation = Rotation([0], lambda first: [len(first)], nbytes=1000)

    assert [id(rotation.next()) for _ in range(6)] == 2 * [id(rotation.copies[i]) for i in (1, 2, 0)]
    assert len(Rotation([0], list, nbytes=1 << 30).copies) == 1


def test_tables_say_how_long_the_fastest_peer_takes(report):
    every_shape, every_peer, short = (
        make(report) for make in (tables.every_shape, tables.every_peer, tables.at_one_length)
    )

    assert "| 16 / 16 / 256 | 4,096 | 1 | numpy, 30 | 10 (3.00) |" in every_shape
    assert "| 16 / 16 / 256 | 4,096 | 2 | numpy, 30 | 40 (0.75) |" in every_shape
    assert "65,536" not in every_shape
    assert "| slow | 1e-03 | 3 | 15.0 (7.5 to 30.0) |" in every_peer
    assert "Not measured: gone: not installed." in every_peer
    assert "Not measured: all at 16 / 16 / 256, 65,536 tokens: too large." in every_peer
    assert "| 16 / 2 / 256 | 4,096 | 1 | numpy | 1.50 |" in short
    assert "| slower than the fastest peer | 1 query head per KV head | 8 query heads per KV head |" in short
    assert "| 5 bits, 1 thread | 0 of 1 | 0 of 1 |" in short
    assert "| 5 bits, 2 threads | 1 of 1 | 0 of 0 |" in short
    assert "Abacus, beads, load average 1.2, numpy 2" in short


def test_bounds_set_the_ratios_beside_those_of_a_read(report):
    bounds = tables.bounds(report)

    assert "| 1 query head per KV head | 2 | 1.9 (0.8 to 3.0) | 3.8 (1.5 to 6.0) |" in bounds
    assert "| 8 query heads per KV head | 1 | 1.5 (1.5 to 1.5) | 3.0 (3.0 to 3.0) |" in bounds
    assert "5 times) at 1 of 3 rows. It would at 1 if" in bounds
    assert "llama.cpp" not in bounds


def test_bounds_say_how_far_behind_single_peers_are(report):
    peers = {"llama.cpp q5_0": 800.0, "torch float32": 800.0, "torch float32 enable_gqa": 600.0}
    report["results"][1:] = [result(16, 1, 100.0, peers), result(2, 1, 50.0, peers)]

    bounds = tables.bounds(report)

    assert "llama.cpp q5_0 takes at least 9 times as long as 5 bits at 1 of 2, and would at 2." in bounds
    assert "torch float32 takes at least 7 times as long as 5 bits at 1 of 2, and would at 2." in bounds


def test_the_plot_is_drawn(report):
    pytest.importorskip("matplotlib")

    assert tables.plot(report).startswith(b"\x89PNG")
