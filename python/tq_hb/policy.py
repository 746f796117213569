"""Which attention kernel serves a call, how it is split, and what the environment says about it.

The environment is read once and kept; :func:`reload` reads it again. ``compute_nsg`` and
``compute_nwg`` are the reference system's rules (mlx-native 0.9.0).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from tq_hb import _core
from tq_hb.options import integer, invalid

AttendKernel = _core.AttendKernel

MAX_THREADS = 1024

# Several threadgroups for every core of the largest Apple GPUs, so that each hides the others' latency.
TARGET_THREADGROUPS = 256
# Shorter caches give the group kernel too few splits to fill a GPU.
GQA_MIN_KEYS = 512
# Two blocks of keys: below that, merging a split costs as much as computing it.
GQA_MIN_KEYS_PER_SPLIT = 64
# The same where a block of the group kernel has a multiprocessor to itself: a tile of 16 keys for each of its 8 warps.
GQA_MIN_KEYS_PER_MULTIPROCESSOR = 128
# A row of more coordinates than this takes two warps, so half as many tiles are in work.
GQA_COORDINATES_PER_WARP = 256
GQA_MODES = ("auto", "off", "on")


class Environment(NamedTuple):
    """The overrides found in the environment; None where there is none.

    >>> from tq_hb.policy import Environment
    >>> Environment(nwg=8)
    Environment(nsg=None, nwg=8, gqa=None, auto_barrier=False, device=None, num_threads=None, cpu_isa=None)
    """

    nsg: int | None = None
    nwg: int | None = None
    gqa: str | None = None
    auto_barrier: bool = False
    device: str | None = None
    num_threads: str | None = None
    cpu_isa: str | None = None


class Dispatch(NamedTuple):
    """How one attention call runs.

    ``head_tile`` rows of q share the decode of a key in the group kernel. ``nwg`` is the number of
    workgroups per head and query, or of splits of the keys in the group kernel.

    >>> from tq_hb.policy import AttendKernel, Dispatch
    >>> Dispatch(AttendKernel.GROUP, head_tile=4, nwg=32).head_tile
    4
    """

    kernel: AttendKernel
    head_tile: int
    nwg: int


def _integer(text: str) -> int | None:
    """Read a short row of digits; None for anything else."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def _one_of(accepted: range | tuple[int, ...]) -> Callable[[str], int | None]:
    """Return what reads an integer; a value that is not accepted means that there is no override."""

    def read(text: str) -> int | None:
        value = _integer(text)
        return value if value in accepted else None

    return read


def _text(text: str) -> str | None:
    return text or None


VARIABLES: dict[str, tuple[str, Callable[[str], object]]] = {
    "TQ_HB_DEVICE": ("device", _text),
    "TQ_HB_NUM_THREADS": ("num_threads", _text),
    "TQ_HB_CPU_ISA": ("cpu_isa", _text),
    "TQ_HB_GQA": ("gqa", _text),
    "HF2Q_TQ_NSG": ("nsg", _one_of((1, 2, 4))),
    "HF2Q_TQ_NWG": ("nwg", _one_of(range(1, 33))),
    "HF2Q_AUTO_BARRIER": ("auto_barrier", lambda text: text == "1"),
}
"""The variables that are read, each with its field of `Environment` and what makes that of its text, empty if unset."""


@cache
def environment() -> Environment:
    """Return the overrides as they were at the first call or the last :func:`reload`.

    >>> import tq_hb
    >>> tq_hb.policy.environment() is tq_hb.policy.environment()
    True
    """
    fields: dict[str, Any] = {field: read(os.environ.get(name, "")) for name, (field, read) in VARIABLES.items()}
    return Environment(**fields)


def reload() -> None:
    """Read the environment again.

    ``TQ_HB_NUM_THREADS`` and ``TQ_HB_CPU_ISA`` take effect at the first use of the cpu backend only: what they say
    later changes neither its threads, which :func:`tq_hb.set_num_threads` does, nor its instruction set.

    >>> import os, tq_hb
    >>> os.environ["HF2Q_TQ_NWG"] = "8"
    >>> tq_hb.policy.reload()
    >>> tq_hb.compute_nwg(4096)
    8
    >>> del os.environ["HF2Q_TQ_NWG"]
    >>> tq_hb.policy.reload()
    """
    environment.cache_clear()
    environment()


