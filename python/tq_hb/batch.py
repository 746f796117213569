"""BatchedKVCache: the caches of many sequences, appended to and attended to in one call each."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tq_hb import _core
from tq_hb.attention_call import AttentionCall
from tq_hb.cache import KVCache
from tq_hb.cache_format import CacheFormat, positive
from tq_hb.device import Device
from tq_hb.gpu_arrays import stream
from tq_hb.interop import Array, Rows, as_rows, borrow, require_rows
from tq_hb.options import invalid
from tq_hb.staging import Outstanding
from tq_hb.visibility import check_position

Integers = Array | Sequence[int]
_Indices = list[int]

_OBJECT_BYTES = 2048  # that a slot takes of the host's memory, at least, besides its codes and norms


class BatchedKVCache:
    """Keys and values of one layer for up to ``num_slots`` sequences, each as long as it is.

    A slot holds one sequence. ``batch[slot]`` is that sequence as a :class:`tq_hb.KVCache`, and everything that can
    be done to one can be done to it; results of a batched call equal those of calls on each, bit for bit. A call
    records the work of all its sequences and runs it at once: either all sequences change or, if it raises, none.

    Parameters
    ----------
    num_slots, num_kv_heads : int
    head_dim : int
        One of :func:`tq_hb.supported_head_dims`.
    capacity : int
        Tokens that fit into each slot.
    sliding_window : int or sequence of (int or None), optional
        The window of every slot, or one for each; see :class:`tq_hb.KVCache`.
    k_bits, v_bits, codebook, packing, k_mean, precision, device
        As for :class:`tq_hb.KVCache`, the same for all slots.

    Raises
    ------
    InvalidArgument
        If an argument breaks a rule.
    OutOfMemoryError
        If the memory of all slots is more than there is.

    Examples
    --------
    >>> import numpy as np, tq_hb
    >>> rng = np.random.default_rng(0)
    >>> batch = tq_hb.BatchedKVCache(4, 2, 256, capacity=1000)
    >>> k, v = rng.standard_normal((2, 3, 10, 2, 256), np.float32)  # 3 prompts of up to 10 tokens
    >>> batch.append([0, 1, 3], k, v, counts=[10, 4, 7])
    >>> out = batch.attend([0, 1, 3], rng.standard_normal((3, 8, 256), np.float32))
    >>> out.shape, batch.lengths.tolist()
    ((3, 8, 256), [10, 4, 0, 7])
    """

    def __init__(
        self,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        k_bits: int = 8,
        v_bits: int = 8,
        sliding_window: int | Sequence[int | None] | None = None,
        codebook: str = "lloyd_max",
        packing: str = "byte",
        k_mean: Array | None = None,
        precision: str = "default",
        device: str | Device | None = None,
    ) -> None:
        op = "BatchedKVCache"
        slots = positive(op, "num_slots", num_slots)
        self._form = CacheFormat.check(
            op, num_kv_heads, head_dim, k_bits, v_bits, codebook, packing, k_mean, precision, device
        )
        self._capacity = positive(op, "capacity", capacity)
        windows = _check_windows(op, sliding_window, slots, self._capacity)
        _check_memory(op, self._form, slots, self._capacity)
        self._outstanding = Outstanding()
        self._caches = tuple(
            KVCache._make(self._form, self._capacity, grows=False, window=window, outstanding=self._outstanding)
            for window in windows
        )

    # -- what it is ------------------------------------------------------------------------------------

    @property
    def num_slots(self) -> int:
        """Sequences that fit.

        >>> import tq_hb
        >>> tq_hb.BatchedKVCache(4, 2, 256, 100).num_slots
        4
        """
        return len(self._caches)

    @property
    def capacity(self) -> int:
        """Tokens that fit into each slot.

        >>> import tq_hb
        >>> tq_hb.BatchedKVCache(4, 2, 256, 100).capacity
        100
        """
        return self._capacity

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens held, for every slot.

        >>> import tq_hb
        >>> tq_hb.BatchedKVCache(4, 2, 256, 100).lengths
        array([0, 0, 0, 0])
        """
        return np.array([len(cache) for cache in self._caches], np.int64)

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Tokens seen, for every slot.

        >>> import tq_hb
        >>> tq_hb.BatchedKVCache(4, 2, 256, 100, sliding_window=8).offsets
        array([0, 0, 0, 0])
        """
        return np.array([cache.offset for cache in self._caches], np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, for all slots.

        >>> import tq_hb
        >>> tq_hb.BatchedKVCache(4, 2, 256, 100).nbytes == 4 * tq_hb.KVCache(2, 256, 100).nbytes
        True
        """
        return sum(cache.nbytes for cache in self._caches)

    @property
    def device(self) -> Device:
        """Where it lives.

        >>> import tq_hb
        >>> tq_hb.BatchedKVCache(4, 2, 256, 100, device="cpu").device.backend
        'cpu'
        """
        return self._form.device

    def __getitem__(self, slot: int) -> KVCache:
        """Return the sequence in a slot, the same object every time; it shares the batch's memory."""
        return self._caches[self._slot("BatchedKVCache", slot)]

    def __iter__(self) -> Iterator[KVCache]:
        return iter(self._caches)

    def __repr__(self) -> str:
        form = self._form
        return (
            f"BatchedKVCache(num_slots={self.num_slots}, num_kv_heads={form.num_kv_heads}, head_dim={form.head_dim}, "
            f"capacity={self._capacity}, k_bits={form.k_bits}, v_bits={form.v_bits}, packing={form.packing!r}, "
            f"device={form.device.backend!r})"
        )

    # -- use -------------------------------------------------------------------------------------------

    def append(self, slots: Integers, k: Array, v: Array, *, counts: Integers | None = None) -> None:
        """Append tokens to several sequences.

        Parameters
        ----------
        slots : int array or sequence, shape (sequences,)
            Each slot at most once.
        k, v : array, shape (sequences, num_kv_heads, head_dim) or (sequences, tokens, num_kv_heads, head_dim)
            Without an axis of tokens, one for each sequence.
        counts : int array or sequence, shape (sequences,), optional
            How many of its tokens each sequence takes, the first ones; all by default. The others may hold anything.

        Raises
        ------
        InvalidArgument
            If the tokens of any sequence do not fit, or a value among them is not finite, or a norm overflows;
            all sequences are unchanged then. Of arrays on a GPU, for which nothing waits, only such a row is left as
            it was, and a later call raises.

        Examples
        --------
        >>> import numpy as np, tq_hb
        >>> batch = tq_hb.BatchedKVCache(3, 1, 256, 100)
        >>> x = np.ones((2, 5, 1, 256), np.float32)
        >>> batch.append([2, 0], x, x, counts=[5, 1])
        >>> batch.lengths.tolist()
        [1, 0, 5]
        >>> batch.append([2, 0], x[:, 0], x[:, 0])  # the next token of each
        >>> batch.lengths.tolist()
        [2, 0, 6]
        """
        op = "BatchedKVCache.append"
        chosen = self._slots(op, slots)
        if len(set(chosen)) < len(chosen):
            twice = next(slot for slot in chosen if chosen.count(slot) > 1)
            raise invalid(op, "slots", "must name each slot once", f"{twice} twice")
        rows_k, rows_v = self._rows(op, "k", k, len(chosen)), self._rows(op, "v", v, len(chosen))
        if rows_k.shape != rows_v.shape:
            raise invalid(op, "v", f"must have the shape of k, {rows_k.shape}", rows_v.shape)
        taken = self._counts(op, counts, len(chosen), rows_k.shape[1])
        rows_k = self._form.residual(op, rows_k, k)
        for index, count in enumerate(taken):
            require_rows(op, f"k[{index}]", rows_k[index][:count])
            require_rows(op, f"v[{index}]", rows_v[index][:count])
        if not any(taken):
            return
        with self._locked(chosen):
            for slot, count in zip(chosen, taken, strict=True):
                self._caches[slot]._make_room(f"{op}: slot {slot}", count)
            self._outstanding.enter(self._form.device._core, stream(k, v))
            runs = [
                self._caches[slot]._append_run(f"{op}: slot {slot}", index, count)
                for index, (slot, count) in enumerate(zip(chosen, taken, strict=True))
                if count
            ]
            self._form.append(op, self._outstanding, (k, v), (rows_k, rows_v), runs, batched=True)
            for slot, count in zip(chosen, taken, strict=True):
                self._caches[slot]._count(count)

    def attend(
        self,
        slots: Integers,
        q: Array,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Array | None = None,
        q_offset: int | Integers | None = None,
        return_lse: bool = False,
        out: Array | None = None,
    ) -> Array:
        """Attend queries of several sequences, each to its own.

        Parameters
        ----------
        slots : int array or sequence, shape (sequences,)
        q : array, shape (sequences, heads, head_dim) or (sequences, queries, heads, head_dim)
        q_offset : int, or int array or sequence of shape (sequences,), optional
            Position of the last query of every sequence, or of each.
        scale, softcap, sinks, return_lse, out
            As for :meth:`tq_hb.KVCache.attend`, the same for all sequences.

        Returns
        -------
        array, shape, library and floating dtype of ``q`` (float64 gives float32)
            With ``return_lse`` a pair of it and lse, float32 of q's shape without the last axis.

        Raises
        ------
        InvalidArgument
            Where :meth:`tq_hb.KVCache.attend` would for one of the sequences.

        Examples
        --------
        >>> import numpy as np, tq_hb
        >>> rng = np.random.default_rng(0)
        >>> batch = tq_hb.BatchedKVCache(3, 1, 256, 100)
        >>> batch.append([2, 0], *rng.standard_normal((2, 2, 5, 1, 256), np.float32))
        >>> q = rng.standard_normal((2, 4, 256), np.float32)
        >>> out = batch.attend([2, 0], q)
        >>> bool((out[1] == batch[0].attend(q[1])).all())
        True
        """
        op = "BatchedKVCache.attend"
        chosen = self._slots(op, slots)
        call = AttentionCall(
            op,
            self._form,
            q,
            batched=True,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            return_lse=return_lse,
            out=out,
        )
        call.require_sequences(len(chosen))
        positions = self._positions(op, q_offset, len(chosen))
        with self._locked(chosen):
            self._outstanding.enter(self._form.device._core, call.stream)
            runs = [
                self._caches[slot]._record_attend(f"{op}: slot {slot}", call, index, position)
                for index, (slot, position) in enumerate(zip(chosen, positions, strict=True))
            ]
            launched = iter(call.run(self._outstanding))
            for slot, run in zip(chosen, runs, strict=True):
                self._caches[slot]._launched = None if run is None else next(launched), run
        return call.results()

    def reset(self, slot: int) -> None:
        """Forget the sequence in a slot, for another to take its place.

        >>> import numpy as np, tq_hb
        >>> batch = tq_hb.BatchedKVCache(2, 1, 256, 100)
        >>> batch.append([0, 1], np.ones((2, 5, 1, 256)), np.ones((2, 5, 1, 256)))
        >>> batch.reset(0)
        >>> batch.lengths.tolist()
        [0, 5]
        """
        self._caches[self._slot("BatchedKVCache.reset", slot)].clear()

    def copy(self) -> BatchedKVCache:
        """Return an independent batch with the same sequences.

        >>> import numpy as np, tq_hb
        >>> batch = tq_hb.BatchedKVCache(2, 1, 256, 100)
        >>> batch.append([0, 1], np.ones((2, 5, 1, 256)), np.ones((2, 5, 1, 256)))
        >>> other = batch.copy()
        >>> batch.reset(0)
        >>> batch.lengths.tolist(), other.lengths.tolist()
        ([0, 5], [5, 5])
        """
        other = BatchedKVCache.__new__(BatchedKVCache)
        other._form, other._capacity, other._outstanding = self._form, self._capacity, Outstanding()
        with self._locked(range(self.num_slots)):
            other._caches = tuple(cache._copy(other._outstanding) for cache in self._caches)
        return other

    def __copy__(self) -> BatchedKVCache:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, object]) -> BatchedKVCache:
        return self.copy()

    # -- checks ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self, slots: Iterable[int]) -> Iterator[None]:
        """Keep others out of the sequences in these slots; always in the same order, so that no two calls deadlock."""
        with contextlib.ExitStack() as stack:
            for slot in sorted(set(slots)):
                stack.enter_context(self._caches[slot]._lock)
            yield

    def _slot(self, op: str, slot: object) -> int:
        number = _core.to_uint32(op, "slot", slot)
        if number >= self.num_slots:
            raise invalid(op, "slot", f"must be below the {self.num_slots} slots", number)
        return number

    def _slots(self, op: str, slots: Integers) -> _Indices:
        chosen = _integers(op, "slots", slots)
        for slot in chosen:
            if slot >= self.num_slots:
                raise invalid(op, "slots", f"must be below the {self.num_slots} slots", slot)
        return chosen

    def _rows(self, op: str, field: str, x: Array, sequences: int) -> Rows:
        rows = as_rows(op, field, x, self._form.device._core)
        one = (sequences, self._form.num_kv_heads, self._form.head_dim)
        if rows.ndim not in (3, 4) or (rows.shape[0], *rows.shape[-2:]) != one:
            several = f"({sequences}, tokens, {one[1]}, {one[2]})"
            raise invalid(op, field, f"must have shape {one} or {several}", rows.shape)
        return rows if rows.ndim == 4 else rows.reshape((sequences, 1, *one[1:]))

    def _counts(self, op: str, counts: Integers | None, sequences: int, tokens: int) -> _Indices:
        if counts is None:
            return [tokens] * sequences
        taken = _one_each(op, "counts", counts, sequences)
        for count in taken:
            if count > tokens:
                raise invalid(op, "counts", f"must be at most the {tokens} tokens of k and v", count)
        return taken

    def _positions(self, op: str, q_offset: int | Integers | None, sequences: int) -> list[int] | list[None]:
        if q_offset is None:
            return [None] * sequences
        if _is_vector(q_offset):
            return _one_each(op, "q_offset", q_offset, sequences)
        return [check_position(op, "q_offset", q_offset)] * sequences


