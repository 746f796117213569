"""What must hold of a cache whatever is done to it."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import reference
import tolerance
import tq_hb

HEAD_DIMS = st.sampled_from(tq_hb.supported_head_dims())
PACKINGS = st.sampled_from(["byte", "plane"])
WIDTHS = st.sampled_from([5, 6, 8])
SEEDS = st.integers(0, 2**32 - 1)
BACKENDS = st.sampled_from([d.backend for d in tq_hb.devices() if d.available])


def tokens(seed: int, count: int, heads: int, head_dim: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, heads, head_dim)).astype(np.float32)


class RingAgainstList(RuleBasedStateMachine):
    """A cache against a Python list of what it must still hold."""

    @initialize(
        window=st.none() | st.integers(1, 12),
        spare=st.integers(0, 6),
        fixed=st.booleans(),
        packing=PACKINGS,
        backend=BACKENDS,
    )
    def create(self, window: int | None, spare: int, fixed: bool, packing: str, backend: str) -> None:
        self.window = window
        linear_capacity = 40 if fixed else None
        capacity = window + spare if window else linear_capacity
        self.cache = tq_hb.KVCache(
            1,
            64,
            capacity,
            k_bits=6,
            v_bits=6,
            sliding_window=window,
            packing=packing,
            precision="strict",
            device=backend,
        )
        self.limit = self.cache.capacity if window else linear_capacity
        self.held: list[int] = []  # numbers of the tokens
        self.offset = 0
        self.next_token = 1

    @staticmethod
    def vectors(numbers: list[int]) -> np.ndarray:
        """A token's number decides its vector."""
        return np.concatenate([tokens(n, 1, 1, 64) for n in numbers] or [tokens(0, 0, 1, 64)])

    @rule(count=st.integers(0, 20))
    def append(self, count: int) -> None:
        new = list(range(self.next_token, self.next_token + count))
        x = self.vectors(new)
        if not self.window and self.limit is not None and len(self.held) + count > self.limit:
            try:
                self.cache.append(x, -x)
            except tq_hb.InvalidArgument:
                return
            raise AssertionError("an append beyond the capacity was accepted")
        self.cache.append(x, -x)
        self.next_token += count
        self.offset += count
        self.held += new
        if self.window:
            self.held = self.held[-self.limit :]

    @rule(count=st.integers(0, 15))
    def trim(self, count: int) -> None:
        left, offset = len(self.held) - count, self.offset - count
        overwritten = self.offset > len(self.held)
        allowed = left >= 0 and not (overwritten and left < min(offset, self.window or 0))
        if not allowed:
            try:
                self.cache.trim(count)
            except tq_hb.InvalidArgument:
                return
            raise AssertionError("a trim of tokens that the window needs was accepted")
        self.cache.trim(count)
        self.held = self.held[:left]
        self.offset = offset

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.held, self.offset = [], 0

    @rule()
    def go_on_with_a_copy(self) -> None:
        old, self.cache = self.cache, self.cache.copy()
        old.clear()

    @precondition(lambda self: self.window is None and self.limit is None)
    @rule(count=st.integers(0, 60))
    def reserve(self, count: int) -> None:
        self.cache.reserve(count)
        assert self.cache.capacity >= count

    @rule(num_queries=st.integers(1, 6), ahead=st.none() | st.integers(-12, 20), softcap=st.sampled_from([0.0, 2.0]))
    def attend_at_a_position(self, num_queries: int, ahead: int | None, softcap: float) -> None:
        """``ahead`` is counted from the newest token; None leaves the position to the cache."""
        last = self.offset - 1 + (ahead or 0)
        if last < 0 and ahead is not None:
            return
        positions = range(last - num_queries + 1, last + 1)
        begins = [max(0, position + 1 - self.window) if self.window else 0 for position in positions]
        ends = [min(position + 1, self.offset) for position in positions]
        oldest = self.offset - len(self.held)
        is_held = all(begin >= oldest for begin in begins)
        nothing_by_default = ahead is None and not self.held
        q = tokens(num_queries, num_queries, 2, 64)
        keywords = {"q_offset": None if ahead is None else last, "softcap": softcap, "return_lse": True}
        if positions[0] < 0 or not is_held or nothing_by_default:
            try:
                self.cache.attend(q, **keywords)
            except tq_hb.InvalidArgument:
                return
            raise AssertionError("queries without a position or without their keys were accepted")
        out, lse = self.cache.attend(q, **keywords)
        ranges = [(min(b, e) - oldest, e - oldest) for b, e in zip(begins, ends, strict=True)]
        k, v = (x.swapaxes(0, 1) for x in self.cache.dequantize())
        want, want_lse = reference.attend(q, k, v, scale=1 / 8, softcap=softcap, ranges=ranges, return_lse=True)
        assert tolerance.lse_error(lse, want_lse) <= tolerance.LSE_ERROR
        assert np.square(out - want).sum() <= tolerance.ATTEND_NMSE * np.square(want).sum()

    @invariant()
    def holds_what_the_list_holds(self) -> None:
        assert len(self.cache) == len(self.held)
        assert self.cache.offset == self.offset
        x = self.vectors(self.held)
        for got, want in zip(self.cache.dequantize(), (x, -x), strict=True):
            assert np.array_equal(got, tq_hb.dequantize(*tq_hb.quantize(want, 6), 6, head_dim=64))

    @precondition(lambda self: self.held)
    @invariant()
    def attends_to_its_window(self) -> None:
        q = tokens(0, 1, 1, 64)[0]
        seen = self.vectors(self.held[-self.window :] if self.window else self.held)
        fresh = tq_hb.KVCache(1, 64, k_bits=6, v_bits=6, precision="strict", device=self.cache.device)
        fresh.append(seen, -seen)
        assert np.array_equal(self.cache.attend(q), fresh.attend(q))


