"""KVCache: the K and V of one attention layer, held quantised and attended to as they are."""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tq_hb import _core, policy
from tq_hb.device import Device, resolve_device
from tq_hb.encoder import Buffer
from tq_hb.interop import (
    Array,
    Float32Array,
    as_float32,
    as_out,
    finish,
    require_disjoint,
    require_rows,
    result_dtype,
)
from tq_hb.options import (
    check_attention,
    check_bits,
    check_format,
    check_head_dim,
    check_precision,
    invalid,
    norms_shape,
    unsupported,
)
from tq_hb.staging import Staging

_MIN_GROWTH = 64


_caches: weakref.WeakSet[KVCache] = weakref.WeakSet()


def _renew_locks() -> None:
    """Give a forked child's caches new locks: the thread that held an old one is not there to release it."""
    for cache in _caches:
        cache._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


@dataclass(frozen=True)
class Plan:
    """What served an attention call.

    ``nsg`` are the SIMD groups per threadgroup; ``nwg`` the workgroups per head, or the splits of the keys
    where a kernel serves the query heads of a group together.

    >>> import numpy as np, tq_hb
    >>> cache = tq_hb.KVCache(1, 256)
    >>> cache.append(np.ones((1, 256), np.float32), np.ones((1, 256), np.float32))
    >>> _ = cache.attend(np.ones((1, 256), np.float32))
    >>> cache.last_plan.kernels
    ('flash_attn_vec_tq_hb_dk256', 'flash_attn_vec_reduce_tq_hb_undo_dk256')
    """

    backend: str
    kernels: tuple[str, ...]
    nsg: int
    nwg: int
    precision: str
    threadgroup_bytes: int


@dataclass(frozen=True)
class _Side:
    """K or V: codes (num_kv_heads, capacity, head_dim) and norms."""

    packed: Buffer
    norms: Buffer
    bits: int


