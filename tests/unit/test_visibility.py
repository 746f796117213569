"""Positions of queries in the terms of the attention op, against a list of what a cache holds."""

from __future__ import annotations

import itertools

import pytest

import tq_hb
from tq_hb.visibility import Held, last_position, place


class Model:
    """A cache of positions: what is in each slot, and what is held."""

    def __init__(self, capacity: int, window: int | None) -> None:
        self.capacity, self.window = capacity, window
        self.slots: list[int | None] = [None] * capacity
        self.held: list[int] = []
        self.offset = 0

    def append(self, count: int) -> None:
        for position in range(self.offset, self.offset + count):
            self.slots[position % self.capacity] = position
            self.held.append(position)
        self.offset += count
        self.held = self.held[-self.capacity :]

    def trim(self, count: int) -> bool:
        left, offset = len(self.held) - count, self.offset - count
        lost = self.offset > len(self.held)
        if left < 0 or (lost and left < min(offset, self.window or 0)):
            return False
        self.held, self.offset = self.held[:left], offset
        return True

    def should_see(self, position: int) -> list[int]:
        """Every position that a query sees, whether it is held or not."""
        oldest = 0 if self.window is None else max(0, position - self.window + 1)
        return list(range(oldest, min(position + 1, self.offset)))

    def view(self) -> Held:
        return Held(len(self.held), self.offset, self.capacity, self.window)


def seen_by_the_op(model: Model, position: int, num_queries: int) -> list[list[int | None]]:
    """What is in the slots that the op lets each query see, by the op's own rules."""
    placement = place(model.view(), num_queries, position)
    assert 1 <= placement.kv_seq_len <= model.capacity
    assert placement.ring_start == 0 or placement.kv_seq_len == model.capacity
    assert placement.ring_start < model.capacity
    assert num_queries - 1 <= placement.query_position < 2**32
    seen = []
    for age in range(placement.query_position - num_queries + 1, placement.query_position + 1):
        end = min(age + 1, placement.kv_seq_len)
        begin = 0 if model.window is None else max(0, age - model.window + 1)
        seen.append([model.slots[(placement.ring_start + a) % model.capacity] for a in range(begin, end)])
    return seen


def check(model: Model, num_queries: int, q_offset: int | None) -> bool:
    """Whether the call is accepted; every query must then see exactly what it should."""
    last = model.offset - 1 if q_offset is None else q_offset
    positions = range(last - num_queries + 1, last + 1)
    wanted = [model.should_see(position) for position in positions] if positions[0] >= 0 else None
    if wanted is None or not {position for keys in wanted for position in keys} <= set(model.held):
        with pytest.raises(tq_hb.InvalidArgument, match=f"^op: q must .*got {num_queries}"):
            last_position("op", model.view(), num_queries, q_offset)
        return False
    assert last_position("op", model.view(), num_queries, q_offset) == last
    assert seen_by_the_op(model, last, num_queries) == wanted
    return True


@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("spare", [0, 1, 3])
def test_every_query_on_every_small_ring(window, spare):
    capacity = window + spare
    accepted = refused = 0
    for appended, trimmed, again in itertools.product(range(1, 2 * capacity + 2), range(capacity), (0, 1, 2)):
        model = Model(capacity, window)
        model.append(appended)
        if not model.trim(trimmed):
            continue
        model.append(again)
        if not model.held:
            continue
        for num_queries in range(1, 5):
            for q_offset in (None, *range(model.offset + capacity + 3)):
                is_accepted = check(model, num_queries, q_offset)
                accepted += is_accepted
                refused += not is_accepted
    assert accepted > 100
    assert refused > 100


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_every_query_on_a_linear_cache(length):
    model = Model(8, None)
    model.append(length)
    for num_queries in range(1, 5):
        for q_offset in (None, *range(20)):
            check(model, num_queries, q_offset)


@pytest.mark.parametrize("q_offset", [2**32 - 1, 2**40])
@pytest.mark.parametrize("window", [None, 3])
def test_a_query_may_stand_far_beyond_the_keys(window, q_offset):
    model = Model(8, window)
    model.append(8)
    position = last_position("op", model.view(), 2, q_offset)
    assert seen_by_the_op(model, position, 2) == [model.should_see(q_offset - 1), model.should_see(q_offset)]


def test_a_ring_that_has_seen_more_than_fits_in_32_bits():
    offset = 2**33 + 5
    held = Held(length=8, offset=offset, capacity=8, window=4)
    placement = place(held, 2, last_position("op", held, 2, None))
    assert (placement.kv_seq_len, placement.ring_start, placement.query_position) == (8, offset % 8, 7)


def test_the_messages_say_what_to_do():
    held = Held(length=8, offset=20, capacity=8, window=7)
    with pytest.raises(tq_hb.InvalidArgument, match=r"op: q must see only keys that are still held.*7 \+ N - 1.*got 3"):
        last_position("op", held, 3, None)
    with pytest.raises(tq_hb.InvalidArgument, match="op: q must hold at most 2 queries.*got 3"):
        last_position("op", Held(8, 8, 8, None), 3, 1)
