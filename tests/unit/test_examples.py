"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import reference
import tolerance
import tq_hb

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_examples():
    assert SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example_runs(script):
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_the_recent_window_reports_a_smaller_error_than_packing_everything():
    script = EXAMPLES / "recent_window.py"
    text = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    mixed, packed = (float(number) for number in re.findall(r"relative error ([\d.]+)", text))
    assert 0 < mixed < packed


@pytest.mark.parametrize("appends", [(1,), (100,), (128,), (129, 1), (300, 3), (5, 124, 200, 1, 1)], ids=str)
@pytest.mark.parametrize("queries", [1, 4])
def test_the_recent_window_keeps_the_newest_tokens_exact(appends, queries):
    """Against float64 attention to the newest 128 tokens as they came and the history as it is stored."""
    rng = np.random.default_rng(sum(appends))
    cache, total = load("recent_window").RecentWindow(2, 64), sum(appends)
    queries = min(queries, total)
    k, v = rng.standard_normal((2, total, 2, 64)).astype(np.float32)
    start = 0
    for count in appends:
        cache.append(k[start : start + count], v[start : start + count])
        start += count
    q = 3 * rng.standard_normal((queries, 6, 64)).astype(np.float32)

    got = cache.attend(q)

    old = max(0, total - 128)
    assert (len(cache), len(cache.history), len(cache.k)) == (total, old, total - old)
    stored = [
        np.concatenate([h, x[old:]]).swapaxes(0, 1) for h, x in zip(cache.history.dequantize(), (k, v), strict=True)
    ]
    ranges = [(0, total - queries + 1 + i) for i in range(queries)]
    error = tolerance.nmse(got, reference.attend(q, *stored, scale=1 / 8, ranges=ranges)) ** 0.5
    assert error <= tolerance.PRECISION_L2["default"]


def test_a_query_before_the_recent_tokens_is_served_by_the_history():
    cache = load("recent_window").RecentWindow(1, 64, recent=2)
    x = np.random.default_rng(0).standard_normal((10, 1, 64)).astype(np.float32)
    cache.append(x, x)
    q = np.random.default_rng(1).standard_normal((5, 2, 64)).astype(np.float32)
    stored = [np.concatenate([h, x[8:]]).swapaxes(0, 1) for h in cache.history.dequantize()]
    want = reference.attend(q, *stored, scale=1 / 8, ranges=[(0, 6 + i) for i in range(5)])
    assert tolerance.nmse(cache.attend(q), want) ** 0.5 <= tolerance.PRECISION_L2["default"]


def test_recorded_decoding_reports_what_caches_give():
    script = EXAMPLES / "recorded_decode.py"
    text = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    assert "lengths [48, 32, 16]" in text
    assert float(re.search(r"largest difference from KVCache: (\S+)", text)[1]) < 1e-3


def test_recorded_decoding_attends_to_every_token_of_every_sequence():
    """Against float64 attention to what a cache of the same form stores."""
    example, device, rng = load("recorded_decode"), tq_hb.Device("cpu"), np.random.default_rng(0)
    sequences = [example.Sequence(device, capacity=8) for _ in range(2)]
    kv_heads, head_dim = example.KV_HEADS, example.HEAD_DIM
    caches = [
        tq_hb.KVCache(kv_heads, head_dim, k_bits=example.K_BITS, v_bits=example.V_BITS, packing="plane", device=device)
        for _ in sequences
    ]
    for running in ([0], [0, 1], [1], [0, 1]):
        for i in running:
            for buffer in (sequences[i].q, sequences[i].k, sequences[i].v):
                buffer.copy_from(rng.standard_normal(buffer.shape, dtype=np.float32))
            caches[i].append(sequences[i].k.numpy(), sequences[i].v.numpy())
        example.step(device, [sequences[i] for i in running])
        for i in running:
            stored = [x.swapaxes(0, 1) for x in caches[i].dequantize()]
            want = reference.attend(sequences[i].q.numpy()[None], *stored, scale=head_dim**-0.5)
            got = sequences[i].output.numpy()[None]
            assert tolerance.nmse(got, want) ** 0.5 <= tolerance.PRECISION_L2["default"]
    assert [sequence.length for sequence in sequences] == [3, 3]
