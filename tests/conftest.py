"""Fixtures that every suite shares, and the path of the helpers beside this file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # reference, tolerance, cases

# A developer's own overrides must not decide what the suite tests; TQ_HB_CPU_ISA may, since all must pass under each.
for variable in ("HF2Q_AUTO_BARRIER", "HF2Q_TQ_NSG", "HF2Q_TQ_NWG", "TQ_HB_DEVICE", "TQ_HB_GQA", "TQ_HB_NUM_THREADS"):
    os.environ.pop(variable, None)

import tq_hb  # noqa: E402


def pytest_report_header() -> list[str]:
    """Says what the suite runs on, and why it does not run on the rest."""
    return [
        f"tq_hb {d.backend}: {d.name}{' (simulated)' if d.is_simulated else ''}"
        if d.available
        else f"tq_hb {d.backend}: not available: {d.reason}"
        for d in tq_hb.devices()
    ]


@pytest.fixture(scope="session", params=[d.backend for d in tq_hb.devices() if d.available])
def device(request: pytest.FixtureRequest) -> tq_hb.Device:
    """Every backend that is usable here, one after the other."""
    return tq_hb.Device(request.param)


@pytest.fixture
def forced_isa():
    """Has the cpu backend run with an instruction set until the test ends."""
    before = tq_hb.cpu_isa()
    yield lambda isa: tq_hb._core.set_cpu_isa("forced_isa", "isa", isa)
    tq_hb._core.set_cpu_isa("forced_isa", "isa", before)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """Sets environment variables that ``tq_hb.policy`` reads, and undoes both afterwards."""

    def set_variables(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        tq_hb.policy.reload()

    yield set_variables
    monkeypatch.undo()
    tq_hb.policy.reload()
