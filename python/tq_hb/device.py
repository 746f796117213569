"""Devices: which there are, and what they allocate."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tq_hb import _core, gpu_arrays, policy
from tq_hb.encoder import Buffer, CommandEncoder
from tq_hb.interop import Array, as_float32, as_shared, borrow, copied
from tq_hb.options import check_bits, invalid

# Apple's pages are the largest of the supported systems; a multiple suits all.
_ALIGNMENT = max(mmap.PAGESIZE, 16384)
BACKENDS = _core.backend_names()


@dataclass(frozen=True)
class DeviceInfo:
    """One backend of the project: usable here, or why not.

    >>> import tq_hb
    >>> tq_hb.devices()[-1].backend
    'cpu'
    """

    backend: str
    available: bool
    name: str
    is_simulated: bool
    reason: str


@dataclass(frozen=True)
class DeviceLimits:
    """What a device can hold and how wide it works.

    ``num_threads`` is 0 on a GPU, and the limits of threadgroups are 0 on the cpu.

    >>> import tq_hb
    >>> limits = tq_hb.Device("cpu").limits
    >>> limits.num_threads == tq_hb.num_threads(), limits.max_threadgroup_bytes
    (True, 0)
    """

    max_buffer_bytes: int
    num_threads: int
    max_threadgroup_bytes: int
    max_threads_per_threadgroup: int


def devices() -> list[DeviceInfo]:
    """List every backend, best first: what is usable here, and for the rest why not.

    >>> import tq_hb
    >>> [info.backend for info in tq_hb.devices() if info.available and info.backend == "cpu"]
    ['cpu']
    """
    return [
        DeviceInfo(
            backend, device is not None, device.name if device else "", bool(device and device.is_simulated), why
        )
        for backend, device, why in _core.backend_statuses()
    ]


@cache
def _apply_cpu_settings() -> None:
    count, isa = policy.num_threads_from_environment(), policy.environment().cpu_isa
    if count is not None:
        _core.set_num_threads(count)
    if isa is not None:
        _core.set_cpu_isa("Device", "TQ_HB_CPU_ISA", isa)


class Device:
    """A device that ops run on: ``"cpu"``, ``"metal"``, ``"cuda"`` or ``"auto"``.

    Raises
    ------
    InvalidArgument
        For a name that is none of these.
    DeviceError
        If the backend is not available here; the message says why.

    Examples
    --------
    >>> import numpy as np, tq_hb
    >>> dev = tq_hb.Device("cpu")
    >>> dev.backend, dev.is_simulated
    ('cpu', False)
    >>> buf = dev.array(np.ones((2, 256), np.float32))
    >>> enc = dev.encoder()
    >>> enc.fwht_sign_premult_f32(buf)
    >>> enc.memory_barrier()
    >>> enc.fwht_sign_undo_f32(buf)
    >>> enc.commit_and_wait()
    >>> bool(np.allclose(buf.numpy(), 1))
    True
    """

    def __init__(self, name: str = "auto") -> None:
        if not isinstance(name, str):
            raise invalid("Device", "name", "must be a string", repr(name))
        self._core = _core.open_device(_auto_backend() if name == "auto" else name)
        if self._core.backend == "cpu":
            _apply_cpu_settings()

    @property
    def name(self) -> str:
        """Name for people.

        >>> import tq_hb
        >>> tq_hb.Device("cpu").name == f"cpu ({tq_hb.cpu_isa()})"
        True
        """
        return self._core.name

    @property
    def backend(self) -> str:
        """``"cpu"``, ``"metal"`` or ``"cuda"``.

        >>> import tq_hb
        >>> tq_hb.Device("cpu").backend
        'cpu'
        """
        return self._core.backend

    @property
    def is_simulated(self) -> bool:
        """Whether this is a simulation of the hardware.

        >>> import tq_hb
        >>> tq_hb.Device("cpu").is_simulated
        False
        """
        return self._core.is_simulated

    @property
    def limits(self) -> DeviceLimits:
        """Limits of the device.

        >>> import tq_hb
        >>> limits = tq_hb.Device("cpu").limits
        >>> limits.num_threads == tq_hb.num_threads(), limits.max_buffer_bytes > 2**20
        (True, True)
        """
        core = self._core
        return DeviceLimits(
            core.max_buffer_bytes, core.num_threads, core.max_threadgroup_bytes, core.max_threads_per_threadgroup
        )

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Buffer:
        """Allocate a zeroed buffer.

        Parameters
        ----------
        shape : int or tuple of int
        dtype : float32, float16, uint8, uint16, uint32 or int32

        Examples
        --------
        >>> import numpy as np, tq_hb
        >>> buf = tq_hb.Device("cpu").empty((2, 3), np.uint8)
        >>> buf, buf.numpy().tolist()
        (Buffer(shape=(2, 3), dtype=uint8), [[0, 0, 0], [0, 0, 0]])
        """
        op = "Device.empty"
        return self._core.empty(_check_shape(op, shape), _check_dtype(op, dtype), op, "dtype")

    def array(self, x: Array, copy: bool | None = True) -> Buffer:
        """Make a buffer of an array, of its shape and dtype (float64 and bfloat16 become float32).

        Parameters
        ----------
        x : array
        copy : bool or None
            True copies. None uses the array's own memory where the device can, and False raises
            InvalidArgument where it cannot: the array must be C-contiguous, writable and of a dtype that
            :meth:`empty` takes. A GPU also needs whole pages, as :func:`tq_hb.empty` makes them.

        Examples
        --------
        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> dev.array(np.array([0.5, 1.5])).numpy()
        array([0.5, 1.5], dtype=float32)
        >>> x = tq_hb.empty(3)
        >>> dev.array(x, copy=False).numpy()[1] = 5
        >>> x.tolist()
        [0.0, 5.0, 0.0]
        """
        op = "Device.array"
        if not (copy is None or isinstance(copy, bool)):
            raise invalid(op, "copy", "must be True, False or None", repr(copy))
        if gpu_arrays.is_on_gpu(x) and self.backend == "cuda":
            return self._array_on_gpu(op, x, copy)
        if copy is not True:
            try:
                return self._share(op, x)
            except _core.InvalidArgument:
                if copy is False:
                    raise
        array, is_bfloat16 = borrow(op, "x", x)
        if is_bfloat16 or array.dtype.name in ("float64", "bfloat16"):
            array = as_float32(op, "x", x)
        if not (array.dtype.isnative and array.flags.c_contiguous):
            array = copied(op, "x", array, array.dtype.newbyteorder("="))
        return self._core.copy_in(op, "x", array)

    def _array_on_gpu(self, op: str, x: Array, copy: bool | None) -> Buffer:
        shared = gpu_arrays.view(op, "x", x, self._core, on_its_stream=False)
        if copy is not True:
            return shared
        buffer = self._core.empty(shared.shape, shared.dtype, op, "x")
        buffer.copy_from(shared)
        return buffer

    def _share(self, op: str, x: Array) -> Buffer:
        array = as_shared(op, "x", x)
        buffer = self._core.wrap(op, "x", array)
        if buffer is None:
            rule = f"must be page-aligned to share its memory with {self.backend}: allocate it with tq_hb.empty"
            raise invalid(op, "x", rule, f"address {array.ctypes.data:#x}")
        return buffer

    def encoder(self, *, auto_barrier: bool | None = None, stream: object = None) -> CommandEncoder:
        """Start recording ops.

        Parameters
        ----------
        auto_barrier : bool, optional
            Places a barrier before each op that touches what an earlier one writes, or writes what an
            earlier one reads. By default only if ``HF2Q_AUTO_BARRIER`` is 1.
        stream : optional
            CUDA stream to run on: its address as an integer, a ``torch.cuda.Stream``, a ``cupy.cuda.Stream`` or
            anything with ``__cuda_stream__``. By default one of the device's own, in order with the legacy
            default stream.

        Raises
        ------
        InvalidArgument
            If an argument breaks a rule.
        UnsupportedError
            If there is a stream on a device that has none.

        Examples
        --------
        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> buf, enc = dev.array(np.ones((1, 256))), dev.encoder(auto_barrier=True)
        >>> enc.fwht_sign_premult_f32(buf)
        >>> enc.fwht_sign_undo_f32(buf)
        >>> [node.kind for node in enc.nodes]
        ['other', 'barrier', 'other']
        """
        if not (auto_barrier is None or isinstance(auto_barrier, bool)):
            raise invalid("Device.encoder", "auto_barrier", "must be True, False or None", repr(auto_barrier))
        if auto_barrier is None:
            auto_barrier = policy.environment().auto_barrier
        handle = None if stream is None else _stream_handle("Device.encoder", stream)
        return CommandEncoder(self._core, self._core.make_encoder(auto_barrier, handle))

    def __repr__(self) -> str:
        return f"Device({self.backend!r}, name={self.name!r})"


def _stream_handle(op: str, stream: object) -> int:
    """Return the address of a CUDA stream, as the libraries that have streams spell it."""
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        stream = (protocol() if callable(protocol) else protocol)[1]
    for name in ("cuda_stream", "ptr"):  # torch's and cupy's
        stream = getattr(stream, name, stream)
    if not isinstance(stream, int) or isinstance(stream, bool) or not 0 <= stream < 2**64:
        raise invalid(op, "stream", "must be a CUDA stream or its address", repr(stream))
    return stream


def _auto_backend() -> str:
    """``TQ_HB_DEVICE`` if set, else the best device that is not simulated."""
    chosen = policy.environment().device
    if chosen is not None and chosen != "auto":
        if chosen not in BACKENDS:
            raise invalid("Device", "TQ_HB_DEVICE", f"must be one of auto, {', '.join(BACKENDS)}", repr(chosen))
        return chosen
    return next(info.backend for info in devices() if info.available and not info.is_simulated)


def resolve_device(op: str, device: str | Device | None) -> Device:
    """Return the device a call runs on: ``None`` and ``"auto"`` choose one."""
    if isinstance(device, Device):
        return device
    names = ("auto", *BACKENDS)
    if device is not None and not (isinstance(device, str) and device in names):
        raise invalid(op, "device", f"must be None, a Device or one of {', '.join(names)}", repr(device))
    return _device("auto" if device is None else device, policy.environment())


@cache
def _device(name: str, _environment: policy.Environment) -> Device:
    return Device(name)


def empty(shape: int | tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """Zeroed numpy array that every device can use without a copy: page-aligned, whole pages long.

    >>> import numpy as np, tq_hb
    >>> a = tq_hb.empty((3, 5), np.uint8)
    >>> a.shape, a.ctypes.data % 4096
    ((3, 5), 0)
    """
    extents = _check_shape("empty", shape)
    kind = _check_dtype("empty", dtype)
    if kind.hasobject or kind.itemsize == 0:
        raise invalid("empty", "dtype", "must have a fixed size and hold no objects", repr(kind))
    if kind.itemsize * math.prod(max(extent, 1) for extent in extents) >= 2**63:
        raise invalid("empty", "shape", "must fit in 63 bits", extents)
    size = kind.itemsize * math.prod(extents)
    limit = _core.open_device("cpu").max_buffer_bytes
    if size > limit:
        raise _core.OutOfMemoryError(f"empty: {size} bytes exceed this machine's memory of {limit}")
    pages = -(-size // _ALIGNMENT) * _ALIGNMENT
    try:
        raw = np.zeros(pages + _ALIGNMENT, np.uint8)
    except MemoryError as error:
        raise _core.OutOfMemoryError(f"empty: could not allocate {size} bytes") from error
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(kind).reshape(extents)


def _check_shape(op: str, shape: int | tuple[int, ...]) -> tuple[int, ...]:
    extents = shape if isinstance(shape, tuple | list) else (shape,)
    return tuple(_core.to_uint32(op, "shape", extent) for extent in extents)


def _check_dtype(op: str, dtype: npt.DTypeLike) -> np.dtype[Any]:
    try:
        return np.dtype(dtype)
    except (TypeError, ValueError):
        raise invalid(op, "dtype", "must name a numpy dtype", repr(dtype)) from None


def num_threads() -> int:
    """Threads that the cpu backend works with.

    >>> import tq_hb
    >>> tq_hb.num_threads() >= 1
    True
    """
    _apply_cpu_settings()
    return _core.num_threads()


def set_num_threads(n: int) -> None:
    """Set the threads of the cpu backend, 1 to 1024. Results do not depend on it.

    ``TQ_HB_NUM_THREADS`` sets it at the first use; without either it is the number of processors.

    >>> import tq_hb
    >>> before = tq_hb.num_threads()
    >>> tq_hb.set_num_threads(2)
    >>> tq_hb.num_threads()
    2
    >>> tq_hb.set_num_threads(before)
    """
    count = policy.check_num_threads("set_num_threads", "n", n)
    _apply_cpu_settings()
    _core.set_num_threads(count)


def cpu_isa() -> str:
    """Instruction set of the cpu backend's kernels.

    ``"portable"``, ``"avx2"``, ``"avxvnni"``, ``"avx512"`` or ``"neon"``.

    The fastest that the processor has, unless ``TQ_HB_CPU_ISA`` names another.

    >>> import tq_hb
    >>> tq_hb.cpu_isa() in ("portable", "avx2", "avxvnni", "avx512", "neon")
    True
    """
    _apply_cpu_settings()
    return _core.cpu_isa()


def warmup(device: str | Device | None = None, *, bits: int | Iterable[int] | None = None) -> None:
    """Do now what the first calls would do: start threads, compile kernels.

    Parameters
    ----------
    device : str or Device, optional
    bits : int or several, optional
        Widths that will be used; every width by default.

    Examples
    --------
    >>> import tq_hb
    >>> tq_hb.warmup("cpu", bits=(8, 6))
    """
    op = "warmup"
    if bits is None:
        widths = _core.supported_bits()
    elif isinstance(bits, Iterable) and getattr(bits, "ndim", 1) > 0:  # a scalar of numpy is an Iterable by its class
        widths = tuple(check_bits(op, "bits", width) for width in bits)
    else:
        widths = (check_bits(op, "bits", bits),)
    resolve_device(op, device)._core.warm_up(list(widths))