def compute_nsg(kv_seq_len: int) -> int:
    """SIMD groups per threadgroup for a cache of ``kv_seq_len`` tokens: 4 beyond 1024, else 1.

    ``HF2Q_TQ_NSG`` (1, 2 or 4) overrides it.

    >>> import tq_hb
    >>> tq_hb.compute_nsg(1024), tq_hb.compute_nsg(1025)
    (1, 4)
    """
    return nsg_of(_core.to_uint32("compute_nsg", "kv_seq_len", kv_seq_len))


def nsg_of(length: int) -> int:
    """:func:`compute_nsg` of a length that has been checked.

    >>> import tq_hb
    >>> tq_hb.policy.nsg_of(1025)
    4
    """
    return environment().nsg or (4 if length > 1024 else 1)


def compute_nwg(kv_seq_len: int) -> int:
    """Workgroups per head for a cache of ``kv_seq_len`` tokens: 32 beyond 512, else 16.

    ``HF2Q_TQ_NWG`` (1 to 32) overrides it.

    >>> import tq_hb
    >>> tq_hb.compute_nwg(512), tq_hb.compute_nwg(513)
    (16, 32)
    """
    return _nwg_of(_core.to_uint32("compute_nwg", "kv_seq_len", kv_seq_len))


def _nwg_of(length: int) -> int:
    return environment().nwg or (32 if length > 512 else 16)


def _gqa_mode(op: str) -> str:
    mode = environment().gqa or "auto"
    if mode not in GQA_MODES:
        raise _core.InvalidArgument(f"{op}: TQ_HB_GQA must be one of {', '.join(GQA_MODES)}, got {mode!r}")
    return mode


def visible_keys(p: _core.FlashAttnVecTqHbParams, num_queries: int = 1) -> int:
    """Keys that at least one of the newest queries sees: all that are held, or those in their windows.

    >>> import tq_hb
    >>> p = tq_hb.FlashAttnVecTqHbParams(num_heads=8, num_kv_heads=1, head_dim=256, kv_seq_len=4096,
    ...     kv_capacity=4096, scale=1.0, mask_type=2, sliding_window=512)
    >>> tq_hb.policy.visible_keys(p), tq_hb.policy.visible_keys(p, num_queries=3)
    (512, 514)
    """
    return min(p.sliding_window + num_queries - 1, p.kv_seq_len) if p.mask_type == 2 else p.kv_seq_len


def plan_attention(
    op: str,
    p: _core.FlashAttnVecTqHbParams,
    *,
    num_queries: int = 1,
    offers_group: bool,
    multiprocessors: int = 0,
    nwg: int | None = None,
    tmp_bytes: int | None = None,
) -> Dispatch:
    """Choose the kernel and the split of an attention call whose params are valid.

    The group kernel decodes a key once for several rows of q: the query heads of a KV head, of every query.
    It serves where the device has it, two or more rows share a KV head and there are at least
    ``GQA_MIN_KEYS`` visible keys, counted once per query (``TQ_HB_GQA=on`` drops that last rule). A choice
    for the per-head kernel keeps that one: ``nwg``, ``HF2Q_TQ_NSG``, ``HF2Q_TQ_NWG`` or ``TQ_HB_GQA=off``.

    Where a block of the group kernel has a multiprocessor to itself, as on cuda, it serves any number of rows from
    ``GQA_MIN_KEYS_PER_MULTIPROCESSOR`` keys on, in no more splits than there are multiprocessors.

    Parameters
    ----------
    num_queries : int
        Query tokens of the call, at least 1.
    offers_group : bool
        Whether the device has the group kernel for this head size and packing.
    multiprocessors : int
        Those that take one block of the group kernel each; 0 where blocks share them.
    nwg : int, optional
        Workgroups per head that the caller asks for.
    tmp_bytes : int, optional
        Size of the caller's working storage, which limits the splits.

    Examples
    --------
    >>> import tq_hb
    >>> p = tq_hb.FlashAttnVecTqHbParams(
    ...     num_heads=16, num_kv_heads=4, head_dim=256, kv_seq_len=4096, kv_capacity=4096, scale=1.0)
    >>> tq_hb.policy.plan_attention("example", p, offers_group=False)
    Dispatch(kernel=<AttendKernel.PER_HEAD: 0>, head_tile=1, nwg=32)
    >>> tq_hb.policy.plan_attention("example", p, offers_group=True)
    Dispatch(kernel=<AttendKernel.GROUP: 1>, head_tile=4, nwg=64)
    >>> tq_hb.policy.plan_attention("example", p, offers_group=True, num_queries=4)
    Dispatch(kernel=<AttendKernel.GROUP: 1>, head_tile=8, nwg=32)
    >>> tq_hb.policy.plan_attention("example", p, offers_group=True, multiprocessors=132)
    Dispatch(kernel=<AttendKernel.GROUP: 1>, head_tile=4, nwg=32)
    """
    mode = _gqa_mode(op)
    per_head = Dispatch(AttendKernel.PER_HEAD, 1, _workgroups(op, p, num_queries, nwg))
    forced = environment()
    if not offers_group or nwg is not None or forced.nsg is not None or forced.nwg is not None or mode == "off":
        return per_head
    sharing = p.num_heads // p.num_kv_heads * num_queries
    fewest_keys = GQA_MIN_KEYS_PER_MULTIPROCESSOR if multiprocessors else GQA_MIN_KEYS
    too_short = mode == "auto" and visible_keys(p, num_queries) * num_queries < fewest_keys
    too_few_rows = sharing < 2 and not multiprocessors
    if too_few_rows or too_short:
        return per_head
    tile = next((tile for tile in (2, 4) if tile >= sharing), _core.GQA_MAX_TILE)
    return Dispatch(AttendKernel.GROUP, tile, _group_splits(p, tile, num_queries, multiprocessors, tmp_bytes))


