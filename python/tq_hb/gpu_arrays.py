"""Arrays of torch, cupy and others in the memory of an NVIDIA GPU, used where they are.

They are seen as buffers. What a buffer cannot be, of another dtype or layout, is converted by the array's own library
on the caller's stream, and what a call returns is allocated by that library.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from functools import lru_cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from tq_hb import _core
from tq_hb.options import invalid

Array = Any

_CUDA_DEVICE_TYPES = (2, 13)  # of DLPack: device memory and managed memory
_LEGACY_STREAM = 1  # as DLPack numbers the default stream
_NO_ORDER = -1
_NOT_ON_GPU = (np.ndarray, type)
_ALIGNMENT = 16  # of a kernel's loads


def library(x: Array) -> str:
    """Top-level package of the array's class, or "torch" or "mlx" if it derives from one of theirs."""
    return _library_of(cast(Hashable, type(x)))


@lru_cache(maxsize=64)
def _library_of(kind: type) -> str:
    # A class made at run time, as ctypes makes those of its arrays, may have no module.
    packages = [(getattr(base, "__module__", None) or "").partition(".")[0] for base in kind.__mro__]
    return next((package for package in packages if package in ("torch", "mlx")), packages[0])


def is_on_gpu(x: Array) -> bool:
    """Tell whether an array is in the memory of an NVIDIA GPU."""
    if isinstance(x, _NOT_ON_GPU):
        return False
    if library(x) == "torch":
        return bool(x.is_cuda)
    if hasattr(x, "__dlpack_device__"):
        try:
            return x.__dlpack_device__()[0] in _CUDA_DEVICE_TYPES
        except Exception:  # whoever reads the array says what is wrong with it
            return False
    return hasattr(x, "__cuda_array_interface__")


def where(x: Array) -> str:
    """Say where such an array is, for a message."""
    number = x.__dlpack_device__()[1] if hasattr(x, "__dlpack_device__") else 0
    return f"an array on cuda:{number}"


def require(op: str, field: str, x: Array, device: _core.Device | None) -> None:
    """Raise unless the call runs on the GPU that the array is on."""
    if device is None or device.backend != "cuda":
        rule = "must be in host memory" if device is None else f"must be in host memory for a call on {device.backend}"
        raise invalid(op, field, rule, where(x))


def stream(*arrays: Array) -> int | None:
    """Return the address of the stream that the caller uses; None for the default stream, or if nothing is on a GPU."""
    for x in arrays:
        if x is None or isinstance(x, _core.Buffer) or not is_on_gpu(x):
            continue
        kind = library(x)
        if kind == "torch":
            address = sys.modules["torch"].cuda.current_stream(x.device).cuda_stream
        elif kind == "cupy":
            address = sys.modules["cupy"].cuda.get_current_stream().ptr
        elif not hasattr(x, "__dlpack__"):
            address = x.__cuda_array_interface__.get("stream")
        else:
            continue
        if address not in (None, 0, _LEGACY_STREAM):
            return int(address)
    return None


def require_no_negative_bit(op: str, field: str, x: Array) -> None:
    """Raise for a tensor whose values are those in its memory negated, where the memory itself is used."""
    if library(x) == "torch" and x.is_neg():
        raise invalid(op, field, "must not have torch's negative bit; call its resolve_neg()", "a tensor with it")


def view(op: str, field: str, x: Array, device: _core.Device, *, on_its_stream: bool = True) -> _core.Buffer:
    """Return a buffer over an array as it is: C-contiguous and of a dtype that buffers have.

    It will be used on the stream that :func:`stream` tells, or else on the device's own.
    """
    require(op, field, x, device)
    if isinstance(x, _core.Buffer):
        return x
    require_no_negative_bit(op, field, x)
    kind = library(x)
    is_in_order = on_its_stream and kind in ("torch", "cupy")
    return device.borrow(op, field, x.detach() if kind == "torch" else x, _NO_ORDER if is_in_order else _LEGACY_STREAM)


