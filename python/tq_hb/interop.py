"""Arrays of numpy, torch, mlx and others, in and out.

Input is anything with ``__dlpack__`` or the buffer protocol. It is borrowed where its dtype and
layout allow and converted otherwise. Results go back in the library they came from. What is in the memory of a GPU is
seen as a buffer by a call that runs there, and refused by others: see :mod:`tq_hb.gpu_arrays`.
"""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from tq_hb import _core, gpu_arrays
from tq_hb.gpu_arrays import is_on_gpu
from tq_hb.options import Allocating, invalid

Array = Any
"""Anything with ``__dlpack__`` or the buffer protocol."""

Float32Array = npt.NDArray[np.float32]
Rows = Float32Array | _core.Buffer
"""float32 values where the call finds them: of the host's arrays, or of a GPU's."""

_library = gpu_arrays.library

_FLOAT32 = np.dtype(np.float32)

# Strides may interleave so that finding an overlap takes exponential time.
_MOST_WORK = 10_000

# numpy puts a dtype's name together anew whenever it is asked for.
_FLOAT_NAMES = {np.float16: "float16", np.float32: "float32", np.float64: "float64"}
_A_FLOAT = "must have dtype float16, bfloat16, float32 or float64"
_A_CODE = "must have dtype uint8"


def borrow(
    op: str, field: str, x: Array, rule: str = "must have a float or integer dtype"
) -> tuple[npt.NDArray[Any], bool]:
    """View an array in host memory as a numpy array without copying; one that numpy has no dtype for breaks ``rule``.

    Returns
    -------
    (array, is_bfloat16)
        With ``is_bfloat16`` the array holds uint16 bit patterns.
    """
    if isinstance(x, np.ndarray):
        return np.asarray(x), False
    if is_on_gpu(x):
        gpu_arrays.require(op, field, x, None)
    if isinstance(x, _core.Buffer):
        return x.numpy(), False
    if hasattr(x, "__dlpack__") and not isinstance(x, type):
        return _core.from_dlpack(op, field, _exportable(x), rule)
    try:
        return np.asarray(memoryview(x)), False
    except (TypeError, ValueError):
        raise invalid(op, field, "must be an array with __dlpack__ or the buffer protocol", type(x).__name__) from None


def _exportable(x: Array) -> Array:
    if _library(x) != "torch":
        return x
    if x.device.type == "mps":
        # DLPack has no streams for Metal: what torch still computes has to be there before it is read.
        sys.modules["torch"].mps.synchronize()
    # torch exports no tensor that still records gradients, and one with the negative bit as if it had none.
    return x.detach().resolve_neg()


def _dtype_name(array: npt.NDArray[Any]) -> str:
    return _FLOAT_NAMES.get(array.dtype.type) or array.dtype.name


def _is_plain(x: Array) -> TypeGuard[Float32Array]:
    """Tell whether an array can be used as it is, as most can: what follows would find out step by step."""
    return type(x) is np.ndarray and x.dtype == _FLOAT32 and _is_simple(x)


def as_rows(op: str, field: str, x: Array, device: _core.Device) -> Rows:
    """Return ``x`` as C-contiguous float32 values where a call on the device finds them."""
    if _is_plain(x):
        return x
    return gpu_arrays.as_float32(op, field, x, device) if is_on_gpu(x) else as_float32(op, field, x)


def as_code_rows(op: str, field: str, x: Array, device: _core.Device) -> npt.NDArray[np.uint8] | _core.Buffer:
    """Return ``x`` as C-contiguous uint8 values where a call on the device finds them."""
    return gpu_arrays.as_dtype(op, field, x, np.uint8, device) if is_on_gpu(x) else as_codes(op, field, x)


def as_rows_with_dtype(op: str, field: str, x: Array, device: _core.Device) -> tuple[Rows, str]:
    """Return ``x`` as :func:`as_rows` does, and the name of the dtype that a result computed from it has."""
    if _is_plain(x):
        return x, "float32"
    if is_on_gpu(x):
        return gpu_arrays.as_float32(op, field, x, device), _result_dtype(gpu_arrays.dtype_name(x))
    array, is_bfloat16 = borrow(op, field, x, _A_FLOAT)
    name = "bfloat16" if is_bfloat16 else _dtype_name(array)
    return _as_float32(op, field, array, is_bfloat16), _result_dtype(name)