def _is_vector(values: object) -> bool:
    return isinstance(values, list | tuple | range) or getattr(values, "ndim", 0) > 0


def _integers(op: str, field: str, values: Integers) -> _Indices:
    """Return a vector of whole numbers from 0 on."""
    if not isinstance(values, list | tuple | range):
        array, is_bfloat16 = borrow(op, field, values, "must hold integers")
        if array.ndim != 1:
            raise invalid(op, field, "must have one axis", array.shape)
        if array.dtype.kind not in "iu" or is_bfloat16:
            raise invalid(op, field, "must hold integers", "bfloat16" if is_bfloat16 else array.dtype)
        values = array.tolist()
    for value in values:
        # A mask is not a list of numbers, though its values pass for them.
        if isinstance(value, bool | np.bool_):
            raise invalid(op, field, "must hold integers", value)
    return [check_position(op, field, value) for value in values]


def _one_each(op: str, field: str, values: Integers, sequences: int) -> _Indices:
    numbers = _integers(op, field, values)
    if len(numbers) != sequences:
        raise invalid(op, field, f"must have one value for each of the {sequences} slots", len(numbers))
    return numbers


def _check_windows(
    op: str, windows: int | Sequence[int | None] | None, num_slots: int, capacity: int
) -> Iterable[int | None]:
    """Return the window of every slot."""
    each: list[object] = list(windows) if _is_vector(windows) else [windows]  # type: ignore[arg-type]
    if _is_vector(windows) and len(each) != num_slots:
        raise invalid(op, "sliding_window", f"must have one value for each of the {num_slots} slots", len(each))
    checked = [None if window is None else positive(op, "sliding_window", window) for window in each]
    widest = max((window for window in checked if window is not None), default=0)
    if widest > capacity:
        raise invalid(op, "capacity", f"must be >= sliding_window {widest}", capacity)
    return checked if _is_vector(windows) else itertools.repeat(checked[0], num_slots)


def _check_memory(op: str, form: CacheFormat, num_slots: int, capacity: int) -> None:
    """Raise if the slots cannot fit, before any is made: memory that is not touched yet is granted for far too many."""
    host, device = Device("cpu").limits.max_buffer_bytes, form.device
    # A device that shares the host's memory may limit a single buffer to less than that.
    limit = device.limits.max_buffer_bytes if device.backend == "cuda" else host
    for size, kind, most in (
        (num_slots * capacity * form.bytes_per_token, f"the {device.backend} device's", limit),
        (num_slots * _OBJECT_BYTES, "the host's", host),
    ):
        if size > most:
            raise _core.OutOfMemoryError(
                f"{op}: {num_slots} slots take {size} bytes, more than {kind} memory of {most}"
            )
