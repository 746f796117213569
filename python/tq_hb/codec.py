"""The codec on arrays: codebooks, vectors into codes and norms and back, and the two layouts of codes."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tq_hb import _core
from tq_hb.device import Device, resolve_device
from tq_hb.interop import Array, Float32Array, Rows, as_codes, as_float32, as_rows, like, require_rows
from tq_hb.options import (
    CODEBOOKS,
    PACKINGS,
    Allocating,
    allocate,
    check_bits,
    check_bool,
    check_choice,
    check_format,
    check_head_dim,
    invalid,
    norms_shape,
)
from tq_hb.staging import Staging


def supported_bits() -> tuple[int, ...]:
    """Bits per value that a cache can have.

    >>> import tq_hb
    >>> tq_hb.supported_bits()
    (5, 6, 8)
    """
    return _core.supported_bits()


def supported_head_dims() -> tuple[int, ...]:
    """Head sizes that every op accepts.

    >>> import tq_hb
    >>> tq_hb.supported_head_dims()
    (64, 128, 256, 512)
    """
    return _core.supported_head_dims()


def codebook(bits: int, name: str = "lloyd_max") -> Float32Array:
    """Levels of a codebook: float32 (2**bits,), ascending.

    ``"lloyd_max"`` is the converged Lloyd-Max quantiser of N(0, 1); ``"mlx_native"`` holds the tables
    published with mlx-native, so that its caches stay readable.

    >>> import tq_hb
    >>> tq_hb.codebook(5).shape, float(tq_hb.codebook(5)[-1])
    ((32,), 3.260732412338257)
    """
    check_choice("codebook", "name", name, CODEBOOKS)
    return _core.codebook("codebook", check_bits("codebook", "bits", bits), name)[0]


def boundaries(bits: int, name: str = "lloyd_max") -> Float32Array:
    """Decision boundaries of a codebook: float32 (2**bits - 1,); a value on one takes the lower index.

    >>> import tq_hb
    >>> tq_hb.boundaries(8).shape
    (255,)
    """
    check_choice("boundaries", "name", name, CODEBOOKS)
    return _core.codebook("boundaries", check_bits("boundaries", "bits", bits), name)[1]


def signs(head_dim: int) -> Float32Array:
    """Signs of the rotation: float32 (head_dim,), +1 or -1.

    >>> import tq_hb
    >>> int((tq_hb.signs(256) < 0).sum())
    132
    """
    return _core.signs(_core.to_uint32("signs", "head_dim", head_dim))


def quantize(
    x: Array,
    bits: int,
    *,
    codebook: str = "lloyd_max",
    packing: str = "byte",
    device: str | Device | None = None,
) -> tuple[Array, Array]:
    """Rotate and quantise vectors.

    Parameters
    ----------
    x : array, shape (..., head_dim)
    bits : 5, 6 or 8
    packing : "byte" or "plane"
        A byte for every code, or 5 and 6 bits in 5 and 6 bits.

    Returns
    -------
    codes : uint8 (..., head_dim), or (..., head_dim * bits // 8) with ``packing="plane"``
    norms : float32 (...), or (..., 2) for head_dim 512

    Raises
    ------
    InvalidArgument
        If a value is not finite, or the sum of a vector's squares does not fit in float32.

    Examples
    --------
    >>> import numpy as np, tq_hb
    >>> codes, norms = tq_hb.quantize(np.ones((3, 256), np.float32), 6)
    >>> codes.shape, codes.dtype.name, norms.tolist()
    ((3, 256), 'uint8', [16.0, 16.0, 16.0])
    >>> tq_hb.quantize(np.ones((3, 256), np.float32), 6, packing="plane")[0].shape
    (3, 192)
    """
    op = "quantize"
    check_format(op, codebook, packing)
    bits = check_bits(op, "bits", bits)
    core = resolve_device(op, device)._core
    rows = as_rows(op, "x", x, core)
    if rows.ndim == 0:
        raise invalid(op, "x", "must have head_dim as its last axis", "a scalar")
    lead, head_dim = rows.shape[:-1], check_head_dim(op, rows.shape[-1])
    count = math.prod(lead)
    staging = Staging(op, core, beside=x)
    row_bytes = _core.row_bytes(packing, bits, head_dim)
    codes, norms = staging.allocate((*lead, row_bytes), "uint8"), staging.allocate(norms_shape(lead, head_dim))
    if count > 0:
        _require_rows(op, rows)
        hp = _core.HadamardQuantizeKvHbParams(
            head_dim=head_dim, num_kv_heads=1, write_pos=0, cache_capacity=count, codebook_bits=bits
        )
        encoder = staging.make_encoder()
        target = (
            "",
            staging.read("x", rows.reshape((count, 1, head_dim))),
            staging.fill("codes", codes).reshape((1, count, row_bytes)),
            staging.fill("norms", norms).reshape((1, *norms_shape((count,), head_dim))),
            bits,
        )
        encoder.hadamard_quantize(op, hp, [target], codebook, packing)
        staging.run(encoder)
    return staging.hand_over(x, codes, "uint8"), staging.hand_over(x, norms)


def _require_rows(op: str, rows: Rows) -> None:
    """Raise if a row of x cannot be encoded, saying where along the caller's axes it is. On a GPU the kernels look."""
    if isinstance(rows, _core.Buffer) or not _is_bad(rows):
        return
    index: tuple[int, ...] = ()
    for size in rows.shape[:-1]:
        # Another thread may have mended it meanwhile.
        index += (next((i for i in range(size) if _is_bad(rows[(*index, i)])), 0),)
    name = f"x[{', '.join(map(str, index))}]" if index else "x"
    raise invalid(op, name, "must be finite with a squared norm that fits in float32", "a bad row")


def _is_bad(rows: Float32Array) -> bool:
    try:
        require_rows("quantize", "x", rows.reshape((-1, 1, rows.shape[-1])))
    except _core.InvalidArgument:
        return True
    return False


def dequantize(
    codes: Array,
    norms: Array,
    bits: int,
    *,
    head_dim: int,
    codebook: str = "lloyd_max",
    packing: str = "byte",
    rotated: bool = False,
    scale_factor_d512: float = 1.0,
) -> Array:
    """Rebuild vectors from codes and norms.

    Parameters
    ----------
    codes : uint8 (..., head_dim), or (..., head_dim * bits // 8) with ``packing="plane"``
    norms : float32 (...), or (..., 2) for head_dim 512
    rotated : bool
        Leave the vectors rotated, as the attention op reads them.

    Returns
    -------
    float32 (..., head_dim), in the library of ``codes``.

    Examples
    --------
    >>> import numpy as np, tq_hb
    >>> x = np.random.default_rng(0).standard_normal((4, 256), np.float32)
    >>> y = tq_hb.dequantize(*tq_hb.quantize(x, 8), 8, head_dim=256)
    >>> bool(((x - y) ** 2).sum() / (x**2).sum() < 5e-5)
    True
    """
    op = "dequantize"
    check_format(op, codebook, packing)
    check_bool(op, "rotated", rotated)
    bits = check_bits(op, "bits", bits)
    head_dim = check_head_dim(op, head_dim)
    code_rows, norm_rows = as_codes(op, "codes", codes), as_float32(op, "norms", norms)
    lead = _leading_shape(op, code_rows, packing, bits, head_dim)
    if norm_rows.shape != norms_shape(lead, head_dim):
        raise invalid(op, "norms", f"must have shape {norms_shape(lead, head_dim)}", norm_rows.shape)
    count = math.prod(lead)
    result = allocate(op, "the result", (count, 1, head_dim))
    hp = _core.HadamardQuantizeKvHbParams(
        head_dim=head_dim,
        num_kv_heads=1,
        write_pos=0,
        cache_capacity=max(count, 1),
        codebook_bits=bits,
        scale_factor_d512=_core.to_float32(op, "scale_factor_d512", scale_factor_d512),
    )
    hp.validate(op)
    if count > 0:
        core = Device("cpu")._core
        staging, encoder = Staging(op, core), core.make_encoder()
        out = staging.fill("out", result)
        encoder.dequantize(
            op,
            hp,
            0,
            staging.read("codes", code_rows.reshape(1, count, -1)),
            staging.read("norms", norm_rows.reshape(1, *norms_shape((count,), head_dim))),
            out,
            codebook,
            packing,
        )
        if not rotated:
            encoder.memory_barrier()
            encoder.fwht(op, _core.Fwht.UNDO, out)
        staging.run(encoder)
    return like(op, codes, result.reshape(*lead, head_dim))


def _leading_shape(op: str, codes: npt.NDArray[np.uint8], packing: str, bits: int, head_dim: int) -> tuple[int, ...]:
    """Return the shape of the vectors whose codes these are, without their own axis."""
    row_bytes = _core.row_bytes(packing, bits, head_dim)
    if codes.ndim == 0 or codes.shape[-1] != row_bytes:
        rule = f'must have {row_bytes} bytes (head_dim {head_dim}, {bits} bits, packing="{packing}") as its last axis'
        raise invalid(op, "codes", rule, codes.shape)
    return codes.shape[:-1]


def convert_packing(codes: Array, bits: int, *, head_dim: int, source: str, target: str) -> Array:
    """Lay codes out otherwise: ``"byte"`` has a byte for every code, ``"plane"`` 5 and 6 bits in 5 and 6 bits.

    Norms are the same in both, and so are the results of every op. With 8 bits the layouts are one.

    Parameters
    ----------
    codes : uint8 (..., head_dim) where ``source`` is "byte", (..., head_dim * bits // 8) where it is "plane"
        Of a byte only the low ``bits`` bits count, as in every op.
    bits : 5, 6 or 8
    source, target : "byte" or "plane"

    Returns
    -------
    uint8 (..., head_dim) or (..., head_dim * bits // 8), a new array in the library of ``codes``.

    Raises
    ------
    InvalidArgument
        If an argument breaks a rule.

    Examples
    --------
    >>> import numpy as np, tq_hb
    >>> x = np.random.default_rng(0).standard_normal((3, 256), np.float32)
    >>> codes, norms = tq_hb.quantize(x, 5)
    >>> planes = tq_hb.convert_packing(codes, 5, head_dim=256, source="byte", target="plane")
    >>> planes.shape, bool((planes == tq_hb.quantize(x, 5, packing="plane")[0]).all())
    ((3, 160), True)
    >>> back = tq_hb.convert_packing(planes, 5, head_dim=256, source="plane", target="byte")
    >>> bool((back == codes).all())
    True
    """
    op = "convert_packing"
    bits = check_bits(op, "bits", bits)
    head_dim = check_head_dim(op, head_dim)
    check_choice(op, "source", source, PACKINGS)
    check_choice(op, "target", target, PACKINGS)
    rows = as_codes(op, "codes", codes)
    lead = _leading_shape(op, rows, source, bits, head_dim)
    flat = rows.reshape(math.prod(lead), rows.shape[-1])
    with Allocating(op, "the result"):
        converted = _core.convert_packing(op, flat, bits, head_dim, source, target)
    return like(op, codes, converted.reshape(*lead, converted.shape[-1]), "uint8")
