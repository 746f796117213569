"""Which held tokens the queries of a call see: positions of a cache, and the same in the terms of the attention op.

A position counts the tokens that a cache has seen. The op counts slots by age, from the oldest that it is told of.
"""

from __future__ import annotations

import operator
from typing import NamedTuple, SupportsIndex, cast

from tq_hb.options import invalid

_MAX_POSITION = 2**63 - 1


class Held(NamedTuple):
    """What a cache holds: the positions from ``offset - length`` up to ``offset``, position p in slot p % capacity.

    Only a ring, which has a ``window``, may hold less than it has seen.
    """

    length: int
    offset: int
    capacity: int
    window: int | None

    @property
    def oldest(self) -> int:
        """Position of the oldest token held."""
        return self.offset - self.length


class Placement(NamedTuple):
    """Keys and queries as the attention op takes them."""

    kv_seq_len: int
    ring_start: int
    query_position: int


def check_position(op: str, field: str, value: object) -> int:
    """Return ``value`` as a position; a ring may see more tokens than 32 bits count."""
    try:
        position = operator.index(cast(SupportsIndex, value))
    except TypeError:
        position = -1
    if not 0 <= position <= _MAX_POSITION:
        raise invalid(op, field, f"must be an integer from 0 to {_MAX_POSITION}", repr(value))
    return position


def last_position(op: str, held: Held, num_queries: int, q_offset: int | None) -> int:
    """Return the position of the last query, or raise if a query would stand before position 0 or miss a key."""
    last = held.offset - 1 if q_offset is None else q_offset
    first = last - (num_queries - 1)
    if first < 0:
        raise invalid(op, "q", f"must hold at most {last + 1} queries where q_offset is {last}", num_queries)
    oldest_seen = 0 if held.window is None else max(0, first - held.window + 1)
    if oldest_seen < held.oldest:
        rule = (
            f"must see only keys that are still held, from position {held.oldest} on (N queries with a window of "
            f"{held.window} on a full ring need a capacity of {held.window} + N - 1)"
        )
        queries = f"{num_queries} queries that see positions from {oldest_seen} on, where q_offset is {last}"
        raise invalid(op, "q", rule, queries)
    return last


def place(held: Held, num_queries: int, last: int) -> Placement:
    """Translate the position of the last query, which :func:`last_position` has accepted.

    >>> place(Held(length=5, offset=5, capacity=8, window=None), num_queries=2, last=4)
    Placement(kv_seq_len=5, ring_start=0, query_position=4)
    >>> place(Held(length=8, offset=13, capacity=8, window=4), num_queries=2, last=12)
    Placement(kv_seq_len=8, ring_start=5, query_position=7)
    """
    if held.oldest == 0:
        kv_seq_len, ring_start, age = held.length, 0, last
    else:
        # A ring that has lost tokens counts as full. Slots of tokens that were trimmed since come first in the order
        # of age, and no query reaches that far back: it would miss a key.
        kv_seq_len, ring_start = held.capacity, held.offset % held.capacity
        age = last - held.offset + held.capacity
    # From here on every query sees the same, however far beyond the keys it stands; the op counts in 32 bits.
    farthest = kv_seq_len + (held.window or 0) + num_queries
    return Placement(kv_seq_len, ring_start, min(age, farthest))