class KVCache:
    """Keys and values of one layer at 5, 6 or 8 bits per value, one norm per vector.

    Parameters
    ----------
    num_kv_heads : int
    head_dim : int
        One of :func:`tq_hb.supported_head_dims`.
    capacity : int, optional
        Tokens that fit. None grows by doubling, or takes ``sliding_window`` if that is set.
    k_bits, v_bits : 5, 6 or 8
    sliding_window : int, optional
        Makes the cache a ring in which a query sees the newest ``sliding_window`` tokens.
    codebook : "lloyd_max" or "mlx_native"
    packing : "byte"
        One byte per code at every width.
    precision : "default" or "strict"
    device : str or Device, optional

    Raises
    ------
    InvalidArgument
        If an argument breaks a rule.
    UnsupportedError
        For ``packing="plane"``, ``k_mean`` and head sizes that no backend serves yet.

    Examples
    --------
    >>> import numpy as np, tq_hb
    >>> rng = np.random.default_rng(0)
    >>> cache = tq_hb.KVCache(num_kv_heads=2, head_dim=256, k_bits=8, v_bits=6)
    >>> k, v = rng.standard_normal((2, 100, 2, 256), np.float32)
    >>> cache.append(k, v)
    >>> out = cache.attend(rng.standard_normal((8, 256), np.float32))
    >>> out.shape, len(cache), cache.bytes_per_token
    ((8, 256), 100, 1040)
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        capacity: int | None = None,
        *,
        k_bits: int = 8,
        v_bits: int = 8,
        sliding_window: int | None = None,
        codebook: str = "lloyd_max",
        packing: str = "byte",
        k_mean: Array | None = None,
        precision: str = "default",
        device: str | Device | None = None,
    ) -> None:
        op = "KVCache"
        self._num_kv_heads = _positive(op, "num_kv_heads", num_kv_heads)
        self._head_dim = check_head_dim(op, head_dim)
        self._window = None if sliding_window is None else _positive(op, "sliding_window", sliding_window)
        self._grows = capacity is None and self._window is None
        fixed = self._window if capacity is None else _positive(op, "capacity", capacity)
        if self._window is not None and fixed is not None and fixed < self._window:
            raise invalid(op, "capacity", f"must be >= sliding_window {self._window}", fixed)
        self._k_bits = check_bits(op, "k_bits", k_bits)
        self._v_bits = check_bits(op, "v_bits", v_bits)
        check_format(op, codebook, packing)
        check_precision(op, precision)
        if k_mean is not None:
            raise unsupported(op, "k_mean")
        self._codebook, self._packing, self._precision = codebook, packing, precision
        self._device = resolve_device(op, device)
        self._lock = threading.RLock()
        _caches.add(self)
        self._len = self._offset = 0
        self._last_plan: Plan | None = None
        self._allocate(fixed or 0)

    def _allocate(self, capacity: int) -> None:
        codes = (self._num_kv_heads, capacity, self._head_dim)
        norms = norms_shape(codes[:2], self._head_dim)
        empty = self._device.empty
        # Allocated before anything is replaced: a cache that cannot grow stays as it was.
        k = _Side(empty(codes, np.uint8), empty(norms), self._k_bits)
        v = _Side(empty(codes, np.uint8), empty(norms), self._v_bits)
        self._k, self._v, self._capacity = k, v, capacity

    # -- what it is ------------------------------------------------------------------------------------

    @property
    def num_kv_heads(self) -> int:
        """Heads of K and V.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256).num_kv_heads
        8
        """
        return self._num_kv_heads

    @property
    def head_dim(self) -> int:
        """Values per head.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256).head_dim
        256
        """
        return self._head_dim

    @property
    def k_bits(self) -> int:
        """Bits per value of K.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256, v_bits=5).k_bits
        8
        """
        return self._k_bits

    @property
    def v_bits(self) -> int:
        """Bits per value of V.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256, v_bits=5).v_bits
        5
        """
        return self._v_bits

    @property
    def sliding_window(self) -> int | None:
        """Newest tokens that a query sees; None for all.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256, sliding_window=512).sliding_window
        512
        """
        return self._window

    @property
    def codebook(self) -> str:
        """Name of the codebook.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256).codebook
        'lloyd_max'
        """
        return self._codebook

    @property
    def packing(self) -> str:
        """How codes are laid out in bytes.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256, k_bits=5).packing
        'byte'
        """
        return self._packing

    @property
    def precision(self) -> str:
        """Accuracy class asked for.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256, precision="strict").precision
        'strict'
        """
        return self._precision

    @property
    def device(self) -> Device:
        """Where it lives.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256, device="cpu").device.backend
        'cpu'
        """
        return self._device

    @property
    def capacity(self) -> int:
        """Tokens that fit into the memory allocated now.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256, 1024).capacity, tq_hb.KVCache(8, 256).capacity
        (1024, 0)
        """
        return self._capacity

    @property
    def offset(self) -> int:
        """Tokens seen: the position of the next one.

        >>> import numpy as np, tq_hb
        >>> cache = tq_hb.KVCache(1, 256, sliding_window=4)
        >>> cache.append(np.ones((6, 1, 256), np.float32), np.ones((6, 1, 256), np.float32))
        >>> cache.offset, len(cache)
        (6, 4)
        """
        return self._offset

    def __len__(self) -> int:
        return self._len

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes: codes and norms of K and V, all heads.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256).bytes_per_token  # 2 * 8 * (256 + 4)
        4160
        """
        return self._num_kv_heads * 2 * (self._head_dim + 4 * _core.norms_per_row(self._head_dim))

    @property
    def nbytes(self) -> int:
        """Bytes allocated.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256, 1024).nbytes  # 1024 * 4160
        4259840
        """
        return sum(side.packed.nbytes + side.norms.nbytes for side in (self._k, self._v))

    @property
    def last_plan(self) -> Plan | None:
        """What served the last :meth:`attend`; None before the first.

        >>> import numpy as np, tq_hb
        >>> cache = tq_hb.KVCache(1, 256, device="cpu")
        >>> cache.append(np.ones((1, 256), np.float32), np.ones((1, 256), np.float32))
        >>> _ = cache.attend(np.ones((4, 256), np.float32))
        >>> cache.last_plan.backend, len(cache.last_plan.kernels)
        ('cpu', 2)
        """
        return self._last_plan

    def __repr__(self) -> str:
        return (
            f"KVCache(num_kv_heads={self._num_kv_heads}, head_dim={self._head_dim}, capacity={self._capacity}, "
            f"k_bits={self._k_bits}, v_bits={self._v_bits}, sliding_window={self._window}, len={self._len}, "
            f"offset={self._offset}, device={self._device.backend!r})"
        )

    # -- writing ---------------------------------------------------------------------------------------

    def append(self, k: Array, v: Array) -> None:
        """Rotate, quantise and write new tokens.

        Parameters
        ----------
        k, v : array, shape (tokens, num_kv_heads, head_dim) or (num_kv_heads, head_dim)
            Not rotated. Zero tokens are accepted and change nothing.

        Raises
        ------
        InvalidArgument
            If they do not fit, or a value is not finite, or a norm overflows; the cache is unchanged then.

        Examples
        --------
        >>> import numpy as np, tq_hb
        >>> cache = tq_hb.KVCache(1, 256, sliding_window=4)
        >>> cache.append(np.ones((6, 1, 256), np.float32), np.ones((6, 1, 256), np.float32))
        >>> len(cache), cache.offset
        (4, 6)
        """
        op = "KVCache.append"
        rows_k, rows_v = self._rows(op, "k", k), self._rows(op, "v", v)
        if rows_k.shape != rows_v.shape:
            raise invalid(op, "v", f"must have the shape of k, {rows_k.shape}", rows_v.shape)
        tokens = len(rows_k)
        if tokens == 0:
            return
        require_rows(op, "k", rows_k)
        require_rows(op, "v", rows_v)
        with self._lock:
            if self._window is None:
                self._make_room(op, self._offset + tokens)
            hp = self._encoder_params(self._offset % self._capacity if self._window else self._offset)
            staging, encoder = self._start(op)
            targets = [
                (key, staging.read(key, rows), side.packed, side.norms, side.bits)
                for key, rows, side in (("k", rows_k, self._k), ("v", rows_v, self._v))
            ]
            encoder.hadamard_quantize(op, hp, targets, self._codebook)
            staging.run(encoder)
            self._offset += tokens
            self._len = min(self._len + tokens, self._capacity)

    def _start(self, op: str) -> tuple[Staging, _core.CommandEncoder]:
        core = self._device._core
        return Staging(op, core), core.make_encoder()

    def _rows(self, op: str, field: str, x: Array) -> Float32Array:
        rows = as_float32(op, field, x)
        if rows.ndim == 2:
            rows = rows[None]
        if rows.ndim != 3 or rows.shape[1:] != (self._num_kv_heads, self._head_dim):
            shape = f"({self._num_kv_heads}, {self._head_dim})"
            raise invalid(op, field, f"must have shape {shape} or (tokens, {shape[1:]}", rows.shape)
        return rows

    def _encoder_params(self, position: int) -> _core.HadamardQuantizeKvHbParams:
        return _core.HadamardQuantizeKvHbParams(
            head_dim=self._head_dim,
            num_kv_heads=self._num_kv_heads,
            write_pos=position,
            cache_capacity=self._capacity,
            is_sliding=int(self._window is not None),
            codebook_bits=self._k_bits,
        )

    def _make_room(self, op: str, tokens: int) -> None:
        if tokens <= self._capacity:
            return
        if not self._grows:
            raise invalid(op, "tokens", f"must fit in the capacity of {self._capacity}", tokens)
        self._resize(max(tokens, 2 * self._capacity, _MIN_GROWTH))

    def _resize(self, capacity: int) -> None:
        """Move a linear cache into new memory."""
        old_k, old_v = self._k, self._v
        self._allocate(_core.to_uint32("KVCache", "capacity", capacity))
        for old, new in ((old_k, self._k), (old_v, self._v)):
            new.packed.numpy()[:, : self._len] = old.packed.numpy()[:, : self._len]
            new.norms.numpy()[:, : self._len] = old.norms.numpy()[:, : self._len]

    def reserve(self, n: int) -> None:
        """Make room for ``n`` tokens in all, so that appending up to there allocates nothing.

        >>> import tq_hb
        >>> cache = tq_hb.KVCache(1, 256)
        >>> cache.reserve(1000)
        >>> cache.capacity
        1000
        """
        tokens = _core.to_uint32("KVCache.reserve", "n", n)
        with self._lock:
            if tokens <= self._capacity:
                return
            if not self._grows:
                raise invalid("KVCache.reserve", "n", f"must be <= the capacity of {self._capacity}", tokens)
            self._resize(tokens)

    def trim(self, n: int) -> None:
        """Forget the newest ``n`` tokens.

        Raises
        ------
        InvalidArgument
            If fewer than ``n`` are held, or on a ring if tokens that the next query should see are gone.

        Examples
        --------
        >>> import numpy as np, tq_hb
        >>> cache = tq_hb.KVCache(1, 256)
        >>> cache.append(np.ones((6, 1, 256), np.float32), np.ones((6, 1, 256), np.float32))
        >>> cache.trim(2)
        >>> len(cache), cache.offset
        (4, 4)
        """
        op = "KVCache.trim"
        with self._lock:
            count = _core.to_uint32(op, "n", n)
            if count > self._len:
                raise invalid(op, "n", f"must be <= the {self._len} tokens held", count)
            left = self._len - count
            if self._window is not None and left < min(self._offset - count, self._window):
                raise invalid(
                    op, "n", f"must leave the {min(self._offset - count, self._window)} tokens that a query sees", count
                )
            self._len, self._offset = left, self._offset - count

    def clear(self) -> None:
        """Forget everything; the memory stays allocated.

        >>> import numpy as np, tq_hb
        >>> cache = tq_hb.KVCache(1, 256)
        >>> cache.append(np.ones((1, 256), np.float32), np.ones((1, 256), np.float32))
        >>> cache.clear()
        >>> len(cache), cache.offset
        (0, 0)
        """
        with self._lock:
            self._len = self._offset = 0

    def copy(self) -> KVCache:
        """Return an independent cache with the same contents.

        >>> import numpy as np, tq_hb
        >>> cache = tq_hb.KVCache(1, 256)
        >>> cache.append(np.ones((1, 256), np.float32), np.ones((1, 256), np.float32))
        >>> other = cache.copy()
        >>> cache.clear()
        >>> len(other)
        1
        """
        with self._lock:
            other = KVCache(
                self._num_kv_heads,
                self._head_dim,
                None if self._grows else self._capacity,
                k_bits=self._k_bits,
                v_bits=self._v_bits,
                sliding_window=self._window,
                codebook=self._codebook,
                packing=self._packing,
                precision=self._precision,
                device=self._device,
            )
            if self._grows:
                other._allocate(self._capacity)
            for mine, its in ((self._k, other._k), (self._v, other._v)):
                its.packed.numpy()[...] = mine.packed.numpy()
                its.norms.numpy()[...] = mine.norms.numpy()
            other._len, other._offset, other._last_plan = self._len, self._offset, self._last_plan
            return other

    def __copy__(self) -> KVCache:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, object]) -> KVCache:
        return self.copy()

    # -- reading ---------------------------------------------------------------------------------------

    def attend(
        self,
        q: Array,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Array | None = None,
        q_offset: int | None = None,
        return_lse: bool = False,
        out: Array | None = None,
    ) -> Array:
        """Attend the newest token's query to everything it sees in the cache.

        Parameters
        ----------
        q : array, shape (heads, head_dim) or (1, heads, head_dim)
            Not rotated; ``heads`` is a multiple of ``num_kv_heads``. The token's own key and value are
            already appended.
        scale : float, optional
            Multiplies the scores; ``head_dim ** -0.5`` by default.
        softcap : float
            If positive, scores become ``softcap * tanh(score / softcap)``.
        out : array, optional
            Where the result is written; shape and dtype of the result.

        Returns
        -------
        array, shape, library and floating dtype of ``q`` (float64 gives float32).

        Raises
        ------
        InvalidArgument
            If an argument breaks a rule, q is not finite, or the cache is empty.
        UnsupportedError
            For more than one query, sinks, q_offset and return_lse.

        Examples
        --------
        >>> import numpy as np, tq_hb
        >>> cache = tq_hb.KVCache(1, 256)
        >>> cache.append(np.ones((3, 1, 256), np.float32), np.ones((3, 1, 256), np.float32))
        >>> out = cache.attend(np.ones((4, 256), np.float32))
        >>> out.shape, bool(np.abs(out - 1).max() < 0.02)
        ((4, 256), True)
        """
        op = "KVCache.attend"
        check_attention(op, precision=self._precision, sinks=sinks, return_lse=return_lse)
        if q_offset is not None:
            raise unsupported(op, "q_offset")
        rows = self._query(op, q)
        dtype = result_dtype(op, "q", q)
        writable = None
        if out is not None:
            writable = as_out(op, out, rows.shape, dtype)
            require_disjoint(op, "out", writable, "q", q)
        result = writable if writable is not None and dtype == "float32" else np.empty(rows.shape, np.float32)
        require_rows(op, "q", rows, as_query=True)
        with self._lock:
            if self._len == 0:
                raise invalid(op, "cache", "must hold at least one token; append k and v before attending", "none")
            params = self._attention_params(op, rows.shape[-2], scale, softcap)
            offers_group = self._device._core.offers(policy.AttendKernel.GROUP)
            dispatch = policy.plan_attention(op, params, offers_group=offers_group)
            staging, encoder = self._start(op)
            encoder.flash_attn_vec(
                op,
                staging.read("q", rows),
                self._k.packed,
                self._k.norms,
                self._v.packed,
                self._v.norms,
                staging.fill("out", result),
                None,
                params,
                dispatch.kernel,
                dispatch.head_tile,
                dispatch.nwg,
                self._v_bits,
                self._codebook,
                True,
            )
            staging.run(encoder)
            self._last_plan = self._plan(encoder, params, dispatch)
        return finish(q, out, writable, result, dtype)

    def _plan(
        self, encoder: _core.CommandEncoder, params: _core.FlashAttnVecTqHbParams, dispatch: policy.Dispatch
    ) -> Plan:
        _, _, _, (_, simdgroups, _), _ = encoder.nodes[0]
        # Only the per-head kernel is told how many; and the cpu launches nothing.
        nsg = params.nsg if dispatch.kernel is policy.AttendKernel.PER_HEAD else simdgroups
        return Plan(self._device.backend, encoder.kernels, nsg, dispatch.nwg, "strict", encoder.threadgroup_bytes)

    def _query(self, op: str, q: Array) -> Float32Array:
        rows = as_float32(op, "q", q)
        if rows.ndim not in (2, 3) or rows.shape[-1] != self._head_dim:
            shape = f"(heads, {self._head_dim}) or (queries, heads, {self._head_dim})"
            raise invalid(op, "q", f"must have shape {shape}", rows.shape)
        if rows.shape[-2] == 0 or rows.shape[-2] % self._num_kv_heads != 0:
            raise invalid(op, "q", f"must have a multiple of {self._num_kv_heads} heads", rows.shape[-2])
        return rows

    def _attention_params(
        self, op: str, num_heads: int, scale: float | None, softcap: float
    ) -> _core.FlashAttnVecTqHbParams:
        kv_seq_len, ring_start, window = self._len, 0, self._window or 0
        if self._offset > self._len:
            # The ring has lost tokens. It counts as full, and the window leaves out the slots of tokens that
            # were trimmed: they come first in the order of age, and trim keeps a whole window after them.
            kv_seq_len, ring_start = self._capacity, self._offset % self._capacity
        return _core.FlashAttnVecTqHbParams(
            num_heads=num_heads,
            num_kv_heads=self._num_kv_heads,
            head_dim=self._head_dim,
            kv_seq_len=kv_seq_len,
            kv_capacity=self._capacity,
            scale=self._head_dim**-0.5 if scale is None else _core.to_float32(op, "scale", scale),
            mask_type=2 if window else 0,
            sliding_window=window,
            softcap=_core.to_float32(op, "softcap", softcap),
            ring_start=ring_start,
            codebook_bits=self._k_bits,
            fuse_fwht_pre=1,
            nsg=policy.compute_nsg(kv_seq_len),
        )

    def dequantize(self) -> tuple[Float32Array, Float32Array]:
        """Rebuild what is held.

        Returns
        -------
        k, v : float32 (len, num_kv_heads, head_dim), oldest token first, not rotated.

        Examples
        --------
        >>> import numpy as np, tq_hb
        >>> cache = tq_hb.KVCache(1, 256)
        >>> cache.append(np.ones((3, 1, 256), np.float32), np.zeros((3, 1, 256), np.float32))
        >>> k, v = cache.dequantize()
        >>> k.shape, float(np.abs(v).max())
        ((3, 1, 256), 0.0)
        """
        with self._lock:
            return self._dequantize(self._k), self._dequantize(self._v)

    def _dequantize(self, side: _Side) -> Float32Array:
        op = "KVCache.dequantize"
        result: npt.NDArray[np.float32] = np.empty((self._len, self._num_kv_heads, self._head_dim), np.float32)
        if self._len == 0:
            return result
        hp = self._encoder_params(0)
        hp.codebook_bits = side.bits
        staging, encoder = self._start(op)
        out = staging.fill("out", result)
        encoder.dequantize(op, hp, self._offset - self._len, side.packed, side.norms, out, self._codebook)
        encoder.memory_barrier()
        encoder.fwht(op, _core.Fwht.UNDO, out)
        staging.run(encoder)
        return result

    # -- files -----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a file: not served yet, raises UnsupportedError.

        >>> import tq_hb
        >>> tq_hb.KVCache(1, 256).save("cache.safetensors")
        Traceback (most recent call last):
        tq_hb.UnsupportedError: KVCache.save: saving to 'cache.safetensors' is not supported
        """
        raise unsupported("KVCache.save", f"saving to {os.fspath(path)!r}")

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | Device | None = None) -> KVCache:
        """Read a cache from a file: not served yet, raises UnsupportedError.

        >>> import tq_hb
        >>> tq_hb.KVCache.load("cache.safetensors")
        Traceback (most recent call last):
        tq_hb.UnsupportedError: KVCache.load: loading from 'cache.safetensors' is not supported
        """
        resolve_device("KVCache.load", device)
        raise unsupported("KVCache.load", f"loading from {os.fspath(path)!r}")


def _positive(op: str, field: str, value: object) -> int:
    count = _core.to_uint32(op, field, value)
    if count == 0:
        raise invalid(op, field, "must be >= 1", count)
    return count
