"""KVCache: the K and V of one attention layer, held quantised and attended to as they are."""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tq_hb import _core, policy
from tq_hb.attention_call import AttentionCall, AttentionRun
from tq_hb.cache_format import AttendedFormat, CacheFormat, Codes, positive
from tq_hb.device import Device, resolve_device
from tq_hb.files import SavedCache, read_caches, write_caches
from tq_hb.gpu_arrays import stream
from tq_hb.interop import Array, Float32Array, Rows, as_rows, require_rows
from tq_hb.options import Allocating, invalid
from tq_hb.staging import Outstanding
from tq_hb.visibility import Held, check_position, last_position, place

_MIN_GROWTH = 64

# What an attention call launched, and how it ran; None if there were no keys to attend to.
_Launched = tuple[_core.Launched | None, AttentionRun | None]

_caches: weakref.WeakSet[KVCache] = weakref.WeakSet()


@lru_cache(maxsize=1024)
def _plan_run(
    op: str,
    form: AttendedFormat,
    length: int,
    offset: int,
    capacity: int,
    window: int | None,
    num_queries: int,
    num_heads: int,
    q_offset: int | None,
    scale: float,
    softcap: float,
    _environment: policy.Environment,
) -> AttentionRun:
    """Plan attention of a sequence's queries. Layers alike share it: they hold the same tokens."""
    held = Held(length, offset, capacity, window)
    placement = place(held, num_queries, last_position(op, held, num_queries, q_offset))
    params = _core.FlashAttnVecTqHbParams(
        num_heads=num_heads,
        num_kv_heads=form.num_kv_heads,
        head_dim=form.head_dim,
        # An empty cache has its params checked, too.
        kv_seq_len=placement.kv_seq_len or 1,
        kv_capacity=held.capacity or 1,
        scale=scale,
        mask_type=2 if held.window else 0,
        sliding_window=held.window or 0,
        softcap=softcap,
        ring_start=placement.ring_start,
        codebook_bits=form.k_bits,
        nsg=policy.nsg_of(placement.kv_seq_len),
        fuse_fwht_pre=1,
    )
    dispatch = policy.plan_attention(
        op,
        params,
        num_queries=num_queries,
        offers_group=form.offers_group,
        multiprocessors=form.num_multiprocessors,
    )
    plan = _core.AttendPlan(params, dispatch.kernel, dispatch.head_tile, dispatch.nwg, placement.query_position)
    return AttentionRun(params, dispatch, plan)


def _renew_locks() -> None:
    """Give a forked child's caches new locks: the thread that held an old one is not there to release it."""
    for cache in _caches:
        cache._lock = threading.RLock()
        cache._outstanding.renew_lock()


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