def _workgroups(op: str, p: _core.FlashAttnVecTqHbParams, num_queries: int, nwg: int | None) -> int:
    """Workgroups per head and query of the per-head kernel."""
    if nwg is not None:
        return _core.to_uint32(op, "nwg", nwg)
    count = _nwg_of(p.kv_seq_len)
    if num_queries == 1 or environment().nwg is not None:
        return count
    # Many queries fill the device by themselves, and each workgroup of each has a partial result to store.
    return min(count, -(-TARGET_THREADGROUPS // (p.num_heads * num_queries)))


def _group_splits(
    p: _core.FlashAttnVecTqHbParams, tile: int, num_queries: int, multiprocessors: int, tmp_bytes: int | None
) -> int:
    sharing = p.num_heads // p.num_kv_heads * num_queries
    tiles = p.num_kv_heads * -(-sharing // tile)
    fewest_keys = GQA_MIN_KEYS_PER_SPLIT
    if multiprocessors:
        warps_per_row = -(-p.head_dim // GQA_COORDINATES_PER_WARP)
        fewest_keys = GQA_MIN_KEYS_PER_MULTIPROCESSOR // warps_per_row
    most = min(_core.GQA_MAX_SPLITS, -(-visible_keys(p, num_queries) // fewest_keys))
    if tmp_bytes is not None:
        most = min(most, tmp_bytes // _core.tmp_buffer_bytes(p.num_heads, p.head_dim, num_queries, 1))
    wanted = multiprocessors // tiles if multiprocessors else -(-TARGET_THREADGROUPS // tiles)
    return max(1, min(wanted, most))


def check_num_threads(op: str, field: str, value: object) -> int:
    """Return ``value`` as a number of threads, or raise naming ``field``.

    >>> from tq_hb.policy import check_num_threads
    >>> check_num_threads("set_num_threads", "n", 0)
    Traceback (most recent call last):
    tq_hb.InvalidArgument: set_num_threads: n must be from 1 to 1024, got 0
    """
    count = integer(op, field, value)
    if count is None or not 1 <= count <= MAX_THREADS:
        raise invalid(op, field, f"must be from 1 to {MAX_THREADS}", repr(value) if count is None else count)
    return count


def num_threads_from_environment() -> int | None:
    """``TQ_HB_NUM_THREADS`` as a number, None if unset; anything else raises naming the variable.

    >>> import os, tq_hb
    >>> before = os.environ.get("TQ_HB_NUM_THREADS")
    >>> os.environ["TQ_HB_NUM_THREADS"] = "3"
    >>> tq_hb.policy.reload()
    >>> tq_hb.policy.num_threads_from_environment()
    3
    >>> _ = os.environ.pop("TQ_HB_NUM_THREADS") if before is None else os.environ.update(TQ_HB_NUM_THREADS=before)
    >>> tq_hb.policy.reload()
    """
    text = environment().num_threads
    if text is None:
        return None
    value = _integer(text)
    return check_num_threads("Device", "TQ_HB_NUM_THREADS", text if value is None else value)