RingAgainstList.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestRingAgainstList = RingAgainstList.TestCase


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, head_dim=HEAD_DIMS, cbits=WIDTHS, exponent=st.integers(-15, 15), count=st.integers(1, 5))
def test_a_round_trip_brings_back_the_nearest_levels(seed, head_dim, cbits, exponent, count):
    x = tokens(seed, count, 1, head_dim) * np.float32(2.0**exponent)
    codes, norms = tq_hb.quantize(x, cbits)
    back = tq_hb.dequantize(codes, norms, cbits, head_dim=head_dim)

    exact, lengths = reference.normalised(x)
    levels = reference.levels(cbits, "lloyd_max").astype(np.float64)
    nearest = levels[np.abs(exact[..., None] - levels).argmin(-1)]
    want = nearest * np.repeat(lengths.reshape(count, 1, -1), min(head_dim, reference.BLOCK), axis=-1)
    got = reference.rotate(back) * reference.unit_norm(head_dim)
    # A value halfway between two levels may take either; such values are rare and barely cost accuracy.
    spacing = np.diff(levels).max() * lengths.max()
    assert (np.abs(got - want) <= 1e-5 * lengths.max()).mean() > 0.99
    assert np.abs(got - want).max() <= spacing * 1.001


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, head_dim=HEAD_DIMS, cbits=WIDTHS, exponent=st.integers(-20, 20))
def test_codes_do_not_depend_on_the_length_of_a_vector(seed, head_dim, cbits, exponent):
    """Scaling by a power of two is exact in every step."""
    x = tokens(seed, 3, 1, head_dim)
    codes, norms = tq_hb.quantize(x, cbits)
    scaled_codes, scaled_norms = tq_hb.quantize(x * np.float32(2.0**exponent), cbits)
    assert np.array_equal(codes, scaled_codes)
    assert np.array_equal(norms * np.float32(2.0**exponent), scaled_norms)