class KVCache:
    """Keys and values of one layer at 5, 6 or 8 bits per value, one norm per vector.

    A cache on a GPU uses arrays that are on it where they are; such calls run on the caller's stream and do not wait.
    Other caches refuse them.

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
    packing : "byte" or "plane"
        One byte per code at every width, or 5 and 6 bits in 5 and 6 bits.
    k_mean : array, shape (num_kv_heads, head_dim), optional
        Subtracted from every key before it is encoded, and taken into account wherever the keys are read: what
        is encoded is smaller, so its error is too. Finite; rounded to float32 and copied.
    precision : "default" or "strict"
    device : str or Device, optional

    Raises
    ------
    InvalidArgument
        If an argument breaks a rule.

    Examples
    --------
    >>> import numpy as np, tq_hb
    >>> rng = np.random.default_rng(0)
    >>> cache = tq_hb.KVCache(num_kv_heads=2, head_dim=256, k_bits=8, v_bits=6, packing="plane")
    >>> k, v = rng.standard_normal((2, 100, 2, 256), np.float32)
    >>> cache.append(k, v)
    >>> out = cache.attend(rng.standard_normal((8, 256), np.float32))
    >>> out.shape, len(cache), cache.bytes_per_token  # 2 * (256 + 192 + 8)
    ((8, 256), 100, 912)
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
        form = CacheFormat.check(
            op, num_kv_heads, head_dim, k_bits, v_bits, codebook, packing, k_mean, precision, device
        )
        window = None if sliding_window is None else positive(op, "sliding_window", sliding_window)
        fixed = window if capacity is None else positive(op, "capacity", capacity)
        if window is not None and fixed is not None and fixed < window:
            raise invalid(op, "capacity", f"must be >= sliding_window {window}", fixed)
        self._set_up(form, fixed or 0, grows=fixed is None, window=window)

    @classmethod
    def _make(
        cls,
        form: CacheFormat,
        capacity: int,
        *,
        grows: bool,
        window: int | None,
        outstanding: Outstanding | None = None,
    ) -> KVCache:
        """Make a cache of checked arguments; caches of one batch share what is outstanding."""
        cache = cls.__new__(cls)
        cache._set_up(form, capacity, grows=grows, window=window, outstanding=outstanding)
        return cache

    def _set_up(
        self,
        form: CacheFormat,
        capacity: int,
        *,
        grows: bool,
        window: int | None,
        outstanding: Outstanding | None = None,
    ) -> None:
        self._form, self._grows, self._window = form, grows, window
        self._len = self._offset = 0
        self._launched: _Launched | None = None
        self._outstanding = Outstanding() if outstanding is None else outstanding
        self._allocate(capacity)
        self._lock = threading.RLock()
        _caches.add(self)

    def _allocate(self, capacity: int) -> None:
        """Take new memory; what was held before stays if there is none."""
        form, is_ring = self._form, self._window is not None
        k, v = (Codes.allocate(form, bits, capacity, is_ring=is_ring) for bits in (form.k_bits, form.v_bits))
        buffers = _core.CacheBuffers(k.packed, k.norms, v.packed, v.norms)
        self._k, self._v, self._buffers, self._capacity = k, v, buffers, capacity

    # -- what it is ------------------------------------------------------------------------------------

    @property
    def num_kv_heads(self) -> int:
        """Heads of K and V.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256).num_kv_heads
        8
        """
        return self._form.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Values per head.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256).head_dim
        256
        """
        return self._form.head_dim

    @property
    def k_bits(self) -> int:
        """Bits per value of K.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256, v_bits=5).k_bits
        8
        """
        return self._form.k_bits

    @property
    def v_bits(self) -> int:
        """Bits per value of V.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256, v_bits=5).v_bits
        5
        """
        return self._form.v_bits

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
        return self._form.codebook

    @property
    def packing(self) -> str:
        """How codes are laid out in bytes.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256, k_bits=5).packing
        'byte'
        """
        return self._form.packing

    @property
    def k_mean(self) -> Float32Array | None:
        """What is subtracted from every key before it is encoded, a copy; None for nothing.

        >>> import numpy as np, tq_hb
        >>> tq_hb.KVCache(1, 256, k_mean=np.full((1, 256), 0.5)).k_mean.sum()
        np.float32(128.0)
        """
        mean = self._form.k_mean
        return None if mean is None else mean.copy()

    @property
    def precision(self) -> str:
        """Accuracy class asked for.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256, precision="strict").precision
        'strict'
        """
        return self._form.precision

    @property
    def device(self) -> Device:
        """Where it lives.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256, device="cpu").device.backend
        'cpu'
        """
        return self._form.device

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
        >>> tq_hb.KVCache(8, 256, k_bits=5, v_bits=5, packing="plane").bytes_per_token  # 2 * 8 * (160 + 4)
        2624
        """
        return self._form.bytes_per_token

    @property
    def nbytes(self) -> int:
        """Bytes allocated.

        >>> import tq_hb
        >>> tq_hb.KVCache(8, 256, 1024).nbytes  # 1024 * 4160
        4259840
        """
        return self._k.nbytes + self._v.nbytes

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
        return None if self._launched is None else self._plan(*self._launched)

    def __repr__(self) -> str:
        form = self._form
        return (
            f"KVCache(num_kv_heads={form.num_kv_heads}, head_dim={form.head_dim}, capacity={self._capacity}, "
            f"k_bits={form.k_bits}, v_bits={form.v_bits}, packing={form.packing!r}, sliding_window={self._window}, "
            f"len={self._len}, offset={self._offset}, device={form.device.backend!r})"
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
            If they do not fit, or a value is not finite, or a norm overflows; the cache is unchanged then. Of arrays
            on a GPU, for which nothing waits, only such a row is left as it was, and a later call raises.

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
        rows_k = self._form.residual(op, rows_k, k)
        require_rows(op, "k", rows_k)
        require_rows(op, "v", rows_v)
        with self._lock:
            self._outstanding.enter(self._form.device._core, stream(k, v))
            self._make_room(op, tokens)
            runs = [self._append_run(op, 0, tokens)]
            self._form.append(op, self._outstanding, (k, v), (rows_k, rows_v), runs, batched=False)
            self._count(tokens)

    def _rows(self, op: str, field: str, x: Array) -> Rows:
        rows = as_rows(op, field, x, self._form.device._core)
        heads = (self._form.num_kv_heads, self._form.head_dim)
        if rows.ndim not in (2, 3) or rows.shape[-2:] != heads:
            raise invalid(op, field, f"must have shape {heads} or (tokens, {str(heads)[1:]}", rows.shape)
        return rows if rows.ndim == 3 else rows.reshape((1, *heads))

    def _append_run(self, op: str, index: int, tokens: int) -> _core._AppendRun:
        """Say where tokens go for which there is room; ``index`` is the sequence's place in the call's arrays."""
        first = self._offset % self._capacity if self._window else self._offset
        return op, index, tokens, self._k.params(first), self._buffers

    def _count(self, tokens: int) -> None:
        """Take note of tokens that have been written."""
        self._offset += tokens
        self._len = min(self._len + tokens, self._capacity)

    def _make_room(self, op: str, tokens: int) -> None:
        """See to it that so many more tokens fit; a ring takes any number."""
        needed = self._offset + tokens
        if self._window is not None or needed <= self._capacity:
            return
        if not self._grows:
            ways_out = "a KVCache without one grows, with sliding_window it keeps the newest"
            raise invalid(op, "tokens", f"must fit in the capacity of {self._capacity} ({ways_out})", needed)
        self._resize(max(needed, 2 * self._capacity, _MIN_GROWTH))

    def _resize(self, capacity: int) -> None:
        """Move a linear cache into new memory."""
        self._outstanding.wait()
        old_k, old_v = self._k, self._v
        self._allocate(_core.to_uint32("KVCache", "capacity", capacity))
        for old, new in ((old_k, self._k), (old_v, self._v)):
            new.copy_from(old, self._len)

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
        """Return an independent cache with the same contents, a plain KVCache also of a subclass's object.

        >>> import numpy as np, tq_hb
        >>> cache = tq_hb.KVCache(1, 256)
        >>> cache.append(np.ones((1, 256), np.float32), np.ones((1, 256), np.float32))
        >>> other = cache.copy()
        >>> cache.clear()
        >>> len(other)
        1
        """
        return self._copy(Outstanding())

    def _copy(self, outstanding: Outstanding) -> KVCache:
        """Return a copy whose calls are among those outstanding."""
        with self._lock:
            self._outstanding.wait()
            other = KVCache._make(
                self._form, self._capacity, grows=self._grows, window=self._window, outstanding=outstanding
            )
            for mine, its in ((self._k, other._k), (self._v, other._v)):
                its.copy_from(mine, self._capacity)
            other._len, other._offset, other._launched = self._len, self._offset, self._launched
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
        """Attend the newest tokens' queries to what each of them sees in the cache.

        Parameters
        ----------
        q : array, shape (heads, head_dim) or (queries, heads, head_dim)
            Not rotated; ``heads`` is a multiple of ``num_kv_heads``. The queries belong to consecutive tokens, the
            last of them by default to the newest one; the tokens' own keys and values are already appended.
        scale : float, optional
            Multiplies the scores; ``head_dim ** -0.5`` by default.
        softcap : float
            If positive, scores become ``softcap * tanh(score / softcap)``.
        sinks : array, shape (heads,), optional
            One more logit per head in the sum of the weights, without a value; -inf for none.
        q_offset : int, optional
            Position of the last query, counted as :attr:`offset` counts; ``offset - 1`` by default. A query sees the
            keys of positions up to its own, with a window only the newest ``sliding_window`` of those positions. A
            query that sees no key gives zeros and an lse of -inf (its sink, if it has one). So a part of a split
            cache can be attended to on its own; see :func:`tq_hb.merge_states`.
        return_lse : bool
            Also return the logarithm of the sum of exp(score).
        out : array, optional
            Where the output is written; shape and dtype of the result.

        Returns
        -------
        array, shape, library and floating dtype of ``q`` (float64 gives float32)
            With ``return_lse`` a pair of it and lse: float32 of the same library, shape (heads,) or
            (queries, heads), natural logarithm, of scores after scale and softcap, sinks included.

        Raises
        ------
        InvalidArgument
            If an argument breaks a rule, q is not finite, there are more queries than positions, the cache is empty
            (without ``q_offset``), or a key that a query should see is not held any more: ``N`` queries on a full
            ring need a capacity of ``sliding_window + N - 1``.

        Examples
        --------
        >>> import numpy as np, tq_hb
        >>> cache = tq_hb.KVCache(1, 256)
        >>> cache.append(np.ones((3, 1, 256), np.float32), np.ones((3, 1, 256), np.float32))
        >>> out = cache.attend(np.ones((4, 256), np.float32))
        >>> out.shape, bool(np.abs(out - 1).max() < 0.02)
        ((4, 256), True)
        >>> out, lse = cache.attend(np.zeros((2, 4, 256), np.float32), return_lse=True)
        >>> out.shape, np.exp(lse[:, 0]).round(3).tolist()  # the first of two queries sees two keys
        ((2, 4, 256), [2.0, 3.0])
        """
        op = "KVCache.attend"
        call = AttentionCall(
            op,
            self._form,
            q,
            batched=False,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            return_lse=return_lse,
            out=out,
        )
        with self._lock:
            self._outstanding.enter(self._form.device._core, call.stream)
            run = self._record_attend(op, call, 0, q_offset)
            self._launched = next(iter(call.run(self._outstanding)), None), run
        return call.results()

    def _record_attend(self, op: str, call: AttentionCall, index: int, q_offset: int | None) -> AttentionRun | None:
        """Record attention of a call's sequence on this cache; None if there are no keys to attend to."""
        if q_offset is not None:
            q_offset = check_position(op, "q_offset", q_offset)
        elif self._len == 0:
            raise invalid(op, "cache", "must hold at least one token; append k and v before attending", "none")
        run = _plan_run(
            op,
            self._form.attended,
            self._len,
            self._offset,
            self._capacity,
            self._window,
            call.num_queries,
            call.num_heads,
            q_offset,
            call.scale,
            call.softcap,
            policy.environment(),
        )
        if self._len == 0:
            run.params.validate(op)
            call.leave_empty(index)
            return None
        call.record(index, self._buffers, run.plan)
        return run

    def _plan(self, launched: _core.Launched | None, run: AttentionRun | None) -> Plan:
        """Say what an attention call has launched."""
        backend = self._form.device.backend
        if launched is None or run is None:
            return Plan(backend, (), 0, 0, "strict", 0)
        params, dispatch, _ = run
        nodes = [node for node in launched.nodes if node[0] != "barrier"]
        simdgroups = nodes[0][3][1]
        # Only the per-head kernel is told how many; and the cpu launches nothing.
        nsg = params.nsg if dispatch.kernel is policy.AttendKernel.PER_HEAD else simdgroups
        kernels = tuple(node[1] for node in nodes)
        return Plan(backend, kernels, nsg, dispatch.nwg, launched.precision, max(node[4] for node in nodes))

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
            self._outstanding.wait()
            oldest = self._offset - self._len
            k, v = (side.dequantize("KVCache.dequantize", oldest, self._len) for side in (self._k, self._v))
        if self._form.k_mean is not None:
            k += self._form.k_mean
        return k, v

    # -- files -----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a file, which replaces one of that name once it is complete.

        Needs safetensors. :func:`tq_hb.save_caches` writes the caches of all layers to one file.

        Raises
        ------
        OSError
            If the file cannot be written.

        Examples
        --------
        >>> import numpy as np, pathlib, tempfile, tq_hb
        >>> cache = tq_hb.KVCache(1, 256, sliding_window=4)
        >>> cache.append(np.ones((6, 1, 256), np.float32), np.ones((6, 1, 256), np.float32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "cache.safetensors")
        ...     cache.save(path)
        ...     tq_hb.KVCache.load(path)  # doctest: +ELLIPSIS
        KVCache(num_kv_heads=1, ..., sliding_window=4, len=4, offset=6, ...)
        """
        write_caches("KVCache.save", path, [self._saved("KVCache.save")])

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | Device | None = None) -> KVCache:
        """Read a cache from a file that :meth:`save` wrote, on any device.

        Needs safetensors.

        Raises
        ------
        InvalidArgument
            If the file is not what :meth:`save` writes, or holds several caches.
        OSError
            If it cannot be read.

        Examples
        --------
        >>> import pathlib, tempfile, tq_hb
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "cache.safetensors")
        ...     tq_hb.KVCache(1, 256, 100, k_bits=5, packing="plane").save(path)
        ...     cache = tq_hb.KVCache.load(path, device="cpu")
        >>> cache.capacity, cache.k_bits, cache.packing
        (100, 5, 'plane')
        """
        op = "KVCache.load"
        where = resolve_device(op, device)
        caches = read_caches(op, path)
        if len(caches) != 1:
            raise invalid(op, "path", "must hold one cache; tq_hb.load_caches reads several", len(caches))
        return cls._restore(op, caches[0], where)

    def _saved(self, op: str) -> SavedCache:
        """Return what a file keeps of the cache."""
        form = self._form
        with self._lock:
            self._outstanding.wait()
            with Allocating(op, "a copy of the codes"):
                slots = self._slots()
                (k_codes, k_norms), (v_codes, v_norms) = self._k.read(slots), self._v.read(slots)
            return SavedCache(
                num_kv_heads=form.num_kv_heads,
                head_dim=form.head_dim,
                capacity=self._capacity,
                grows=self._grows,
                k_bits=form.k_bits,
                v_bits=form.v_bits,
                sliding_window=self._window,
                codebook=form.codebook,
                packing=form.packing,
                precision=form.precision,
                offset=self._offset,
                k_mean=form.k_mean,
                k_codes=k_codes,
                k_norms=k_norms,
                v_codes=v_codes,
                v_norms=v_norms,
            )

    def _slots(self) -> npt.NDArray[np.int64]:
        """Slots of the tokens held, oldest first."""
        return np.arange(self._offset - self._len, self._offset) % max(self._capacity, 1)

    @classmethod
    def _restore(cls, op: str, saved: SavedCache, device: str | Device | None) -> KVCache:
        """Make a cache of what a file has kept, which has been checked."""
        form = CacheFormat.check(
            op,
            saved.num_kv_heads,
            saved.head_dim,
            saved.k_bits,
            saved.v_bits,
            saved.codebook,
            saved.packing,
            saved.k_mean,
            saved.precision,
            device,
        )
        cache = cls._make(form, saved.capacity, grows=saved.grows, window=saved.sliding_window)
        cache._len, cache._offset = saved.k_codes.shape[1], saved.offset
        with Allocating(op, "a copy of the codes"):
            slots = cache._slots()
            cache._k.write(slots, saved.k_codes, saved.k_norms)
            cache._v.write(slots, saved.v_codes, saved.v_norms)
        return cache
