"""Attention over parts of a set of keys, put together."""

from __future__ import annotations

import numpy as np

from tq_hb.interop import Array, Float32Array, as_float32, like, result_dtype
from tq_hb.options import Allocating, invalid


def merge_states(o_a: Array, lse_a: Array, o_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Combine attention over two disjoint sets of keys into attention over both.

    The states are those that :meth:`tq_hb.KVCache.attend` returns with ``return_lse=True``, or any other attention's
    with a natural logarithm. Merging is computed in float64 and is associative up to rounding; an empty state, whose
    lse is -inf, leaves the other as it is, to the bit. Sinks must have entered one of the parts only.

    Parameters
    ----------
    o_a, o_b : array, shape (..., head_dim)
        Outputs.
    lse_a, lse_b : array, shape (...)
        Logarithms of the sums of exp(score): finite or -inf. Where it is -inf the output is not looked at.

    Returns
    -------
    o : array, shape (..., head_dim)
        In the library of ``o_a`` and in its floating dtype, if ``o_b`` has the same (float64 gives float32), else
        in float32. Zero where both states are empty.
    lse : float32 array, shape (...)

    Raises
    ------
    InvalidArgument
        If shapes do not match, or an lse is NaN or +inf.

    Examples
    --------
    A cache in two halves, as it might be on two devices:

    >>> import numpy as np, tq_hb
    >>> rng = np.random.default_rng(0)
    >>> k, v = rng.standard_normal((2, 100, 1, 256), np.float32)
    >>> q = rng.standard_normal((4, 256), np.float32)
    >>> whole, first, second = (tq_hb.KVCache(1, 256) for _ in range(3))
    >>> whole.append(k, v)
    >>> first.append(k[:60], v[:60])
    >>> second.append(k[60:], v[60:])
    >>> a = first.attend(q, q_offset=99, return_lse=True)  # the query stands 39 tokens beyond the first half
    >>> b = second.attend(q, return_lse=True)
    >>> o, lse = tq_hb.merge_states(*a, *b)
    >>> bool(np.allclose(o, whole.attend(q), atol=1e-3))
    True
    """
    op = "merge_states"
    rows_a, rows_b = as_float32(op, "o_a", o_a), as_float32(op, "o_b", o_b)
    if rows_a.ndim == 0:
        raise invalid(op, "o_a", "must have shape (..., head_dim)", rows_a.shape)
    if rows_b.shape != rows_a.shape:
        raise invalid(op, "o_b", f"must have the shape of o_a, {rows_a.shape}", rows_b.shape)
    logs_a = _check_lse(op, "lse_a", lse_a, rows_a.shape[:-1])
    logs_b = _check_lse(op, "lse_b", lse_b, rows_a.shape[:-1])
    dtypes = {result_dtype(op, "o_a", o_a), result_dtype(op, "o_b", o_b)}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    with Allocating(op, "the result"):
        merged, logs = _merge(rows_a, logs_a, rows_b, logs_b)
    return like(op, o_a, merged, dtype), like(op, o_a, logs)


def _check_lse(op: str, field: str, lse: Array, shape: tuple[int, ...]) -> Float32Array:
    logs = as_float32(op, field, lse)
    if logs.shape != shape:
        raise invalid(op, field, f"must have the leading shape of the outputs, {shape}", logs.shape)
    bad = logs[~(logs < np.inf)]  # NaN, too
    if bad.size:
        raise invalid(op, field, "must be finite or -inf", bad.flat[0])
    return logs


def _merge(
    rows_a: Float32Array, logs_a: Float32Array, rows_b: Float32Array, logs_b: Float32Array
) -> tuple[Float32Array, Float32Array]:
    empty_a, empty_b = logs_a == -np.inf, logs_b == -np.inf
    with np.errstate(all="ignore"):
        top = np.maximum(logs_a, logs_b).astype(np.float64)
        weight_a, weight_b = np.exp(logs_a - top), np.exp(logs_b - top)
        total = weight_a + weight_b
        rows = (weight_a / total)[..., None] * rows_a + (weight_b / total)[..., None] * rows_b
        merged, logs = rows.astype(np.float32), (top + np.log(total)).astype(np.float32)
    # Chosen, not computed: to the bit, and whatever is in the rows of an empty state.
    logs = np.where(empty_b, logs_a, np.where(empty_a, logs_b, logs))
    empty_a, empty_b = empty_a[..., None], empty_b[..., None]
    merged = np.where(empty_b, rows_a, np.where(empty_a, rows_b, merged))
    return np.where(empty_a & empty_b, np.float32(0), merged), logs
