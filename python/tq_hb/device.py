"""Devices, and ops recorded on their buffers."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tq_hb import _core, policy
from tq_hb.interop import Array, as_codes, as_float32, borrow
from tq_hb.options import check_attention, check_bits, check_format, check_params, invalid

Buffer = _core.Buffer

# Apple's pages are the largest of the supported systems; a multiple suits all.
_ALIGNMENT = max(mmap.PAGESIZE, 16384)


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

    >>> import tq_hb
    >>> tq_hb.Device("cpu").limits.num_threads == tq_hb.num_threads()
    True
    """

    max_buffer_bytes: int
    num_threads: int


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
def _backends() -> tuple[str, ...]:
    return tuple(info.backend for info in devices())


@cache
def _apply_thread_setting() -> None:
    count = policy.num_threads_from_environment()
    if count is not None:
        _core.set_num_threads(count)


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
            _apply_thread_setting()

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
        return DeviceLimits(self._core.max_buffer_bytes, self._core.num_threads)

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

    def array(self, x: Array) -> Buffer:
        """Copy an array into a new buffer of the same shape and dtype (float64 and bfloat16 become float32).

        >>> import numpy as np, tq_hb
        >>> tq_hb.Device("cpu").array(np.array([0.5, 1.5])).numpy()
        array([0.5, 1.5], dtype=float32)
        """
        op = "Device.array"
        array, is_bfloat16 = borrow(op, "x", x)
        if is_bfloat16 or array.dtype.name in ("float64", "bfloat16"):
            array = as_float32(op, "x", x)
        buffer = self._core.empty(array.shape, array.dtype.newbyteorder("="), op, "x")
        buffer.numpy()[...] = array
        return buffer

    def encoder(self) -> CommandEncoder:
        """Start recording ops.

        >>> import tq_hb
        >>> enc = tq_hb.Device("cpu").encoder()
        >>> enc.kernels  # nothing yet
        ()
        """
        return CommandEncoder(self)

    def __repr__(self) -> str:
        return f"Device({self.backend!r}, name={self.name!r})"


def _auto_backend() -> str:
    """``TQ_HB_DEVICE`` if set, else the best device that is not simulated."""
    chosen = policy.environment().device
    if chosen is not None and chosen != "auto":
        if chosen not in _backends():
            raise invalid("Device", "TQ_HB_DEVICE", f"must be one of auto, {', '.join(_backends())}", repr(chosen))
        return chosen
    return next(info.backend for info in devices() if info.available and not info.is_simulated)


def resolve_device(op: str, device: str | Device | None) -> Device:
    """Return the device a call runs on: ``None`` and ``"auto"`` choose one."""
    if isinstance(device, Device):
        return device
    names = ("auto", *_backends())
    if device is not None and not (isinstance(device, str) and device in names):
        raise invalid(op, "device", f"must be None, a Device or one of {', '.join(names)}", repr(device))
    return _device("auto" if device is None else device, policy.environment())


@cache
def _device(name: str, _environment: policy.Environment) -> Device:
    return Device(name)


