"""Calls for which the host has no memory: each says so as OutOfMemoryError, and the process goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space, as Linux does")

# Everything the calls read is made before the limit; several MiB more are allowed than are taken by then.
PROGRAM = """
import json, mmap, resource, sys
import numpy as np, tq_hb

room, folder = int(sys.argv[1]), sys.argv[2]
tq_hb.set_num_threads(1)
count = 2**18
rows, wide = np.ones((count, 1, 64), np.float32), np.ones((count, 1, 64))
codes, norms = np.zeros((count, 64), np.uint8), np.ones(count, np.float32)
planes = np.zeros((4 * count, 40), np.uint8)
q, lse = np.zeros((count // 8, 8, 64), np.float16), np.zeros((count, 1), np.float32)
cache = tq_hb.KVCache(1, 64, 3 * count, k_mean=np.ones((1, 64)), device="cpu")
for _ in range(2):
    cache.append(rows, rows)
short = tq_hb.KVCache(1, 64, device="cpu")
short.append(rows[:1], rows[:1])
short.save(f"{folder}/short")
tq_hb.KVCache.load(f"{folder}/short")
short.attend(q[0], q_offset=0)
tq_hb.merge_states(rows[:1], lse[:1], rows[:1], lse[:1])
cache.save(f"{folder}/whole")
calls = {
    "rotate": lambda: tq_hb.rotate(rows),
    "quantize": lambda: tq_hb.quantize(wide, 8),
    "dequantize": lambda: tq_hb.dequantize(codes, norms, 8, head_dim=64),
    "convert_packing": lambda: tq_hb.convert_packing(planes, 5, head_dim=64, source="plane", target="byte"),
    "merge_states": lambda: tq_hb.merge_states(rows, lse, rows, lse),
    "KVCache.append": lambda: cache.append(rows, rows),
    "KVCache.attend": lambda: short.attend(q, q_offset=count),
    "KVCache.dequantize": lambda: cache.dequantize(),
    "KVCache.save": lambda: cache.save(f"{folder}/other"),
    "save_caches": lambda: tq_hb.save_caches(f"{folder}/other", [cache]),
    "KVCache.load": lambda: tq_hb.KVCache.load(f"{folder}/whole", "cpu"),
    "load_caches": lambda: tq_hb.load_caches(f"{folder}/whole", "cpu"),
}
with open("/proc/self/statm") as file:
    taken = int(file.read().split()[0]) * mmap.PAGESIZE
resource.setrlimit(resource.RLIMIT_AS, (taken + room * 2**20,) * 2)
said = {}
for name, call in calls.items():
    try:
        call()
    except BaseException as error:
        said[name] = [type(error).__name__, str(error)]
print(json.dumps(said))
"""


def run(room: int, folder: Path) -> dict[str, list[str]]:
    """What calls say that have so many MiB to take."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(room), str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_call_says_what_it_had_no_memory_for(tmp_path):
    said = run(4, tmp_path)

    assert len(said) == 12
    for name, (kind, message) in said.items():
        assert kind == "OutOfMemoryError", message
        assert message.startswith(f"{name}: "), message
        assert any(unit in message for unit in (" bytes", " MiB")), message
    assert said["dequantize"][1] == "dequantize: could not allocate 67108864 bytes for the result"
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("room", [75, 125, 175, 225])
def test_files_fit_or_raise(tmp_path, room):
    for kind, message in run(room, tmp_path).values():
        assert kind == "OutOfMemoryError", message
