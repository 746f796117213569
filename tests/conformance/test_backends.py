"""Which backends the suite ran on, and why not on the others: a skip here stands for all their tests."""

from __future__ import annotations

import re

import pytest

import tq_hb


@pytest.mark.parametrize("info", tq_hb.devices(), ids=lambda info: info.backend)
def test_backend_takes_part(info):
    if not info.available:
        pytest.skip(f"backend {info.backend!r} not available: {info.reason}")
    assert tq_hb.Device(info.backend).backend == info.backend


@pytest.mark.parametrize("info", tq_hb.devices(), ids=lambda info: info.backend)
def test_a_backend_that_is_not_here_says_why(info):
    if info.available:
        pytest.skip(f"backend {info.backend!r} is available here")
    assert info.reason
    with pytest.raises(tq_hb.DeviceError, match=f"{info.backend}.*{re.escape(info.reason)}"):
        tq_hb.Device(info.backend)