class CommandEncoder:
    """Records ops on a device's buffers and runs them after :meth:`commit`.

    Nothing orders two ops but :meth:`memory_barrier`. A call is checked completely when it is
    recorded. Values are checked when it runs: a row that is not finite is left as it was, and
    :meth:`wait` raises InvalidArgument naming the first one. Belongs to one thread at a time.

    Buffers that are written must be :class:`Buffer`; inputs may be arrays, which are copied.

    Examples
    --------
    >>> import numpy as np, tq_hb
    >>> dev = tq_hb.Device("cpu")
    >>> packed, norms = dev.empty((1, 8, 256), np.uint8), dev.empty((1, 8))
    >>> hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=0, cache_capacity=8)
    >>> enc = dev.encoder()
    >>> enc.hadamard_quantize_kv_hb(np.ones((1, 256), np.float32), packed, norms, hp)
    >>> enc.commit_and_wait()
    >>> float(norms.numpy()[0, 0])
    16.0
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._core = device._core.make_encoder()

    def _floats(self, op: str, field: str, x: Array) -> Buffer:
        if isinstance(x, Buffer):
            return x
        return self._device.array(as_float32(op, field, x))

    def _codes(self, op: str, field: str, x: Array) -> Buffer:
        return x if isinstance(x, Buffer) else self._device.array(as_codes(op, field, x))

    @staticmethod
    def _written(op: str, field: str, x: object) -> Buffer:
        if not isinstance(x, Buffer):
            raise invalid(op, field, "must be a Buffer of the encoder's device, since it is written", type(x).__name__)
        return x

    def hadamard_quantize_kv_hb(
        self,
        src: Array,
        packed: Buffer,
        norms: Buffer,
        hp: _core.HadamardQuantizeKvHbParams,
        *,
        codebook: str = "lloyd_max",
        packing: str = "byte",
    ) -> None:
        """Record the encoding of ``src`` into a cache; see :func:`tq_hb.hadamard_quantize_kv_hb`.

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> packed, norms = dev.empty((1, 4, 256), np.uint8), dev.empty((1, 4))
        >>> hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=2, cache_capacity=4)
        >>> enc = dev.encoder()
        >>> enc.hadamard_quantize_kv_hb(np.ones((1, 256), np.float32), packed, norms, hp)
        >>> enc.commit_and_wait()
        >>> norms.numpy().tolist()
        [[0.0, 0.0, 16.0, 0.0]]
        """
        op = "hadamard_quantize_kv_hb"
        check_format(op, codebook, packing)
        check_params(op, "hp", hp, _core.HadamardQuantizeKvHbParams)
        target = (
            "",
            self._floats(op, "src", src),
            self._written(op, "packed", packed),
            self._written(op, "norms", norms),
            hp.codebook_bits,
        )
        self._core.hadamard_quantize(op, hp, [target], codebook)

    def hadamard_quantize_kv_hb_dual(
        self,
        src_k: Array,
        src_v: Array,
        k_packed: Buffer,
        v_packed: Buffer,
        k_norms: Buffer,
        v_norms: Buffer,
        hp: _core.HadamardQuantizeKvHbParams,
        *,
        v_bits: int | None = None,
        codebook: str = "lloyd_max",
        packing: str = "byte",
    ) -> None:
        """Record the encoding of K and V together; see :func:`tq_hb.hadamard_quantize_kv_hb_dual`.

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> packed, norms = dev.empty((2, 1, 4, 256), np.uint8), dev.empty((2, 1, 4))
        >>> hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=0, cache_capacity=4)
        >>> k = np.ones((1, 256), np.float32)
        >>> enc = dev.encoder()
        >>> enc.hadamard_quantize_kv_hb_dual(k, 2 * k, *packed, *norms, hp, v_bits=5)
        >>> enc.commit_and_wait()
        >>> norms.numpy()[:, 0, 0].tolist()
        [16.0, 32.0]
        """
        op = "hadamard_quantize_kv_hb_dual"
        check_format(op, codebook, packing)
        check_params(op, "hp", hp, _core.HadamardQuantizeKvHbParams)
        bits = hp.codebook_bits if v_bits is None else check_bits(op, "v_bits", v_bits)
        targets = [
            (
                "k",
                self._floats(op, "src_k", src_k),
                self._written(op, "k_packed", k_packed),
                self._written(op, "k_norms", k_norms),
                hp.codebook_bits,
            ),
            (
                "v",
                self._floats(op, "src_v", src_v),
                self._written(op, "v_packed", v_packed),
                self._written(op, "v_norms", v_norms),
                bits,
            ),
        ]
        self._core.hadamard_quantize(op, hp, targets, codebook)

    def tq_dequantize_hb_kv(
        self,
        packed: Array,
        norms: Array,
        output: Buffer,
        hp: _core.HadamardQuantizeKvHbParams,
        *,
        pos: int,
        codebook: str = "lloyd_max",
        packing: str = "byte",
    ) -> None:
        """Record the decoding of positions ``pos`` ... ``pos + T - 1`` into float32 (T, G, D), still rotated.

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> packed, norms = tq_hb.quantize(np.eye(4, 256).reshape(1, 4, 256), 8)
        >>> hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=0, cache_capacity=4)
        >>> out = dev.empty((2, 1, 256))
        >>> enc = dev.encoder()
        >>> enc.tq_dequantize_hb_kv(packed, norms, out, hp, pos=1)
        >>> enc.commit_and_wait()
        >>> tq_hb.unrotate(out.numpy()).argmax(axis=-1).tolist()
        [[1], [2]]
        """
        op = "tq_dequantize_hb_kv"
        check_format(op, codebook, packing)
        check_params(op, "hp", hp, _core.HadamardQuantizeKvHbParams)
        self._core.dequantize(
            op,
            hp,
            _core.to_uint32(op, "pos", pos),
            self._codes(op, "packed", packed),
            self._floats(op, "norms", norms),
            self._written(op, "output", output),
            codebook,
        )

    def fwht_sign_premult_f32(self, x: Buffer) -> None:
        """Record R, in place on float32 (..., D).

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> buf, enc = dev.array(np.eye(1, 256)), dev.encoder()
        >>> enc.fwht_sign_premult_f32(buf)
        >>> enc.commit_and_wait()
        >>> np.unique(np.abs(buf.numpy())).tolist()  # a unit vector is spread evenly
        [0.0625]
        """
        self._core.fwht("fwht_sign_premult_f32", True, self._written("fwht_sign_premult_f32", "x", x))

    def fwht_sign_undo_f32(self, x: Buffer) -> None:
        """Record the inverse of R, in place on float32 (..., D).

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> buf, enc = dev.array(tq_hb.rotate(np.eye(1, 256))), dev.encoder()
        >>> enc.fwht_sign_undo_f32(buf)
        >>> enc.commit_and_wait()
        >>> bool((buf.numpy() == np.eye(1, 256)).all())
        True
        """
        self._core.fwht("fwht_sign_undo_f32", False, self._written("fwht_sign_undo_f32", "x", x))

    def flash_attn_vec_tq_hb(
        self,
        q: Array,
        k_packed: Array,
        k_norms: Array,
        v_packed: Array,
        v_norms: Array,
        output: Buffer,
        tmp: Buffer | None,
        p: _core.FlashAttnVecTqHbParams,
        **options: Any,
    ) -> None:
        """Record decode attention; ``output`` stays rotated. See :func:`tq_hb.flash_attn_vec_tq_hb` for the options.

        ``tmp`` is float32 of at least :func:`tq_hb.tmp_buffer_bytes`, or None: the encoder brings its own.

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> k = v = tq_hb.quantize(np.ones((1, 4, 256), np.float32), 8)
        >>> p = tq_hb.FlashAttnVecTqHbParams(
        ...     num_heads=2, num_kv_heads=1, head_dim=256, kv_seq_len=4, kv_capacity=4, scale=0.0625)
        >>> out, enc = dev.empty((2, 256)), dev.encoder()
        >>> enc.flash_attn_vec_tq_hb(tq_hb.rotate(np.ones((2, 256), np.float32)), *k, *v, out, None, p)
        >>> enc.memory_barrier()
        >>> enc.fwht_sign_undo_f32(out)
        >>> enc.commit_and_wait()
        >>> out.numpy().mean(axis=1).round(2).tolist()  # every value of V is about 1
        [1.0, 1.0]
        """
        op = "flash_attn_vec_tq_hb"
        self._attend(op, False, q, k_packed, k_norms, v_packed, v_norms, output, tmp, p, **options)

    def flash_attn_vec_tq_hb_with_fused_undo(
        self,
        q: Array,
        k_packed: Array,
        k_norms: Array,
        v_packed: Array,
        v_norms: Array,
        output: Buffer,
        tmp: Buffer | None,
        p: _core.FlashAttnVecTqHbParams,
        **options: Any,
    ) -> None:
        """Record decode attention with an un-rotated ``output``.

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> k = v = tq_hb.quantize(np.ones((1, 4, 256), np.float32), 8)
        >>> p = tq_hb.FlashAttnVecTqHbParams(
        ...     num_heads=2, num_kv_heads=1, head_dim=256, kv_seq_len=4, kv_capacity=4, scale=0.0625, fuse_fwht_pre=1)
        >>> out, enc = dev.empty((2, 256)), dev.encoder()
        >>> enc.flash_attn_vec_tq_hb_with_fused_undo(np.ones((2, 256), np.float32), *k, *v, out, None, p)
        >>> enc.commit_and_wait()
        >>> out.numpy().mean(axis=1).round(2).tolist()
        [1.0, 1.0]
        """
        op = "flash_attn_vec_tq_hb_with_fused_undo"
        self._attend(op, True, q, k_packed, k_norms, v_packed, v_norms, output, tmp, p, **options)

    def _attend(
        self,
        op: str,
        fused_undo: bool,
        q: Array,
        k_packed: Array,
        k_norms: Array,
        v_packed: Array,
        v_norms: Array,
        output: Buffer,
        tmp: Buffer | None,
        p: _core.FlashAttnVecTqHbParams,
        *,
        nwg: int | None = None,
        v_bits: int | None = None,
        codebook: str = "lloyd_max",
        packing: str = "byte",
        sinks: Array | None = None,
        precision: str = "default",
        return_lse: bool = False,
    ) -> None:
        check_format(op, codebook, packing)
        check_params(op, "p", p, _core.FlashAttnVecTqHbParams)
        check_attention(op, precision=precision, sinks=sinks, return_lse=return_lse)
        self._core.flash_attn_vec(
            op,
            self._floats(op, "q", q),
            self._codes(op, "k_packed", k_packed),
            self._floats(op, "k_norms", k_norms),
            self._codes(op, "v_packed", v_packed),
            self._floats(op, "v_norms", v_norms),
            self._written(op, "output", output),
            None if tmp is None else self._written(op, "tmp", tmp),
            p,
            policy.compute_nwg(p.kv_seq_len) if nwg is None else _core.to_uint32(op, "nwg", nwg),
            p.codebook_bits if v_bits is None else check_bits(op, "v_bits", v_bits),
            codebook,
            fused_undo,
        )

    def memory_barrier(self) -> None:
        """Order everything recorded so far before everything recorded later.

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> buf, enc = dev.array(np.ones((1, 256))), dev.encoder()
        >>> enc.fwht_sign_premult_f32(buf)
        >>> enc.memory_barrier()  # the next op reads what this one writes
        >>> enc.fwht_sign_undo_f32(buf)
        >>> enc.commit_and_wait()
        >>> float(buf.numpy().mean())
        1.0
        """
        self._core.memory_barrier()

    def commit(self) -> None:
        """Hand the recorded ops to the device; nothing can be recorded afterwards.

        >>> import tq_hb
        >>> enc = tq_hb.Device("cpu").encoder()
        >>> enc.commit()
        >>> enc.memory_barrier()
        Traceback (most recent call last):
        tq_hb.DeviceError: memory_barrier: the encoder has been committed; make a new one with Device.encoder()
        """
        self._core.commit()

    def wait(self) -> None:
        """Block until the committed ops are done.

        Raises
        ------
        InvalidArgument
            If an op met a row that is not finite or whose norm overflows; the other rows were written.
        DeviceError
            If the device failed, or nothing has been committed.

        Examples
        --------
        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> buf, enc = dev.array(np.ones((1, 256))), dev.encoder()
        >>> enc.fwht_sign_premult_f32(buf)
        >>> enc.commit()
        >>> enc.wait()
        >>> round(float(np.linalg.norm(buf.numpy())), 3)
        16.0
        """
        self._core.wait()

    def commit_and_wait(self) -> None:
        """Commit, then wait.

        >>> import numpy as np, tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> buf, enc = dev.array(np.ones((1, 512))), dev.encoder()
        >>> enc.fwht_sign_premult_f32(buf)
        >>> enc.commit_and_wait()
        >>> bool(np.array_equal(buf.numpy(), tq_hb.rotate(np.ones((1, 512)))))
        True
        """
        self._core.commit()
        self._core.wait()

    @property
    def gpu_time(self) -> float:
        """Seconds the device spent on the ops; known after :meth:`wait`.

        >>> import tq_hb
        >>> enc = tq_hb.Device("cpu").encoder()
        >>> enc.fwht_sign_premult_f32(tq_hb.Device("cpu").empty((1, 256)))
        >>> enc.commit_and_wait()
        >>> 0 <= enc.gpu_time < 10
        True
        """
        return self._core.gpu_time

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels recorded so far.

        >>> import tq_hb
        >>> dev = tq_hb.Device("cpu")
        >>> enc = dev.encoder()
        >>> enc.fwht_sign_premult_f32(dev.empty((1, 256)))
        >>> enc.kernels
        ('fwht_sign_premult_f32_d256',)
        """
        return self._core.kernels


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
    _apply_thread_setting()
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
    _apply_thread_setting()
    _core.set_num_threads(count)


def cpu_isa() -> str:
    """Instruction set of the cpu backend's kernels: ``"portable"``, ``"avx2"`` or ``"avx512"``.

    >>> import tq_hb
    >>> tq_hb.cpu_isa() in ("portable", "avx2", "avx512")
    True
    """
    return _core.cpu_isa()


def warmup(device: str | Device | None = None) -> None:
    """Do now what the first call would do: start threads, compile kernels.

    >>> import tq_hb
    >>> tq_hb.warmup("cpu")
    """
    if resolve_device("warmup", device).backend == "cpu":
        _core.warm_up_cpu()
