"""The simulated Metal as the tests see it: statistics of this process, and runs under its other modes.

The modes are environment variables that are read when kernels are compiled, so that a mode needs a
process of its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tq_hb

INFO = next(info for info in tq_hb.devices() if info.backend == "metal")

needs_metal = pytest.mark.skipif(not INFO.available, reason=f"backend 'metal' not available: {INFO.reason}")
needs_simulator = pytest.mark.skipif(
    not INFO.is_simulated, reason=INFO.reason or "the device is a real one: it counts nothing"
)


class Statistics:
    """What the simulator has counted since the last reset, in this process."""

    def __init__(self) -> None:
        self._module = ctypes.CDLL(tq_hb._core.__file__)
        self._module.metal_sim_statistics.restype = ctypes.c_size_t
        self._module.metal_sim_statistics.argtypes = [ctypes.c_char_p, ctypes.c_size_t]

    def reset(self) -> None:
        self._module.metal_sim_reset_statistics()

    def read(self) -> dict[str, Any]:
        size = self._module.metal_sim_statistics(None, 0) + 1
        text = ctypes.create_string_buffer(size)
        self._module.metal_sim_statistics(text, size)
        return json.loads(text.value)


def run_in_mode(function: str, argument: object, **mode: str) -> Any:
    """Call ``modes.function(argument)`` in a process where the simulator runs in another mode; return its result."""
    script = (
        "import json, sys; sys.path[:0] = json.loads(sys.argv[1]); import modes; "
        "print(json.dumps(getattr(modes, sys.argv[2])(json.loads(sys.argv[3]))))"
    )
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps([str(here), str(here.parent)]), function, json.dumps(argument)],
        env={**os.environ, **mode},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
