"""Partial attention and its merging: a set of keys in parts gives what it gives whole."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import reference
import tolerance
import tq_hb

State = tuple[np.ndarray, np.ndarray]
NOTHING = -np.inf


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def empty_state(*shape: int) -> State:
    return np.zeros(shape, np.float32), np.full(shape[:-1], NOTHING, np.float32)


def attend_part(cache: tq_hb.KVCache, q: np.ndarray, q_offset: int, **keywords) -> State:
    """Attention of queries of which some may stand before the first key of this part."""
    before = min(len(q), max(0, len(q) - 1 - q_offset))
    o, lse = empty_state(*q.shape)
    if before < len(q):
        o[before:], lse[before:] = cache.attend(q[before:], q_offset=q_offset, return_lse=True, **keywords)
    return o, lse


@pytest.mark.parametrize("window", [None, 1, 30, 200], ids=lambda w: f"window{w}")
@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["", "softcap"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("k_mean", [False, True], ids=["", "k_mean"])
@pytest.mark.parametrize("seed", range(3))
def test_a_cache_split_at_random_gives_the_whole_back(device, window, softcap, sinks, k_mean, seed):
    rng = np.random.default_rng((seed, window or 0, sinks, k_mean))
    total, num_queries = int(rng.integers(8, 150)), int(rng.integers(1, 6))
    parts = int(rng.integers(1, 8))
    bounds = [0, *sorted(rng.integers(0, total + 1, parts - 1)), total]
    keywords = {
        "k_mean": rows(2, 128, seed=7) if k_mean else None,
        "k_bits": 8, "v_bits": 6, "packing": "plane", "precision": "strict", "device": device,
    }  # fmt: skip
    k, v = rng.standard_normal((2, total, 2, 128)).astype(np.float32)
    q = 3 * rng.standard_normal((num_queries, 4, 128)).astype(np.float32)
    logits = np.array([1.0, NOTHING, 9.0, -4.0], np.float32) if sinks else None

    def cache_of(begin: int, end: int) -> tq_hb.KVCache:
        capacity = None if window is None else max(window, end - begin)
        cache = tq_hb.KVCache(2, 128, capacity, sliding_window=window, **keywords)
        cache.append(k[begin:end], v[begin:end])
        return cache

    whole = cache_of(0, total)
    want, want_lse = whole.attend(q, softcap=softcap, sinks=logits, return_lse=True)
    # The sinks go to a part of which all queries know.
    with_sinks = int(rng.choice([i for i in range(parts) if total - bounds[i] >= num_queries]))
    states = [
        attend_part(
            cache_of(begin, end), q, total - 1 - begin, softcap=softcap, sinks=logits if i == with_sinks else None
        )
        if begin < total
        else empty_state(*q.shape)
        for i, (begin, end) in enumerate(itertools.pairwise(bounds))
    ]
    # In any order and any grouping.
    while len(states) > 1:
        a, b = (states.pop(int(rng.integers(len(states)))) for _ in range(2))
        states.append(tq_hb.merge_states(*a, *b))
    got, lse = states[0]

    assert tolerance.nmse(got, want) <= tolerance.SPLIT_NMSE
    assert tolerance.lse_error(lse, want_lse) <= tolerance.LSE_ERROR
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("head_dim", tq_hb.supported_head_dims())
def test_queries_that_see_nothing(device, head_dim):
    cache = tq_hb.KVCache(2, head_dim, sliding_window=4, device=device)
    x = rows(6, 2, head_dim)
    cache.append(x, x)
    q = rows(3, 4, head_dim, seed=1)

    o, lse = cache.attend(q, q_offset=9, return_lse=True)  # at 7, 8 and 9: the first two see keys 4 and 5, and 5
    assert o[:2].any(axis=-1).all()
    assert np.isfinite(lse[:2]).all()
    assert not o[2].any()
    assert (lse[2] == NOTHING).all()

    sinks = np.array([0.5, NOTHING, -3.0, 20.0], np.float32)
    o, lse = cache.attend(q, q_offset=50, return_lse=True, sinks=sinks)
    assert not o.any()
    assert np.allclose(lse, np.broadcast_to(sinks, lse.shape), rtol=1e-6)


class TestMerge:
    def test_against_the_softmax_of_both_sets(self):
        q, k, v = rows(4, 64), rows(1, 90, 64, seed=1), rows(1, 90, 64, seed=2)
        a, b = (
            reference.attend(q, k[:, part], v[:, part], scale=0.3, return_lse=True)
            for part in (slice(0, 35), slice(35, 90))
        )
        o, lse = tq_hb.merge_states(*a, *b)
        want, want_lse = reference.attend(q, k, v, scale=0.3, return_lse=True)
        assert o.dtype == lse.dtype == np.float32
        assert tolerance.nmse(o, want) <= tolerance.SPLIT_NMSE
        assert tolerance.lse_error(lse, want_lse) <= tolerance.LSE_ERROR

    def test_an_empty_state_changes_no_bit_of_the_other(self):
        o, lse = rows(5, 3, 64), rows(5, 3, seed=1)
        o[0, 0, :3] = [-0.0, 1e-42, np.inf]
        for other in (np.zeros_like(o), np.full_like(o, np.nan)):
            empty = other, np.full_like(lse, NOTHING)
            for merged in (tq_hb.merge_states(o, lse, *empty), tq_hb.merge_states(*empty, o, lse)):
                assert merged[0].tobytes() == o.tobytes()
                assert merged[1].tobytes() == lse.tobytes()

    def test_two_empty_states_are_empty(self):
        nan = np.full((2, 64), np.nan, np.float32)
        o, lse = tq_hb.merge_states(nan, np.full(2, NOTHING, np.float32), *empty_state(2, 64))
        assert not o.any()
        assert not np.signbit(o).any()
        assert (lse == NOTHING).all()

    @pytest.mark.parametrize("shift", [-3e38, -1e4, 1e4, 3e38])
    def test_large_logarithms_do_not_overflow(self, shift):
        a, b = rows(2, 64), rows(2, 64, seed=1)
        o, lse = tq_hb.merge_states(a, np.full(2, shift, np.float32), b, np.full(2, shift, np.float32))
        assert np.allclose(o, (a + b) / 2, atol=1e-6)
        assert np.allclose(lse, shift + np.log(2), rtol=1e-6)

    def test_states_of_very_different_weight(self):
        a, b = rows(2, 64), rows(2, 64, seed=1)
        o, lse = tq_hb.merge_states(a, np.full(2, -3e38, np.float32), b, np.full(2, 3e38, np.float32))
        assert np.array_equal(o, b)
        assert np.array_equal(lse, np.full(2, 3e38, np.float32))

    def test_scalars_for_a_single_row(self):
        o, lse = tq_hb.merge_states(rows(64), np.float32(1), rows(64, seed=1), np.float32(1))
        assert o.shape == (64,)
        assert np.shape(lse) == ()
        assert np.isclose(lse, 1 + np.log(2))

    @pytest.mark.parametrize("shape", [(0, 4, 64), (3, 0, 64), (2, 0)], ids=str)
    def test_nothing_to_merge(self, shape):
        o, lse = tq_hb.merge_states(*empty_state(*shape), *empty_state(*shape))
        assert o.shape == shape
        assert lse.shape == shape[:-1]

    def test_dtypes(self):
        state = rows(2, 64).astype(np.float16), rows(2)
        assert tq_hb.merge_states(*state, *state)[0].dtype == np.float16
        assert tq_hb.merge_states(*state, state[0].astype(np.float32), state[1])[0].dtype == np.float32
        wide = state[0].astype(np.float64), state[1].astype(np.float64)
        assert [x.dtype for x in tq_hb.merge_states(*wide, *wide)] == [np.float32, np.float32]

    def test_libraries(self):
        torch = pytest.importorskip("torch")
        state = torch.ones(2, 64, dtype=torch.bfloat16), torch.zeros(2)
        o, lse = tq_hb.merge_states(*state, *state)
        assert (type(o), o.dtype, type(lse), lse.dtype) == (torch.Tensor, torch.bfloat16, torch.Tensor, torch.float32)
        assert torch.equal(o, state[0])
        assert np.allclose(lse, np.log(2))

    def test_the_inputs_are_left_as_they_are(self):
        states = [rows(2, 64), np.array([0, NOTHING], np.float32), rows(2, 64, seed=1), rows(2)]
        before = [x.copy() for x in states]
        tq_hb.merge_states(*states)
        assert all(np.array_equal(x, y) for x, y in zip(states, before, strict=True))

    @pytest.mark.parametrize("field", ["lse_a", "lse_b"])
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_logarithm_that_cannot_be_is_refused(self, field, value):
        state = {"o_a": rows(2, 64), "lse_a": rows(2), "o_b": rows(2, 64), "lse_b": rows(2)}
        state[field] = np.array([0, value], np.float32)
        with pytest.raises(tq_hb.InvalidArgument, match=f"merge_states: {field} must be finite or -inf, got {value}"):
            tq_hb.merge_states(**state)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("o_a", np.float32(1)), ("o_b", rows(2, 63)), ("o_b", rows(3, 64)), ("lse_a", rows(3)),
            ("lse_a", rows(2, 1)), ("lse_b", np.float32(1)), ("lse_b", rows(1)), ("o_a", np.ones((2, 64), int)),
            ("lse_b", [0.0, 0.0]),
        ],
    )  # fmt: skip
    def test_shapes_and_types_are_checked(self, field, value):
        state = {"o_a": rows(2, 64), "lse_a": rows(2), "o_b": rows(2, 64), "lse_b": rows(2)}
        with pytest.raises(tq_hb.InvalidArgument, match=f"^merge_states: {field} must"):
            tq_hb.merge_states(**{**state, field: value})
