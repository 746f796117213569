"""Determinism, sharing between threads, the GIL, and fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import tq_hb


@pytest.fixture
def restore_threads():
    before = tq_hb.num_threads()
    yield
    tq_hb.set_num_threads(before)


def filled_cache(count: int, seed: int = 0, **keywords) -> tq_hb.KVCache:
    rng = np.random.default_rng(seed)
    cache = tq_hb.KVCache(2, 256, device="cpu", **keywords)
    cache.append(*rng.standard_normal((2, count, 2, 256)).astype(np.float32))
    return cache


@pytest.mark.parametrize("count", [33, 513, 2500])
@pytest.mark.parametrize("queries", [1, 2, 9])
def test_the_same_bits_for_any_number_of_threads(restore_threads, count, queries):
    cache = filled_cache(count, k_bits=6, v_bits=5, packing="plane")
    q = np.random.default_rng(1).standard_normal((queries, 6, 256)).astype(np.float32)
    results = set()
    for n in (1, 2, 3, 5):
        tq_hb.set_num_threads(n)
        for _ in range(3):
            out, lse = cache.attend(q, sinks=np.zeros(6, np.float32), return_lse=True)
            results.add(out.tobytes() + lse.tobytes())
    assert len(results) == 1


def test_encoding_gives_the_same_bytes_for_any_number_of_threads(restore_threads):
    x = np.random.default_rng(2).standard_normal((999, 256)).astype(np.float32)
    results = set()
    for n in (1, 2, 3):
        tq_hb.set_num_threads(n)
        codes, norms = tq_hb.quantize(x, 8, device="cpu")
        results.add((codes.tobytes(), norms.tobytes()))
    assert len(results) == 1


def test_two_threads_share_one_device(device):
    def work(seed: int) -> tuple[bytes, ...]:
        rng = np.random.default_rng(seed)
        cache = tq_hb.KVCache(2, 256, sliding_window=50, device=device)
        outputs = []
        for _ in range(30):
            cache.append(*rng.standard_normal((2, 7, 2, 256)).astype(np.float32))
            outputs.append(cache.attend(rng.standard_normal((4, 256)).astype(np.float32)).tobytes())
        return tuple(outputs)

    alone = [work(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(4)))

    assert together == alone


def test_calls_on_one_cache_are_serialised(device):
    """Every append lands whole: no token is lost, none is torn."""
    cache = tq_hb.KVCache(1, 256, device=device)
    rows = np.random.default_rng(3).standard_normal((8, 1, 256)).astype(np.float32)

    def work(i: int) -> None:
        for _ in range(25):
            cache.append(rows[i], -rows[i])
            cache.attend(rows[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))

    k, v = cache.dequantize()
    single = tq_hb.KVCache(1, 256, device=device)
    single.append(rows, -rows)
    want = {row.tobytes() for row in single.dequantize()[0]}
    assert len(cache) == cache.offset == 200
    assert {row.tobytes() for row in k} == want
    assert np.array_equal(v, -k)


def test_the_gil_is_released_during_work(restore_threads):
    tq_hb.set_num_threads(1)
    x = np.zeros((60_000, 256), np.float32)
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    packed, norms = np.zeros((1, 60_000, 256), np.uint8), np.zeros((1, 60_000), np.float32)
    hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=0, cache_capacity=60_000)
    enc = tq_hb.Device("cpu").encoder()
    dev = tq_hb.Device("cpu")
    enc.hadamard_quantize_kv_hb(dev.array(x[:, None]), dev.array(packed), dev.array(norms), hp)
    start = time.perf_counter()
    enc.commit_and_wait()
    end = time.perf_counter()
    done.set()
    thread.join()

    during = [t for t in ticks if start < t < end]
    # With the GIL held throughout there would be none; at a tick per millisecond there are many.
    assert len(during) >= min(3, (end - start) / 0.02)


FORK = """
import os, sys, threading
import numpy as np, tq_hb

