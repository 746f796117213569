"""Host arrays as buffers of a device, for one synchronous call."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tq_hb import _core


class Staging:
    """The arrays of one call: used in place where the device can use host memory, and copied otherwise.

    Copies of what the call writes go back to their arrays only after it has succeeded.
    """

    def __init__(self, op: str, device: _core.Device) -> None:
        self._op = op
        self._device = device
        self._written: list[tuple[_core.Buffer, npt.NDArray[Any]]] = []

    def read(self, field: str, array: npt.NDArray[Any]) -> _core.Buffer:
        """Return a buffer with the contents of an array that the call only reads."""
        buffer = self._device.wrap(self._op, field, array)
        return self._device.copy_in(self._op, field, array) if buffer is None else buffer

    def update(self, field: str, array: npt.NDArray[Any]) -> _core.Buffer:
        """Return a buffer for an array of which the call may write a part."""
        buffer = self._device.wrap(self._op, field, array)
        if buffer is None:
            buffer = self._device.copy_in(self._op, field, array)
            self._written.append((buffer, array))
        return buffer

    def fill(self, field: str, array: npt.NDArray[Any]) -> _core.Buffer:
        """Return a buffer for an array that the call writes completely."""
        buffer = self._device.wrap(self._op, field, array)
        if buffer is None:
            buffer = self._device.empty(array.shape, array.dtype, self._op, field)
            self._written.append((buffer, array))
        return buffer

    def run(self, encoder: _core.CommandEncoder) -> None:
        """Run what was recorded and hand over what it wrote."""
        encoder.commit()
        encoder.wait()
        for buffer, array in self._written:
            np.copyto(array, buffer.numpy())
