"""The rotation R, its inverse and the bare Walsh-Hadamard transform, on arrays in host memory."""

from __future__ import annotations

import numpy as np

from tq_hb import _core
from tq_hb.device import Device
from tq_hb.interop import Array, as_float32, copied, like
from tq_hb.options import check_head_dim, invalid
from tq_hb.staging import Staging


def _transform(op: str, kind: _core.Fwht, x: Array) -> Array:
    rows = as_float32(op, "x", x)
    if rows.ndim == 0:
        raise invalid(op, "x", "must have head_dim as its last axis", "a scalar")
    check_head_dim(op, rows.shape[-1])
    result = copied(op, "x", rows, np.float32)
    core = Device("cpu")._core
    staging, encoder = Staging(op, core), core.make_encoder()
    encoder.fwht(op, kind, staging.update("x", result))
    staging.run(encoder)
    return like(op, x, result)


def rotate(x: Array) -> Array:
    """R: signs, then a Walsh-Hadamard transform, scaled to keep the norm.

    Parameters
    ----------
    x : array, shape (..., head_dim)

    Returns
    -------
    float32 array of the same shape, in the library of ``x``.

    Examples
    --------
    >>> import numpy as np, tq_hb
    >>> x = np.random.default_rng(0).standard_normal((3, 256), np.float32)
    >>> bool(np.allclose(tq_hb.unrotate(tq_hb.rotate(x)), x, atol=1e-5))
    True
    """
    return _transform("rotate", _core.Fwht.PREMULT, x)


def unrotate(y: Array) -> Array:
    """Invert :func:`rotate`: a Walsh-Hadamard transform, then signs.

    >>> import numpy as np, tq_hb
    >>> y = np.zeros(256, np.float32)
    >>> y[0] = 16
    >>> bool(np.array_equal(tq_hb.unrotate(y), tq_hb.signs(256)))
    True
    """
    return _transform("unrotate", _core.Fwht.UNDO, y)


def fwht_sign_premult_f32(x: Array) -> Array:
    """Rotate queries before :func:`flash_attn_vec_tq_hb`: R of (..., head_dim), float32.

    >>> import numpy as np, tq_hb
    >>> x = np.ones((2, 256), np.float32)
    >>> bool(np.array_equal(tq_hb.fwht_sign_premult_f32(x), tq_hb.rotate(x)))
    True
    """
    return _transform("fwht_sign_premult_f32", _core.Fwht.PREMULT, x)


def fwht_sign_undo_f32(x: Array) -> Array:
    """Un-rotate the output of :func:`flash_attn_vec_tq_hb`: the inverse of R of (..., head_dim), float32.

    >>> import numpy as np, tq_hb
    >>> x = np.ones((2, 256), np.float32)
    >>> bool(np.array_equal(tq_hb.fwht_sign_undo_f32(x), tq_hb.unrotate(x)))
    True
    """
    return _transform("fwht_sign_undo_f32", _core.Fwht.UNDO, x)


def fwht_standalone_f32(x: Array) -> Array:
    """Walsh-Hadamard transform of (..., head_dim) without the signs, scaled to keep the norm; its own inverse.

    >>> import numpy as np, tq_hb
    >>> x = np.random.default_rng(0).standard_normal((3, 256), np.float32)
    >>> y = tq_hb.fwht_standalone_f32(x * tq_hb.signs(256))
    >>> bool(np.array_equal(y, tq_hb.rotate(x)))
    True
    """
    return _transform("fwht_standalone_f32", _core.Fwht.PLAIN, x)