tq_hb.set_num_threads(2)
rng = np.random.default_rng(0)
cache = tq_hb.KVCache(2, 256, device="cpu")
cache.append(*rng.standard_normal((2, 700, 2, 256)).astype(np.float32))
q = rng.standard_normal((4, 256)).astype(np.float32)
before = cache.attend(q)
pid = os.fork()
if pid == 0:
    cache.append(*rng.standard_normal((2, 5, 2, 256)).astype(np.float32))
    cache.trim(5)
    same = np.array_equal(cache.attend(q), before)
    fresh = tq_hb.quantize(np.ones((400, 256), np.float32), 8, device="cpu")[0].any()
    os._exit(0 if same and fresh else 3)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert np.array_equal(cache.attend(q), before)
sys.exit(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_cpu_works_after_a_fork():
    run = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK],
        timeout=60, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


FORK_WITH_A_GPU = """
import os, sys
import numpy as np, tq_hb

device = tq_hb.Device(sys.argv[1])
cache = tq_hb.KVCache(1, 256, device=device)
rows = np.ones((1, 256), np.float32)
cache.append(rows, rows)
before = cache.attend(rows)
buf, enc = device.array(rows), device.encoder()
enc.fwht_sign_premult_f32(buf)
uses = {
    "append": lambda: cache.append(rows, rows),
    "attend": lambda: cache.attend(rows),
    "reserve": lambda: cache.reserve(1000),
    "copy": lambda: cache.copy(),
    "dequantize": lambda: cache.dequantize(),
    "a new cache": lambda: tq_hb.KVCache(1, 256, 8, device=device),
    "a named device": lambda: tq_hb.quantize(rows, 8, device=sys.argv[1]),
    "empty": lambda: device.empty(3),
    "array": lambda: device.array(rows),
    "sharing": lambda: device.array(tq_hb.empty(3), copy=False),
    "encoder": lambda: device.encoder(),
    "recording": lambda: enc.fwht_sign_undo_f32(buf),
    "commit": lambda: enc.commit(),
    "warmup": lambda: tq_hb.warmup(device),
    "numpy": lambda: buf.numpy(),
    "memoryview": lambda: memoryview(buf),
    "dlpack": lambda: buf.__dlpack__(),
}
pid = os.fork()
if pid == 0:
    for name, use in uses.items():
        try:
            use()
        except (tq_hb.DeviceError, BufferError):
            continue
        print(name, "was possible", file=sys.stderr, flush=True)
        os._exit(3)
    os._exit(0 if len(cache) == 1 else 4)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
enc.commit_and_wait()
assert np.array_equal(cache.attend(rows), before)
sys.exit(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_gpu_refuses_to_work_after_a_fork(device):
    if device.backend == "cpu":
        pytest.skip("the cpu works after a fork")
    run = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK_WITH_A_GPU, device.backend],
        timeout=60, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


EXIT_WHILE_DAEMONS_WORK = """
import threading, time
import numpy as np, tq_hb

cache = tq_hb.KVCache(4, 256, device="cpu")
cache.append(*np.ones((2, 2000, 4, 256), np.float32))

def attend():
    while True:
        cache.attend(np.ones((8, 256), np.float32))

for _ in range(2):
    threading.Thread(target=attend, daemon=True).start()
time.sleep(0.1)
"""


def test_the_process_may_end_while_daemon_threads_work():
    run = subprocess.run(
        [sys.executable, "-c", EXIT_WHILE_DAEMONS_WORK], timeout=60, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")


def a_cache() -> tuple[tq_hb.KVCache, tq_hb.KVCache]:
    cache = tq_hb.KVCache(1, 256, device="cpu")
    return cache, cache


def a_sequence_of_a_batch() -> tuple[tq_hb.BatchedKVCache, tq_hb.KVCache]:
    batch = tq_hb.BatchedKVCache(2, 1, 256, 10, device="cpu")
    return batch, batch[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [a_cache, a_sequence_of_a_batch])
def test_a_forked_child_can_use_a_cache_that_another_thread_was_inside_of(make):
    owner, cache = make()
    rows = np.ones((1, 256), np.float32)
    cache.append(rows, rows)
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with cache._lock, cache._outstanding._lock:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        if owner is cache:
            cache.append(rows, rows)
        else:
            owner.append([1, 0], rows[None, None][[0, 0]], rows[None, None][[0, 0]])
        os._exit(0 if len(cache) == 2 else 1)
    _, status = os.waitpid(child, 0)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
