"""The reference system's ops on arrays, synchronously.

Arrays are checked and borrowed by :mod:`tq_hb.interop`, scalars and shapes by the core. Host values
that cannot be used raise before anything is written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tq_hb import _core
from tq_hb.device import Device, resolve_device
from tq_hb.gpu_arrays import is_on_gpu
from tq_hb.interop import (
    Array,
    as_code_rows,
    as_out,
    as_rows,
    as_writable_rows,
    check_sinks,
    require_disjoint,
    require_queries,
    require_rows,
)
from tq_hb.options import check_bits, check_format, check_params, invalid
from tq_hb.staging import Staging


def hadamard_quantize_kv_hb(
    src: Array,
    packed: Array,
    norms: Array,
    hp: _core.HadamardQuantizeKvHbParams,
    *,
    codebook: str = "lloyd_max",
    packing: str = "byte",
    device: str | Device | None = None,
) -> None:
    """Encode one token or a run of tokens into a cache, in place.

    A GPU copies a cache that is not its own buffer or made by :func:`tq_hb.empty`, whole, there and back.

    Parameters
    ----------
    src : array, shape (num_kv_heads, head_dim) or (tokens, num_kv_heads, head_dim)
        Not rotated. Of a run longer than a ring only the newest ``cache_capacity`` tokens are kept.
    packed : uint8 (num_kv_heads, cache_capacity, row_bytes)
        ``row_bytes`` is head_dim, or ``head_dim * bits // 8`` with ``packing="plane"``.
    norms : float32 (num_kv_heads, cache_capacity), or (num_kv_heads, cache_capacity, 2) for head_dim 512
    hp : HadamardQuantizeKvHbParams
        Token t goes to slot ``write_pos + t``, modulo ``cache_capacity`` when ``is_sliding`` is 1.

    Raises
    ------
    InvalidArgument
        If an argument breaks a rule or ``src`` cannot be encoded; nothing is written then.

    Examples
    --------
    >>> import numpy as np, tq_hb
    >>> packed, norms = np.zeros((2, 8, 256), np.uint8), np.zeros((2, 8), np.float32)
    >>> hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=2, write_pos=3, cache_capacity=8)
    >>> tq_hb.hadamard_quantize_kv_hb(np.ones((2, 256), np.float32), packed, norms, hp)
    >>> norms[:, 3].tolist()
    [16.0, 16.0]
    """
    op = "hadamard_quantize_kv_hb"
    check_params(op, "hp", hp, _core.HadamardQuantizeKvHbParams)
    targets = [("src", src, "packed", packed, "norms", norms, hp.codebook_bits, "")]
    _quantize(op, targets, hp, codebook, packing, device)


def hadamard_quantize_kv_hb_dual(
    src_k: Array,
    src_v: Array,
    k_packed: Array,
    v_packed: Array,
    k_norms: Array,
    v_norms: Array,
    hp: _core.HadamardQuantizeKvHbParams,
    *,
    v_bits: int | None = None,
    codebook: str = "lloyd_max",
    packing: str = "byte",
    device: str | Device | None = None,
) -> None:
    """Encode K and V together; the same bytes as two calls of :func:`hadamard_quantize_kv_hb`.

    ``v_bits`` is the width of V where it differs from ``hp.codebook_bits``. Shapes and errors are those of
    the single form; nothing of either is written if one cannot be encoded.

    >>> import numpy as np, tq_hb
    >>> k_packed, v_packed = np.zeros((2, 1, 4, 256), np.uint8)
    >>> k_norms, v_norms = np.zeros((2, 1, 4), np.float32)
    >>> hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=0, cache_capacity=4)
    >>> k, v = np.ones((2, 1, 256), np.float32)
    >>> tq_hb.hadamard_quantize_kv_hb_dual(k, v, k_packed, v_packed, k_norms, v_norms, hp, v_bits=5)
    >>> int(v_packed.max()) < 32
    True
    """
    op = "hadamard_quantize_kv_hb_dual"
    check_params(op, "hp", hp, _core.HadamardQuantizeKvHbParams)
    bits = hp.codebook_bits if v_bits is None else check_bits(op, "v_bits", v_bits)
    targets = [
        ("src_k", src_k, "k_packed", k_packed, "k_norms", k_norms, hp.codebook_bits, "k"),
        ("src_v", src_v, "v_packed", v_packed, "v_norms", v_norms, bits, "v"),
    ]
    _quantize(op, targets, hp, codebook, packing, device)


def _quantize(
    op: str,
    targets: list[tuple[str, Array, str, Array, str, Array, int, str]],
    hp: _core.HadamardQuantizeKvHbParams,
    codebook: str,
    packing: str,
    device: str | Device | None,
) -> None:
    check_format(op, codebook, packing)
    core = resolve_device(op, device)._core
    staging = Staging(op, core, beside=targets[0][1])
    encoder = staging.make_encoder()
    staged = []
    sources = []
    written: list[tuple[str, npt.NDArray[Any]]] = []
    for src_name, src, packed_name, packed, norms_name, norms, bits, key in targets:
        rows = as_rows(op, src_name, src, core)
        codes_out = as_writable_rows(op, packed_name, packed, np.uint8, core)
        norms_out = as_writable_rows(op, norms_name, norms, np.float32, core)
        sources.append((src_name, src, rows))
        written += [(n, x) for n, x in ((packed_name, codes_out), (norms_name, norms_out)) if isinstance(x, np.ndarray)]
        staged.append(
            (
                key,
                staging.read(src_name, rows),
                staging.update(packed_name, codes_out),
                staging.update(norms_name, norms_out),
                bits,
            )
        )
    encoder.hadamard_quantize(op, hp, staged, codebook, packing)
    # The core compares the buffers that it was given, which may be copies of the host's arrays.
    for i, (name, array) in enumerate(written):
        for other_name, other in [*((src_name, src) for src_name, src, _ in sources), *written[:i]]:
            require_disjoint(op, name, array, other_name, other)
    for src_name, _, rows in sources:
        require_rows(op, src_name, rows)
    staging.run(encoder)


def tq_dequantize_hb_kv(
    packed: Array,
    norms: Array,
    hp: _core.HadamardQuantizeKvHbParams,
    *,
    pos: int,
    codebook: str = "lloyd_max",
    packing: str = "byte",
    device: str | Device | None = None,
) -> Array:
    """Rebuild one position of a cache, still rotated.

    Parameters
    ----------
    packed : uint8 (num_kv_heads, cache_capacity, row_bytes)
        ``row_bytes`` is head_dim, or ``head_dim * bits // 8`` with ``packing="plane"``.
    norms : float32 (num_kv_heads, cache_capacity), or (num_kv_heads, cache_capacity, 2) for head_dim 512
    pos : int
        Slot ``pos``, or ``pos`` modulo ``cache_capacity`` when ``hp.is_sliding`` is 1.

    Returns
    -------
    float32 (num_kv_heads, head_dim), in the library of ``packed``.

    Examples
    --------
    >>> import numpy as np, tq_hb
    >>> packed, norms = np.zeros((1, 4, 256), np.uint8), np.zeros((1, 4), np.float32)
    >>> hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=2, cache_capacity=4)
    >>> x = np.ones((1, 256), np.float32)
    >>> tq_hb.hadamard_quantize_kv_hb(x, packed, norms, hp)
    >>> y = tq_hb.unrotate(tq_hb.tq_dequantize_hb_kv(packed, norms, hp, pos=2))
    >>> bool(np.abs(y - x).max() < 0.1)
    True
    """
    op = "tq_dequantize_hb_kv"
    check_format(op, codebook, packing)
    position = _core.to_uint32(op, "pos", pos)
    check_params(op, "hp", hp, _core.HadamardQuantizeKvHbParams)
    hp.validate(op)
    core = resolve_device(op, device)._core
    codes = as_code_rows(op, "packed", packed, core)
    if codes.shape[:1] != (hp.num_kv_heads,):  # before that many rows are allocated
        raise invalid(op, "packed", f"must hold num_kv_heads {hp.num_kv_heads} heads", codes.shape)
    staging = Staging(op, core, beside=packed)
    result = staging.allocate((hp.num_kv_heads, hp.head_dim))
    encoder = staging.make_encoder()
    encoder.dequantize(
        op,
        hp,
        position,
        staging.read("packed", codes),
        staging.read("norms", as_rows(op, "norms", norms, core)),
        staging.fill("out", result).reshape((1, hp.num_kv_heads, hp.head_dim)),
        codebook,
        packing,
    )
    staging.run(encoder)
    return staging.hand_over(packed, result)


def tmp_buffer_bytes(num_heads: int, head_dim: int, *, num_queries: int = 1, splits: int = 32) -> int:
    """Bytes of working storage that a recorded attention call needs for its partial results.

    ``num_queries * num_heads * splits * (head_dim + 2) * 4``: the output, the maximum and the sum of each split.

    >>> import tq_hb
    >>> tq_hb.tmp_buffer_bytes(16, 256)
    528384
    """
    op = "tmp_buffer_bytes"
    return _core.tmp_buffer_bytes(
        _core.to_uint32(op, "num_heads", num_heads),
        _core.to_uint32(op, "head_dim", head_dim),
        _core.to_uint32(op, "num_queries", num_queries),
        _core.to_uint32(op, "splits", splits),
    )


def flash_attn_vec_tq_hb(
    q: Array,
    k_packed: Array,
    k_norms: Array,
    v_packed: Array,
    v_norms: Array,
    p: _core.FlashAttnVecTqHbParams,
    *,
    nwg: int | None = None,
    v_bits: int | None = None,
    codebook: str = "lloyd_max",
    packing: str = "byte",
    sinks: Array | None = None,
    precision: str = "default",
    return_lse: bool = False,
    out: Array | None = None,
    device: str | Device | None = None,
) -> Array | tuple[Array, Array]:
    """Attend the newest query tokens to a quantised cache; the output stays rotated.

    The last query is the newest token that the cache holds, the others are those before it. Each sees the keys up to
    and including its own, of which only the newest ``p.sliding_window`` where ``p.mask_type`` is 2.

    Parameters
    ----------
    q : array, shape (num_heads, head_dim) or (queries, num_heads, head_dim)
        Rotated by :func:`fwht_sign_premult_f32`, unless ``p.fuse_fwht_pre`` is 1. At most ``p.kv_seq_len`` queries.
    k_packed, v_packed : uint8 (num_kv_heads, kv_capacity, row_bytes)
        ``row_bytes`` is head_dim, or ``head_dim * bits // 8`` with ``packing="plane"``.
    k_norms, v_norms : float32 (num_kv_heads, kv_capacity), or (num_kv_heads, kv_capacity, 2) for head_dim 512
        Trusted as they are: a NaN among the norms of visible slots shows in the output.
    p : FlashAttnVecTqHbParams
    nwg : int, optional
        Workgroups per head and query, 1 to 32; :mod:`tq_hb.policy` chooses otherwise.
    v_bits : int, optional
        Width of V where it differs from ``p.codebook_bits``.
    sinks : array, shape (num_heads,), optional
        One more logit per head in the softmax's denominator, as it is: neither scaled nor capped. -inf for none.
    precision : "default" or "strict"
        Accuracy class: relative L2 error against float64 attention on the same codes of at most 5e-4 while scores
        have a standard deviation of at most 4, or of 1e-5. A backend whose fast path is strict uses it for both.
    return_lse : bool
        Whether to return the logarithm of the softmax's denominator too.
    out : float32 array, optional
        Where the result is written; the shape of ``q``.

    Returns
    -------
    out : float32 array of the shape of ``q``, in its library
    lse : float32 (num_heads,) or (queries, num_heads), only with ``return_lse``
        Natural logarithm of the sum of exp(logit) after scale and softcap, the sink included.

    Raises
    ------
    InvalidArgument
        If an argument breaks a rule, q is not finite, or a sink is NaN or +inf.

    Examples
    --------
    >>> import numpy as np, tq_hb
    >>> k, v = np.random.default_rng(0).standard_normal((2, 1, 40, 256), np.float32)
    >>> p = tq_hb.FlashAttnVecTqHbParams(num_heads=2, num_kv_heads=1, head_dim=256, kv_seq_len=40,
    ...     kv_capacity=40, scale=0.0625)
    >>> q = tq_hb.rotate(np.ones((2, 256), np.float32))
    >>> cache = *tq_hb.quantize(k, 8), *tq_hb.quantize(v, 8)
    >>> o = tq_hb.flash_attn_vec_tq_hb(q, *cache, p)
    >>> o.shape
    (2, 256)
    >>> o, lse = tq_hb.flash_attn_vec_tq_hb(np.stack([q, q, q]), *cache, p, return_lse=True)
    >>> o.shape, lse.shape
    ((3, 2, 256), (3, 2))
    """
    return _attend(
        "flash_attn_vec_tq_hb", False, q, k_packed, k_norms, v_packed, v_norms, p, out, device,
        nwg=nwg, v_bits=v_bits, codebook=codebook, packing=packing, sinks=sinks, precision=precision,
        return_lse=return_lse,
    )  # fmt: skip


def flash_attn_vec_tq_hb_with_fused_undo(
    q: Array,
    k_packed: Array,
    k_norms: Array,
    v_packed: Array,
    v_norms: Array,
    p: _core.FlashAttnVecTqHbParams,
    *,
    nwg: int | None = None,
    v_bits: int | None = None,
    codebook: str = "lloyd_max",
    packing: str = "byte",
    sinks: Array | None = None,
    precision: str = "default",
    return_lse: bool = False,
    out: Array | None = None,
    device: str | Device | None = None,
) -> Array | tuple[Array, Array]:
    """Attend as :func:`flash_attn_vec_tq_hb` does, with the output already un-rotated.

    >>> import numpy as np, tq_hb
    >>> k, v = np.random.default_rng(0).standard_normal((2, 1, 40, 256), np.float32)
    >>> p = tq_hb.FlashAttnVecTqHbParams(num_heads=2, num_kv_heads=1, head_dim=256, kv_seq_len=40,
    ...     kv_capacity=40, scale=0.0, fuse_fwht_pre=1)
    >>> cache = *tq_hb.quantize(k, 8), *tq_hb.quantize(v, 8)
    >>> o = tq_hb.flash_attn_vec_tq_hb_with_fused_undo(np.ones((2, 256), np.float32), *cache, p)
    >>> bool(np.abs(o - v[0].mean(axis=0)).max() < 0.01)
    True
    """
    return _attend(
        "flash_attn_vec_tq_hb_with_fused_undo", True, q, k_packed, k_norms, v_packed, v_norms, p, out, device,
        nwg=nwg, v_bits=v_bits, codebook=codebook, packing=packing, sinks=sinks, precision=precision,
        return_lse=return_lse,
    )  # fmt: skip


def _attend(
    op: str,
    fused_undo: bool,
    q: Array,
    k_packed: Array,
    k_norms: Array,
    v_packed: Array,
    v_norms: Array,
    p: _core.FlashAttnVecTqHbParams,
    out: Array | None,
    device: str | Device | None,
    *,
    sinks: Array | None,
    return_lse: bool,
    **options: Any,
) -> Array | tuple[Array, Array]:
    dev = resolve_device(op, device)
    core = dev._core
    rows = as_rows(op, "q", q, core)
    check_params(op, "p", p, _core.FlashAttnVecTqHbParams)
    p.validate(op)
    if rows.ndim not in (2, 3) or rows.shape[-2:] != (p.num_heads, p.head_dim):
        shape = f"({p.num_heads}, {p.head_dim})"
        raise invalid(op, "q", f"must have shape {shape} or (queries, {shape[1:]}", rows.shape)
    inputs = {"q": q, "k_packed": k_packed, "k_norms": k_norms, "v_packed": v_packed, "v_norms": v_norms}
    if sinks is not None:
        inputs["sinks"] = sinks
    writable = None
    if out is not None:
        if is_on_gpu(out):
            writable = as_writable_rows(op, "out", out, np.float32, core)
            if writable.shape != rows.shape:
                raise invalid(op, "out", f"must have shape {rows.shape}", writable.shape)
        else:
            writable = as_out(op, out, rows.shape, "float32")
            for name, x in inputs.items():
                require_disjoint(op, "out", writable, name, x)
    staging = Staging(op, core, beside=q)
    result = staging.allocate(rows.shape) if writable is None else writable
    lse = staging.allocate(rows.shape[:-1])
    encoder = dev.encoder(stream=staging.stream)
    record = encoder.flash_attn_vec_tq_hb_with_fused_undo if fused_undo else encoder.flash_attn_vec_tq_hb
    record(
        staging.read("q", rows),
        staging.read("k_packed", as_code_rows(op, "k_packed", k_packed, core)),
        staging.read("k_norms", as_rows(op, "k_norms", k_norms, core)),
        staging.read("v_packed", as_code_rows(op, "v_packed", v_packed, core)),
        staging.read("v_norms", as_rows(op, "v_norms", v_norms, core)),
        staging.fill("out", result),
        None,
        p,
        sinks=None
        if sinks is None
        else staging.read("sinks", sinks if is_on_gpu(sinks) else check_sinks(op, sinks, p.num_heads)),
        lse=staging.fill("lse", lse) if return_lse else None,
        return_lse=return_lse,
        **options,
    )
    require_queries(op, rows)
    staging.run(encoder._core)
    attended = staging.hand_over(q, result) if out is None else out
    return (attended, staging.hand_over(q, lse)) if return_lse else attended