@settings(max_examples=30, deadline=None)
@given(
    seed=SEEDS,
    head_dim=HEAD_DIMS,
    runs=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    window=st.none() | st.integers(1, 50),
    cbits=WIDTHS,
    packing=PACKINGS,
    backend=BACKENDS,
)
def test_appending_in_runs_equals_appending_at_once(seed, head_dim, runs, window, cbits, packing, backend):
    x = tokens(seed, sum(runs), 2, head_dim)
    in_runs, at_once = (
        tq_hb.KVCache(2, head_dim, k_bits=cbits, v_bits=cbits, sliding_window=window, packing=packing, device=backend)
        for _ in range(2)
    )
    start = 0
    for n in runs:
        in_runs.append(x[start : start + n], -x[start : start + n])
        start += n
    at_once.append(x, -x)
    assert len(in_runs) == len(at_once)
    assert in_runs.offset == at_once.offset
    for a, b in zip(in_runs.dequantize(), at_once.dequantize(), strict=True):
        assert a.tobytes() == b.tobytes()
    if len(at_once):
        q = tokens(seed, 1, 4, head_dim)[0]
        assert in_runs.attend(q).tobytes() == at_once.attend(q).tobytes()


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, head_dim=HEAD_DIMS, count=st.integers(1, 150), window=st.integers(1, 170), spare=st.integers(0, 40))
def test_a_window_equals_the_sliced_cache_bit_for_bit(seed, head_dim, count, window, spare):
    x, v = tokens(seed, count, 2, head_dim), tokens(seed + 1, count, 2, head_dim)
    q = tokens(seed + 2, 1, 4, head_dim)[0]
    ring = tq_hb.KVCache(2, head_dim, window + spare, sliding_window=window)
    ring.append(x, v)
    sliced = tq_hb.KVCache(2, head_dim)
    sliced.append(x[-window:], v[-window:])
    assert ring.attend(q).tobytes() == sliced.attend(q).tobytes()


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, count=st.integers(1, 120), num_kv_heads=st.integers(1, 4), group=st.integers(1, 5))
def test_grouped_heads_equal_repeated_heads(seed, count, num_kv_heads, group):
    k, v = tokens(seed, count, num_kv_heads, 256), tokens(seed + 1, count, num_kv_heads, 256)
    q = tokens(seed + 2, min(count, 3), num_kv_heads * group, 256)
    grouped = tq_hb.KVCache(num_kv_heads, 256, precision="strict")
    grouped.append(k, v)
    repeated = tq_hb.KVCache(num_kv_heads * group, 256, precision="strict")
    repeated.append(k.repeat(group, axis=1), v.repeat(group, axis=1))
    assert tolerance.nmse(grouped.attend(q), repeated.attend(q)) <= tolerance.SPLIT_NMSE


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, count=st.integers(2, 150), softcap=st.sampled_from([0.0, 3.0]))
def test_the_order_of_the_keys_does_not_matter(seed, count, softcap):
    k, v = tokens(seed, count, 1, 256), tokens(seed + 1, count, 1, 256)
    q = tokens(seed + 2, 1, 3, 256)[0]
    order = np.random.default_rng(seed).permutation(count)
    straight, shuffled = (tq_hb.KVCache(1, 256, precision="strict") for _ in range(2))
    straight.append(k, v)
    shuffled.append(k[order], v[order])
    assert (
        tolerance.nmse(shuffled.attend(q, softcap=softcap), straight.attend(q, softcap=softcap)) <= tolerance.SPLIT_NMSE
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=SEEDS,
    count=st.integers(1, 120),
    cuts=st.lists(st.integers(0, 120), max_size=6),
    num_queries=st.integers(1, 4),
    window=st.none() | st.integers(1, 60),
    softcap=st.sampled_from([0.0, 3.0]),
    with_sinks=st.booleans(),
    backend=BACKENDS,
)
def test_parts_of_a_cache_merge_to_the_whole(seed, count, cuts, num_queries, window, softcap, with_sinks, backend):
    num_queries = min(num_queries, count)
    # No part begins among the new tokens, so that every query has a position in each.
    bounds = [0, *sorted(min(cut, count - num_queries) for cut in cuts), count]
    k, v = tokens(seed, count, 2, 64), tokens(seed + 1, count, 2, 64)
    q = 3 * tokens(seed + 2, num_queries, 4, 64)
    sinks = 5 * tokens(seed + 3, 1, 1, 4)[0, 0] if with_sinks else None

    def attend(begin: int, end: int, sinks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        capacity = None if window is None else max(window, end - begin)
        part = tq_hb.KVCache(
            2, 64, capacity, sliding_window=window, packing="plane", v_bits=5, precision="strict", device=backend
        )
        part.append(k[begin:end], v[begin:end])
        return part.attend(q, q_offset=count - 1 - begin, softcap=softcap, sinks=sinks, return_lse=True)

    want, want_lse = attend(0, count, sinks)
    state = attend(bounds[0], bounds[1], sinks)
    for begin, end in itertools.pairwise(bounds[1:]):
        state = tq_hb.merge_states(*state, *attend(begin, end, None))

    assert tolerance.nmse(state[0], want) <= tolerance.SPLIT_NMSE
    assert tolerance.lse_error(state[1], want_lse) <= tolerance.LSE_ERROR


@st.composite
def states(draw: st.DrawFn, shape: tuple[int, ...] = (3, 8)) -> tuple[np.ndarray, np.ndarray]:
    """Partial results of up to extreme weight, or of no weight at all."""
    logs = draw(st.lists(st.floats(-100, 100, width=32) | st.just(-np.inf), min_size=3, max_size=3))
    lse = np.array(logs, np.float32)
    o = tokens(draw(SEEDS), *shape, 1)[..., 0]
    return np.where(np.isneginf(lse)[:, None], np.float32(0), o), lse


@settings(max_examples=100, deadline=None)
@given(a=states(), b=states(), c=states())
def test_merging_is_commutative_and_associative(a, b, c):
    # What is merged first has its lse rounded to float32, by half a spacing at most. A weight w moves by w * (1 - w),
    # a quarter at most, of that, and the output by as much of the distance between what is weighed: in both orders.
    largest = max(np.abs(lse[np.isfinite(lse)]).max(initial=0.0) for _, lse in (a, b, c))
    moved = float(np.spacing(np.float32(largest + np.log(3))) / 4 * np.ptp([a[0], b[0], c[0]]))

    def close(x: tuple[np.ndarray, np.ndarray], y: tuple[np.ndarray, np.ndarray]) -> bool:
        same_output = np.allclose(x[0], y[0], atol=1e-6 + moved)
        return bool(same_output and np.allclose(x[1], y[1], rtol=1e-6, atol=1e-6))

    merge = tq_hb.merge_states
    assert all(x.tobytes() == y.tobytes() for x, y in zip(merge(*a, *b), merge(*b, *a), strict=True))
    assert close(merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c)))


