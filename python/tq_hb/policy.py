"""How a call is split over workgroups, and what the environment says about it.

The environment is read once and kept; :func:`reload` reads it again. The rules are the reference
system's (mlx-native 0.9.0, ``compute_nsg`` and ``compute_nwg``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

from tq_hb import _core

MAX_THREADS = 1024


@dataclass(frozen=True)
class Environment:
    """The overrides found in the environment; None where there is none.

    >>> from tq_hb.policy import Environment
    >>> Environment(nsg=None, nwg=8, device=None, num_threads=None).nwg
    8
    """

    nsg: int | None
    nwg: int | None
    device: str | None
    num_threads: str | None


def _integer(text: str) -> int | None:
    """Read a short row of digits; None for anything else."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def _override(variable: str, accepted: range | tuple[int, ...]) -> int | None:
    """Read an integer; a value that is not accepted means that there is no override."""
    value = _integer(os.environ.get(variable, ""))
    return value if value in accepted else None


@cache
def environment() -> Environment:
    """Return the overrides as they were at the first call or the last :func:`reload`.

    >>> import tq_hb
    >>> tq_hb.policy.environment() is tq_hb.policy.environment()
    True
    """
    return Environment(
        nsg=_override("HF2Q_TQ_NSG", (1, 2, 4)),
        nwg=_override("HF2Q_TQ_NWG", range(1, 33)),
        device=os.environ.get("TQ_HB_DEVICE") or None,
        num_threads=os.environ.get("TQ_HB_NUM_THREADS") or None,
    )


def reload() -> None:
    """Read the environment again.

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
    length = _core.to_uint32("compute_nsg", "kv_seq_len", kv_seq_len)
    return environment().nsg or (4 if length > 1024 else 1)


def compute_nwg(kv_seq_len: int) -> int:
    """Workgroups per head for a cache of ``kv_seq_len`` tokens: 32 beyond 512, else 16.

    ``HF2Q_TQ_NWG`` (1 to 32) overrides it.

    >>> import tq_hb
    >>> tq_hb.compute_nwg(512), tq_hb.compute_nwg(513)
    (16, 32)
    """
    length = _core.to_uint32("compute_nwg", "kv_seq_len", kv_seq_len)
    return environment().nwg or (32 if length > 512 else 16)


def check_num_threads(op: str, field: str, value: object) -> int:
    """Return ``value`` as a number of threads, or raise naming ``field``.

    >>> from tq_hb.policy import check_num_threads
    >>> check_num_threads("set_num_threads", "n", 0)
    Traceback (most recent call last):
    tq_hb.InvalidArgument: set_num_threads: n must be from 1 to 1024, got 0
    """
    count = _core.to_uint32(op, field, value)
    if not 1 <= count <= MAX_THREADS:
        raise _core.InvalidArgument(f"{op}: {field} must be from 1 to {MAX_THREADS}, got {count}")
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