def as_float32(op: str, field: str, x: Array) -> Float32Array:
    """Return ``x`` as a C-contiguous float32 array, borrowed where possible and rounded otherwise."""
    return _as_float32(op, field, *borrow(op, field, x, _A_FLOAT))


def _as_float32(op: str, field: str, array: npt.NDArray[Any], is_bfloat16: bool) -> Float32Array:
    if is_bfloat16:
        bits = copied(op, field, array, np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if array.dtype == _FLOAT32:
        return _contiguous(op, field, array)
    if _dtype_name(array) not in (*_FLOAT_NAMES.values(), "bfloat16"):
        raise invalid(op, field, _A_FLOAT, array.dtype)
    return copied(op, field, array, np.float32)


def as_codes(op: str, field: str, x: Array) -> npt.NDArray[np.uint8]:
    """Return ``x`` as a C-contiguous uint8 array, borrowed where possible."""
    array, is_bfloat16 = borrow(op, field, x, _A_CODE)
    if array.dtype != np.uint8:
        raise invalid(op, field, _A_CODE, "bfloat16" if is_bfloat16 else array.dtype)
    return _contiguous(op, field, array)


def _is_simple(array: npt.NDArray[Any]) -> bool:
    flags = array.flags
    return bool(flags.c_contiguous and flags.aligned)


def _contiguous(op: str, field: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    # ascontiguousarray would turn a scalar into a vector, and leave an array at an odd address as it is.
    return array if _is_simple(array) else copied(op, field, array, array.dtype)


def copied(op: str, field: str, array: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return a C-contiguous copy of an array as ``dtype``; what that cannot hold becomes infinite."""
    try:
        with np.errstate(all="ignore"):
            return array.astype(dtype, order="C")
    except MemoryError as error:
        raise _core.OutOfMemoryError(f"{op}: {field} could not be copied: {error}") from error


def as_writable(op: str, field: str, x: Array, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Borrow an array that will be written in place: exact dtype, C-contiguous, writable."""
    array, name = _borrow_writable(op, field, x)
    if name != np.dtype(dtype).name:
        raise invalid(op, field, f"must have dtype {np.dtype(dtype)}", name)
    return array


def as_writable_rows(
    op: str, field: str, x: Array, dtype: npt.DTypeLike, device: _core.Device
) -> npt.NDArray[Any] | _core.Buffer:
    """Borrow an array that a call on the device will write in place: exact dtype, C-contiguous, writable."""
    return gpu_arrays.as_dtype(op, field, x, dtype, device) if is_on_gpu(x) else as_writable(op, field, x, dtype)


def as_shared(op: str, field: str, x: Array) -> npt.NDArray[Any]:
    """Borrow an array whose memory a device may write: of a dtype that buffers have, C-contiguous, writable."""
    array, name = _borrow_writable(op, field, x)
    if name == "bfloat16":
        raise invalid(op, field, "must have a dtype that buffers have", name)
    return array


def _borrow_writable(op: str, field: str, x: Array) -> tuple[npt.NDArray[Any], str]:
    """Borrow an array that can be written in place, with the name of its dtype."""
    if _library(x) == "mlx":
        raise invalid(op, field, "must be writable (mlx arrays are not; use tq_hb.empty)", "an mlx array")
    gpu_arrays.require_no_negative_bit(op, field, x)
    array, is_bfloat16 = borrow(op, field, x)
    _check_layout(op, field, array)
    return array, "bfloat16" if is_bfloat16 else _dtype_name(array)


def require_rows(op: str, field: str, rows: Rows) -> None:
    """Raise if a row cannot be encoded: not finite, or with a norm beyond float32.

    ``rows`` is (heads, head_dim) or (tokens, heads, head_dim). On a GPU the kernels look themselves.
    """
    if not isinstance(rows, _core.Buffer):
        _core.require_rows(op, field, rows)


def require_queries(op: str, q: Rows, *, batched: bool = False) -> None:
    """Raise if a query is not finite; they are as :func:`require_rows` has them, behind the sequences if batched."""
    if not isinstance(q, _core.Buffer):
        _core.require_queries(op, batched, q)


def check_sinks(op: str, sinks: Array, num_heads: int) -> Float32Array:
    """Return the sinks as float32 (num_heads,): finite, or -inf for a head without one."""
    logits = as_float32(op, "sinks", sinks)
    if logits.shape != (num_heads,):
        raise invalid(op, "sinks", f"must have shape ({num_heads},), one per query head", logits.shape)
    bad = np.flatnonzero(np.isnan(logits) | (logits == np.inf))
    if bad.size:
        raise invalid(op, "sinks", "must be finite or -inf", f"{logits[bad[0]]} at head {bad[0]}")
    return logits


def result_dtype(op: str, field: str, x: Array) -> str:
    """Name of the dtype that a result computed from ``x`` has: its own, with float64 rounded to float32."""
    if is_on_gpu(x):
        name = gpu_arrays.dtype_name(x)
    else:
        array, is_bfloat16 = borrow(op, field, x)
        name = "bfloat16" if is_bfloat16 else _dtype_name(array)
    return _result_dtype(name)


def _result_dtype(name: str) -> str:
    return "float32" if name == "float64" else name


def like(op: str, x: Array, result: npt.NDArray[Any], dtype: str = "float32") -> Array:
    """Return a host's ``result`` in the library of ``x``, as ``dtype``; what it cannot hold becomes infinite."""
    if dtype == "float32" and isinstance(x, np.ndarray):
        return result
    with Allocating(op, "the result"), np.errstate(all="ignore"):
        return _like(op, x, result, dtype)


def _like(op: str, x: Array, result: npt.NDArray[Any], dtype: str) -> Array:
    library = _library(x)
    if library == "torch":
        torch = sys.modules["torch"]
        return torch.from_dlpack(result).to(x.device, getattr(torch, dtype))
    if library == "mlx":
        mx = sys.modules["mlx.core"]
        return mx.array(result).astype(getattr(mx, dtype))
    if isinstance(x, _core.Buffer):
        return _core.copy_beside(x, op, "the result", result.astype(dtype, copy=False))
    if isinstance(x, np.ndarray):
        # x's own dtype in native byte order: "bfloat16" is no name that numpy knows.
        return result.astype(x.dtype.newbyteorder("=")) if dtype in ("float16", "bfloat16") else result
    if hasattr(x, "__array_namespace__"):
        namespace = x.__array_namespace__()
        return namespace.astype(namespace.from_dlpack(result), getattr(namespace, dtype))
    return result.astype(dtype, copy=False)


def as_out(op: str, out: Array, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """Borrow an output array, which must have this shape and the named dtype; bfloat16 is seen as uint16 bits."""
    array, name = _borrow_writable(op, "out", out)
    if name != dtype:
        raise invalid(op, "out", f"must have dtype {dtype}", name)
    if array.shape != shape:
        raise invalid(op, "out", f"must have shape {shape}", array.shape)
    return array


def require_disjoint(op: str, written_name: str, written: npt.NDArray[Any], read_name: str, read: Array) -> None:
    """Raise if an array that is written shares memory with one that is read."""
    if is_on_gpu(read):
        return
    array, _ = borrow(op, read_name, read)
    try:
        # numpy's stubs know of two special values only.
        overlaps = np.shares_memory(written, array, max_work=_MOST_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        overlaps = True
    if overlaps:
        raise invalid(op, written_name, f"must not overlap {read_name}", "shared memory")


def finish(
    op: str, x: Array, out: Array | None, writable: npt.NDArray[Any] | None, result: Float32Array, dtype: str
) -> Array:
    """Hand over the result of a call on ``x``: in ``out``, whose memory is ``writable``, or as a new array."""
    if writable is None:
        return like(op, x, result, dtype)
    if writable is not result:
        with Allocating(op, "the result"), np.errstate(all="ignore"):
            writable[...] = _bfloat16_bits(result) if writable.dtype == np.uint16 else result
    return out


def _check_layout(op: str, field: str, array: npt.NDArray[Any]) -> None:
    """Accept an array that can be written in place."""
    if not array.flags.c_contiguous:
        raise invalid(op, field, "must be C-contiguous", f"strides {array.strides}")
    if not array.flags.aligned:
        raise invalid(op, field, f"must be aligned for {array.dtype}", f"address {array.ctypes.data:#x}")
    if not array.flags.writeable:
        raise invalid(op, field, "must be writable", "a read-only array")
    if not array.dtype.isnative:
        raise invalid(op, field, "must be in native byte order", array.dtype.str)


def _bfloat16_bits(values: Float32Array) -> npt.NDArray[np.uint16]:
    """Round float32 values to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