def as_float32(op: str, field: str, x: Array, device: _core.Device, *, on_its_stream: bool = True) -> _core.Buffer:
    """Return a float32 buffer with the array's values: over its own memory where that can be."""
    require(op, field, x, device)
    kind, wanted = library(x), "must have dtype float16, bfloat16, float32 or float64"
    if kind == "torch":
        if not x.is_floating_point():
            raise invalid(op, field, wanted, x.dtype)
        x = x.detach().resolve_neg().to(sys.modules["torch"].float32).contiguous()
        if x.data_ptr() % _ALIGNMENT:
            x = x.clone()
    elif kind == "cupy":
        if x.dtype.kind != "f":
            raise invalid(op, field, wanted, x.dtype)
        x = sys.modules["cupy"].ascontiguousarray(x, dtype=np.float32)
        if x.data.ptr % _ALIGNMENT:
            x = x.copy()
    buffer = view(op, field, x, device, on_its_stream=on_its_stream)
    if buffer.dtype != np.float32:
        raise invalid(op, field, "must have dtype float32, or be an array of torch or cupy", buffer.dtype)
    return buffer


def as_dtype(op: str, field: str, x: Array, dtype: npt.DTypeLike, device: _core.Device) -> _core.Buffer:
    """Return a buffer over an array's own memory, which must have this dtype."""
    require(op, field, x, device)
    buffer = view(op, field, x, device)
    if buffer.dtype != np.dtype(dtype):
        raise invalid(op, field, f"must have dtype {np.dtype(dtype)}", buffer.dtype)
    return buffer


def dtype_name(x: Array) -> str:
    """Name of the array's dtype."""
    if library(x) == "torch":
        return str(x.dtype).removeprefix("torch.")
    return "float32" if not hasattr(x, "dtype") else np.dtype(x.dtype).name


def empty(x: Array, shape: tuple[int, ...], dtype: str, device: _core.Device) -> Array:
    """Allocate an array beside ``x``, in its library."""
    kind = library(x)
    if kind == "torch":
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=x.device)
    if kind == "cupy":
        return sys.modules["cupy"].empty(shape, np.dtype(dtype))
    return device.empty(shape, np.dtype(dtype), "empty", "dtype")


def finished(x: Array, result: Array, dtype: str) -> Array:
    """Hand over what :func:`empty` has allocated, as ``dtype`` and in the library of ``x``."""
    kind = library(x)
    if kind == "torch":
        return result.to(getattr(sys.modules["torch"], dtype))
    if kind == "cupy":
        return result.astype(dtype, copy=False)
    if hasattr(x, "__array_namespace__"):
        namespace = x.__array_namespace__()
        return namespace.astype(namespace.from_dlpack(result), getattr(namespace, dtype))
    return result


def overwrite(target: Array, values: Array) -> None:
    """Copy values into an array of torch, cupy or ours, broadcast; what its dtype cannot hold becomes infinite.

    The array's library copies, on the caller's stream: also what is in a buffer, which is not read before that.
    """
    kind = library(target)
    if kind == "torch":
        torch = sys.modules["torch"]
        if isinstance(values, _core.Buffer):
            values = torch.from_dlpack(values)
        target.copy_(values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values)))
    elif kind == "cupy":
        target[...] = sys.modules["cupy"].asarray(values)
    else:
        values = values.numpy() if isinstance(values, _core.Buffer) else values
        target.copy_from(np.broadcast_to(np.asarray(values, target.dtype), target.shape))


def compute(op: str, field: str, rows: _core.Buffer, x: Array, function: Any, *constants: Any) -> Array:
    """Call ``function(rows, *constants)`` in the library of ``x``, torch or cupy; the constants are numpy's."""
    kind = library(x)
    if kind == "torch":
        torch = sys.modules["torch"]
        return function(torch.from_dlpack(rows), *(torch.from_numpy(c).to(x.device) for c in constants)).contiguous()
    if kind == "cupy":
        cupy = sys.modules["cupy"]
        return cupy.ascontiguousarray(function(cupy.asarray(rows), *(cupy.asarray(c) for c in constants)))
    raise _core.UnsupportedError(f"{op}: k_mean with {field} on a GPU needs an array of torch or cupy")
