"""Tests of what only the cuda backend has; each is skipped, with the reason, where there is none."""

from __future__ import annotations

import pytest

import tq_hb


@pytest.fixture(scope="session")
def cuda() -> tq_hb.Device:
    info = next(d for d in tq_hb.devices() if d.backend == "cuda")
    if not info.available:
        pytest.skip(f"backend 'cuda' not available: {info.reason}")
    return tq_hb.Device("cuda")