@settings(max_examples=40, deadline=None)
@given(
    seed=SEEDS,
    kv_len=st.integers(1, 300),
    nsg=st.sampled_from([1, 2, 4]),
    nwg=st.integers(1, 32),
    head_dim=HEAD_DIMS,
    data=st.data(),
)
def test_the_split_does_not_matter(seed, kv_len, nsg, nwg, head_dim, data):
    ring_start = data.draw(st.integers(0, kv_len - 1), label="ring_start")
    window = data.draw(st.integers(0, kv_len + 3), label="window")
    k, v = tokens(seed, kv_len, 1, head_dim), tokens(seed + 1, kv_len, 1, head_dim)
    q = tokens(seed + 2, 1, 2, head_dim)[0]
    (k_codes, k_norms), (v_codes, v_norms) = (tq_hb.quantize(x.swapaxes(0, 1), 8) for x in (k, v))

    def attend(nsg: int, nwg: int) -> np.ndarray:
        p = tq_hb.FlashAttnVecTqHbParams(
            num_heads=2, num_kv_heads=1, head_dim=head_dim, kv_seq_len=kv_len, kv_capacity=kv_len,
            scale=head_dim**-0.5, mask_type=2 if window else 0, sliding_window=window, ring_start=ring_start, nsg=nsg,
        )  # fmt: skip
        return tq_hb.flash_attn_vec_tq_hb(q, k_codes, k_norms, v_codes, v_norms, p, nwg=nwg, precision="strict")

    once = attend(nsg, nwg)
    assert once.tobytes() == attend(nsg, nwg).tobytes()
    assert tolerance.nmse(once, attend(1, 1)) <= tolerance.SPLIT_NMSE


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, head_dim=HEAD_DIMS)
def test_the_rotation_keeps_lengths_and_inner_products(seed, head_dim):
    x, y = tokens(seed, 2, 1, head_dim)[:, 0]
    rotated_x, rotated_y = tq_hb.rotate(x), tq_hb.rotate(y)
    assert np.allclose(rotated_x @ rotated_y, x @ y, atol=1e-3)
    assert tolerance.nmse(tq_hb.unrotate(rotated_x), x) <= 4 * tolerance.ROTATE_NMSE
