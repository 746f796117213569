"""The arrays of a call as buffers of its device, and the calls on a GPU that still run."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from tq_hb import _core, gpu_arrays
from tq_hb.gpu_arrays import is_on_gpu
from tq_hb.interop import like
from tq_hb.options import allocate


class Staging:
    """The arrays of one call: used in place where the device can use their memory, and copied otherwise.

    Copies of what the call writes go back to their arrays only after it has succeeded. Results are where ``beside`` is,
    on a GPU in its library, and the call runs on the stream that the caller uses there.
    """

    def __init__(self, op: str, device: _core.Device, beside: Any = None) -> None:
        self._op = op
        self._device = device
        self._beside = beside if beside is not None and is_on_gpu(beside) else None
        self._written: list[tuple[_core.Buffer, npt.NDArray[Any]]] = []
        self.stream = None if self._beside is None else gpu_arrays.stream(self._beside)

    def make_encoder(self) -> _core.CommandEncoder:
        """Return an encoder for the call."""
        return self._device.make_encoder(stream=self.stream)

    def allocate(self, shape: tuple[int, ...], dtype: str = "float32") -> Any:
        """Return an array for a result."""
        if self._beside is not None:
            return gpu_arrays.empty(self._beside, shape, dtype, self._device)
        return allocate(self._op, "the result", shape, dtype)

    def hand_over(self, x: Any, result: Any, dtype: str = "float32") -> Any:
        """Return an allocated array as ``dtype``, in the library of ``x``."""
        if self._beside is not None:
            return gpu_arrays.finished(self._beside, result, dtype)
        return like(self._op, x, result, dtype)

    def read(self, field: str, array: Any) -> _core.Buffer:
        """Return a buffer with the contents of an array that the call only reads."""
        if not isinstance(array, np.ndarray):
            return gpu_arrays.view(self._op, field, array, self._device)
        buffer = self._device.wrap(self._op, field, array)
        return self._device.copy_in(self._op, field, array) if buffer is None else buffer

    def update(self, field: str, array: Any) -> _core.Buffer:
        """Return a buffer for an array of which the call may write a part."""
        if not isinstance(array, np.ndarray):
            return gpu_arrays.view(self._op, field, array, self._device)
        buffer = self._device.wrap(self._op, field, array)
        if buffer is None:
            buffer = self._device.copy_in(self._op, field, array)
            self._written.append((buffer, array))
        return buffer

    def fill(self, field: str, array: Any) -> _core.Buffer:
        """Return a buffer for an array that the call writes completely."""
        if not isinstance(array, np.ndarray):
            return gpu_arrays.view(self._op, field, array, self._device)
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


class Outstanding:
    """Calls that a GPU has been given and may still work on, of one cache or of several that share it.

    Their encoders keep what they use and know which row could not be used: that is raised by the next call, or by the
    next that waits. A captured call may run again at any time, so that its encoder stays. Threads may use it at once.
    """

    MOST = 64

    def __init__(self) -> None:
        self._running: deque[tuple[int | None, _core.CommandEncoder]] = deque()  # with their streams
        self._captured: list[_core.CommandEncoder] = []
        self.renew_lock()

    def renew_lock(self) -> None:
        """Take a new lock, in a forked child: the thread that held the old one is not there to release it."""
        self._lock = threading.Lock()

    def enter(self, device: _core.Device, stream: int | None) -> None:
        """Let a call on a stream come after those before; while a stream is captured nothing may be waited for."""
        if not self._running or (stream is not None and device.is_capturing(stream)):
            return
        with self._lock:
            if self._running:
                is_full = len(self._running) >= self.MOST
                self._settle(everything=is_full or any(other != stream for other, _ in self._running))

    def run(self, device: _core.Device, stream: int | None, encoder: _core.CommandEncoder) -> None:
        """Hand over a recorded call without waiting for it."""
        is_captured = stream is not None and device.is_capturing(stream)
        encoder.commit()
        with self._lock:
            if is_captured:
                self._captured.append(encoder)
            else:
                self._running.append((stream, encoder))

    def wait(self) -> None:
        """Wait for all, and raise what went wrong in the first that failed."""
        with self._lock:
            self._settle(everything=True)

    def _settle(self, *, everything: bool) -> None:
        while self._running and (everything or self._running[0][1].is_done):
            try:
                self._running[0][1].wait()
            finally:
                self._running.popleft()
