"""KVCache as a container: what it holds, forgets, refuses and reports."""

from __future__ import annotations

import copy
import hashlib
import itertools
import re

import numpy as np
import pytest

import tq_hb


def tokens(count: int, heads: int = 2, head_dim: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, heads, head_dim)).astype(np.float32)


def content(cache: tq_hb.KVCache) -> tuple[int, int, str, str]:
    """Everything that can be read from a cache, the vectors as checksums."""
    k, v = (hashlib.sha256(x.tobytes()).hexdigest() for x in cache.dequantize())
    return len(cache), cache.offset, k, v


def filled(count: int, capacity: int | None = None, **keywords) -> tq_hb.KVCache:
    cache = tq_hb.KVCache(2, 256, capacity, **keywords)
    x = tokens(count)
    cache.append(x, -x)
    return cache


def same_as(cache: tq_hb.KVCache, kept: np.ndarray) -> bool:
    """Whether the cache holds exactly these tokens (and their negatives as values)."""
    fresh = tq_hb.KVCache(2, 256)
    fresh.append(kept, -kept)
    return content(cache)[2:] == content(fresh)[2:]


class TestConstruction:
    def test_attributes(self, device):
        cache = tq_hb.KVCache(
            2, 512, 100, k_bits=6, v_bits=5, sliding_window=64, codebook="mlx_native", precision="strict", device=device
        )
        assert (cache.num_kv_heads, cache.head_dim, cache.capacity) == (2, 512, 100)
        assert (cache.k_bits, cache.v_bits, cache.sliding_window) == (6, 5, 64)
        assert (cache.codebook, cache.packing, cache.precision) == ("mlx_native", "byte", "strict")
        assert (len(cache), cache.offset, cache.last_plan) == (0, 0, None)

    def test_defaults(self):
        cache = tq_hb.KVCache(1, 256)
        assert (cache.k_bits, cache.v_bits, cache.sliding_window) == (8, 8, None)
        assert (cache.codebook, cache.packing, cache.precision) == ("lloyd_max", "byte", "default")

    def test_the_capacity_of_a_ring_is_its_window_by_default(self):
        assert tq_hb.KVCache(1, 256, sliding_window=100).capacity == 100

    def test_no_attribute_looks_like_another_librarys_quantised_cache(self):
        cache = tq_hb.KVCache(1, 256)
        assert not hasattr(cache, "bits")
        assert not hasattr(cache, "group_size")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("num_kv_heads", 0), ("num_kv_heads", -1), ("num_kv_heads", 1.5), ("num_kv_heads", "2"),
            ("head_dim", 0), ("head_dim", 96), ("head_dim", -256), ("head_dim", 256.5),
            ("capacity", 0), ("capacity", -1), ("capacity", 2.5), ("capacity", 2**40),
            ("k_bits", 4), ("k_bits", 7), ("k_bits", 8.5), ("v_bits", 0), ("v_bits", -5), ("v_bits", 16),
            ("sliding_window", 0), ("sliding_window", -1), ("sliding_window", 1.5),
            ("codebook", "uniform"), ("packing", "nibble"), ("packing", None), ("precision", "fast"),
        ],
    )  # fmt: skip
    def test_refusals(self, name, value):
        with pytest.raises(tq_hb.InvalidArgument, match=f"KVCache.*{name}.*got.*{value}"):
            tq_hb.KVCache(**{"num_kv_heads": 1, "head_dim": 256, name: value})

    def test_a_ring_must_hold_its_window(self):
        with pytest.raises(tq_hb.InvalidArgument, match="KVCache.*capacity.*sliding_window.*got 31"):
            tq_hb.KVCache(1, 256, 31, sliding_window=32)


class TestMeanKey:
    def test_it_is_copied_on_the_way_in_and_out(self):
        mean = tokens(1)[0]
        kept = mean.copy()
        cache = tq_hb.KVCache(2, 256, k_mean=mean)
        mean[:] = 7
        assert np.array_equal(cache.k_mean, kept)
        cache.k_mean[:] = 7
        assert np.array_equal(cache.k_mean, kept)
        assert tq_hb.KVCache(2, 256).k_mean is None

    @pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
    def test_it_is_rounded_to_float32(self, dtype):
        mean = tokens(1)[0].astype(dtype)
        got = tq_hb.KVCache(2, 256, k_mean=np.asfortranarray(mean)).k_mean
        assert got.dtype == np.float32
        assert np.array_equal(got, mean.astype(np.float32))

    @pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 255), (1, 2, 256), (2, 256, 1)], ids=str)
    def test_shapes_are_checked(self, shape):
        with pytest.raises(tq_hb.InvalidArgument, match=r"^KVCache: k_mean must have shape \(2, 256\), got"):
            tq_hb.KVCache(2, 256, k_mean=np.zeros(shape, np.float32))

    @pytest.mark.parametrize(
        "value", [0.0, "mean", [[0.0] * 256] * 2, np.zeros((2, 256), int)], ids=["0", "str", "list", "int"]
    )
    def test_it_must_be_an_array_of_floats(self, value):
        with pytest.raises(tq_hb.InvalidArgument, match="^KVCache: k_mean must .*got"):
            tq_hb.KVCache(2, 256, k_mean=value)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
    def test_it_must_be_finite_in_float32(self, value):
        mean = np.zeros((2, 256))
        mean[1, 3] = value
        with pytest.raises(tq_hb.InvalidArgument, match="^KVCache: k_mean must be finite, got .* at head 1"):
            tq_hb.KVCache(2, 256, k_mean=mean)

    def test_what_is_encoded_is_the_difference_in_float32(self):
        mean, x = 3 * tokens(1, seed=1)[0], tokens(5)
        cache, plain = tq_hb.KVCache(2, 256, k_bits=5, k_mean=mean), tq_hb.KVCache(2, 256, k_bits=5)
        cache.append(x, x)
        plain.append(x - mean, x)
        (k, v), (plain_k, plain_v) = cache.dequantize(), plain.dequantize()
        assert np.array_equal(k, plain_k + mean)
        assert np.array_equal(v, plain_v)

    def test_plain_attention_takes_the_same_bits_as_without(self):
        """Nothing else enters the softmax, so the mean key may stay out."""
        mean, x, q = 3 * tokens(1, seed=1)[0], tokens(5), tokens(3, 4, seed=2)
        cache, plain = tq_hb.KVCache(2, 256, k_mean=mean), tq_hb.KVCache(2, 256)
        cache.append(x, x)
        plain.append(x - mean, x)
        assert np.array_equal(cache.attend(q), plain.attend(q))

    def test_a_difference_that_overflows_is_refused(self):
        cache = tq_hb.KVCache(2, 256, k_mean=np.full((2, 256), -3e38, np.float32))
        with pytest.raises(tq_hb.InvalidArgument, match="append: k"):
            cache.append(np.full((2, 256), 3e38, np.float32), np.ones((2, 256), np.float32))
        assert len(cache) == 0

    def test_a_copy_has_it(self):
        cache = tq_hb.KVCache(2, 256, k_mean=tokens(1)[0])
        cache.append(tokens(3), tokens(3))
        assert np.array_equal(cache.copy().k_mean, tokens(1)[0])
        assert content(cache.copy()) == content(cache)


class TestAppend:
    @pytest.mark.parametrize("keywords", [{}, {"capacity": 8}, {"sliding_window": 8}], ids=str)
    def test_one_token_without_its_axis_is_a_run_of_one(self, keywords):
        x = tokens(3)
        one_by_one, run = tq_hb.KVCache(2, 256, **keywords), tq_hb.KVCache(2, 256, **keywords)
        for t in range(3):
            one_by_one.append(x[t], x[t])
        run.append(x, x)
        assert content(one_by_one) == content(run)

    def test_no_tokens_change_nothing(self):
        cache = filled(3)
        before = content(cache)
        cache.append(tokens(0), tokens(0))
        assert content(cache) == before

    def test_a_linear_cache_refuses_what_does_not_fit(self):
        cache = filled(6, 8)
        before = content(cache)
        with pytest.raises(
            tq_hb.InvalidArgument,
            match=r"^KVCache.append: tokens must fit in the capacity of 8 \(.*sliding_window.*\), got 9$",
        ):
            cache.append(tokens(3), tokens(3))
        assert content(cache) == before
        cache.append(tokens(2), tokens(2))
        assert len(cache) == cache.capacity == 8

    def test_a_growing_cache_keeps_its_content(self):
        cache = tq_hb.KVCache(2, 256)
        assert cache.capacity == 0
        x = tokens(300)
        for start in range(0, 300, 7):
            cache.append(x[start : start + 7], -x[start : start + 7])
        assert len(cache) == cache.offset == 300
        assert 300 <= cache.capacity <= 1024
        assert same_as(cache, x)

    def test_growth_is_by_doubling(self):
        cache = tq_hb.KVCache(1, 256)
        x = tokens(1, 1)
        capacities = []
        for _ in range(600):
            cache.append(x, x)
            if not capacities or cache.capacity != capacities[-1]:
                capacities.append(cache.capacity)
        assert all(b == 2 * a for a, b in itertools.pairwise(capacities))

    @pytest.mark.parametrize("capacity", [None, 10])
    @pytest.mark.parametrize("runs", [(5,), (8,), (9,), (8, 1), (3, 4, 5), (100,), (1,) * 25, (7, 30, 2)], ids=str)
    def test_a_ring_keeps_the_newest(self, runs, capacity):
        x = tokens(sum(runs))
        cache = tq_hb.KVCache(2, 256, capacity, sliding_window=8)
        start = 0
        for n in runs:
            cache.append(x[start : start + n], -x[start : start + n])
            start += n
        held = min(sum(runs), capacity or 8)
        assert (len(cache), cache.offset) == (held, sum(runs))
        assert same_as(cache, x[-held:])

    @pytest.mark.parametrize(
        ("k_shape", "v_shape", "field"),
        [
            ((3, 2, 256), (2, 2, 256), "v"),
            ((3, 1, 256), (3, 1, 256), "k"),
            ((3, 2, 512), (3, 2, 512), "k"),
            ((3, 2, 256), (3, 2, 128), "v"),
            ((256,), (256,), "k"),
            ((1, 3, 2, 256), (1, 3, 2, 256), "k"),
        ],
        ids=str,
    )
    def test_shapes_that_do_not_fit_are_refused(self, k_shape, v_shape, field):
        cache = filled(3)
        before = content(cache)
        with pytest.raises(tq_hb.InvalidArgument, match=f"append.*{field}.*got"):
            cache.append(np.ones(k_shape, np.float32), np.ones(v_shape, np.float32))
        assert content(cache) == before

    @pytest.mark.parametrize(
        "bad", [np.ones((3, 2, 256), np.int32), [[1.0]], None, "k"], ids=["int32", "list", "None", "str"]
    )
    def test_what_is_no_float_array_is_refused(self, bad):
        cache = filled(3)
        with pytest.raises(tq_hb.InvalidArgument, match="append.*k"):
            cache.append(bad, tokens(3))
        with pytest.raises(tq_hb.InvalidArgument, match="append.*v"):
            cache.append(tokens(3), bad)
        assert len(cache) == 3

    @pytest.mark.parametrize("shape", [(3, 256), (2, 64), (256,), (3, 2, 64), (1, 3, 2, 256)], ids=str)
    def test_a_wrong_shape_is_told_as_it_was_given(self, shape):
        x, rule = np.ones(shape, np.float32), "must have shape (2, 256) or (tokens, 2, 256)"
        with pytest.raises(tq_hb.InvalidArgument, match=re.escape(f"KVCache.append: k {rule}, got {shape}")):
            tq_hb.KVCache(2, 256).append(x, x)


class TestAttend:
    def test_an_empty_cache_is_refused(self):
        with pytest.raises(tq_hb.InvalidArgument, match="attend"):
            tq_hb.KVCache(2, 256).attend(np.ones((4, 256), np.float32))
        cache = filled(3)
        cache.clear()
        with pytest.raises(tq_hb.InvalidArgument, match="attend"):
            cache.attend(np.ones((4, 256), np.float32))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("scale", float("nan")), ("scale", float("inf")), ("scale", 1e300), ("scale", "1"),
            ("softcap", -1.0), ("softcap", float("nan")), ("softcap", float("inf")), ("softcap", "1"),
            ("softcap", None), ("softcap", 1e-50), ("softcap", 1e-40),
        ],
    )  # fmt: skip
    def test_bad_numbers_are_refused(self, name, value):
        with pytest.raises(tq_hb.InvalidArgument, match=f"^KVCache.attend: {name} .*got"):
            filled(3).attend(np.ones((4, 256), np.float32), **{name: value})

    @pytest.mark.parametrize("shape", [(3, 256), (4, 512), (0, 256), (256,), (1, 1, 4, 256), (0, 4, 256)], ids=str)
    def test_queries_that_do_not_fit_are_refused(self, shape):
        with pytest.raises(tq_hb.InvalidArgument, match="attend.*(q|num_heads).*got"):
            filled(3).attend(np.ones(shape, np.float32))

    def test_the_default_scale_is_that_of_the_head_size(self):
        for head_dim in (256, 512):
            cache = tq_hb.KVCache(1, head_dim)
            x = tokens(5, 1, head_dim)
            cache.append(x, x)
            q = tokens(1, 2, head_dim, seed=1)[0]
            assert np.array_equal(cache.attend(q), cache.attend(q, scale=head_dim**-0.5))
            assert not np.array_equal(cache.attend(q), cache.attend(q, scale=1.0))

    def test_a_single_query_keeps_its_leading_axis(self):
        cache, q = filled(5), tokens(1, 4)
        assert cache.attend(q).shape == (1, 4, 256)
        assert np.array_equal(cache.attend(q)[0], cache.attend(q[0]))

    def test_out_is_filled_and_returned(self):
        cache, q = filled(5), tokens(1, 4)[0]
        out = np.zeros((4, 256), np.float32)
        assert cache.attend(q, out=out) is out
        assert np.array_equal(out, cache.attend(q))

    @pytest.mark.parametrize(
        "out",
        [np.zeros((4, 255), np.float32), np.zeros((4, 256), np.float16), np.zeros((4, 512), np.float32)[:, ::2]],
        ids=["shape", "dtype", "strides"],
    )
    def test_a_bad_out_is_refused(self, out):
        with pytest.raises(tq_hb.InvalidArgument, match="attend.*out"):
            filled(5).attend(tokens(1, 4)[0], out=out)
        assert not out.any()

    def test_an_out_in_the_memory_of_q_is_refused(self):
        q = tokens(1, 4)[0]
        before = q.copy()
        with pytest.raises(tq_hb.InvalidArgument, match="attend.*overlap"):
            filled(5).attend(q, out=q)
        assert np.array_equal(q, before)

    def test_attending_changes_nothing(self):
        cache = filled(12, sliding_window=8)
        before = content(cache)
        first = cache.attend(tokens(1, 4)[0])
        assert np.array_equal(cache.attend(tokens(1, 4)[0]), first)
        assert content(cache) == before

    def test_the_plan_is_frozen_and_says_what_ran(self):
        cache = filled(5)
        cache.attend(tokens(1, 4)[0])
        plan = cache.last_plan
        assert isinstance(plan.kernels, tuple)
        assert plan.kernels
        assert plan.precision in ("strict", "default")
        assert plan.threadgroup_bytes >= 0
        with pytest.raises(AttributeError):
            plan.nsg = 2

    @pytest.mark.parametrize("shape", [(4, 256), (3, 4, 256)], ids=str)
    def test_lse_has_a_value_for_each_query_and_head(self, shape):
        cache, q = filled(5), np.zeros(shape, np.float32)
        out, lse = cache.attend(q, return_lse=True)
        assert (out.shape, lse.shape, lse.dtype) == (shape, shape[:-1], np.float32)
        seen = np.full(shape[:-1], 5.0) if len(shape) == 2 else np.repeat([[3.0], [4.0], [5.0]], 4, axis=1)
        assert np.allclose(lse, np.log(seen))

    def test_asking_for_lse_does_not_change_the_output(self):
        cache, q = filled(40), tokens(3, 4, seed=1)
        assert np.array_equal(cache.attend(q), cache.attend(q, return_lse=True)[0])

    def test_out_and_lse_together(self):
        cache, q = filled(5), tokens(2, 4)
        out = np.zeros(q.shape, np.float32)
        got, lse = cache.attend(q, out=out, return_lse=True)
        want, want_lse = cache.attend(q, return_lse=True)
        assert got is out
        assert np.array_equal(out, want)
        assert np.array_equal(lse, want_lse)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_lse_comes_in_the_library_of_q_and_in_float32(self, dtype):
        torch = pytest.importorskip("torch")
        q = torch.from_numpy(tokens(2, 4)).to(getattr(torch, dtype))
        out, lse = filled(5).attend(q, return_lse=True, sinks=torch.zeros(4, dtype=q.dtype))
        assert (type(lse), lse.dtype, tuple(lse.shape)) == (torch.Tensor, torch.float32, (2, 4))
        assert out.dtype == (torch.float32 if dtype == "float64" else q.dtype)

    @pytest.mark.parametrize(
        "sinks",
        [np.zeros(3, np.float32), np.zeros((1, 4), np.float32), np.zeros(4, int), 0.0, [0.0] * 4,
         np.array([0, np.nan, 0, 0], np.float32), np.array([0, 0, np.inf, 0], np.float32), np.array([0, 0, 1e39, 0])],
        ids=str,
    )  # fmt: skip
    def test_bad_sinks_are_refused(self, sinks):
        with pytest.raises(tq_hb.InvalidArgument, match="^KVCache.attend: sinks must.*got"):
            filled(3).attend(np.ones((4, 256), np.float32), sinks=sinks)

    def test_a_sink_of_minus_infinity_is_none(self):
        cache, q = filled(40), tokens(2, 4, seed=1)
        with_lse = cache.attend(q, sinks=np.full(4, -np.inf, np.float32), return_lse=True)
        assert [np.array_equal(a, b) for a, b in zip(with_lse, cache.attend(q, return_lse=True), strict=True)] == [
            True,
            True,
        ]

    @pytest.mark.parametrize("value", [None, 1, "yes", np.ones(2, bool)], ids=str)
    def test_return_lse_is_a_flag(self, value):
        with pytest.raises(tq_hb.InvalidArgument, match="^KVCache.attend: return_lse must be True or False"):
            filled(3).attend(np.ones((4, 256), np.float32), return_lse=value)


class TestPositions:
    @pytest.mark.parametrize("value", [-1, 1.5, "1", 2**63, [1], np.zeros(2, int)], ids=str)
    def test_what_is_no_position_is_refused(self, value):
        with pytest.raises(tq_hb.InvalidArgument, match="^KVCache.attend: q_offset must be an integer from 0.*got"):
            filled(3).attend(np.ones((4, 256), np.float32), q_offset=value)

    @pytest.mark.parametrize("q_offset", [2, np.int32(2), np.uint8(2), np.array(2)], ids=repr)
    def test_the_newest_by_default(self, q_offset):
        cache, q = filled(3), tokens(2, 4)
        assert np.array_equal(cache.attend(q), cache.attend(q, q_offset=q_offset))

    @pytest.mark.parametrize("keywords", [{}, {"sliding_window": 8}], ids=str)
    def test_as_far_beyond_the_keys_as_positions_go(self, keywords):
        cache, q = filled(5, **keywords), tokens(2, 4)
        far = cache.attend(q, q_offset=2**63 - 1)
        assert np.array_equal(far, np.zeros_like(q) if keywords else cache.attend(q, q_offset=5))

    def test_more_queries_than_positions_are_refused(self):
        cache, out = filled(3), np.zeros((4, 4, 256), np.float32)
        with pytest.raises(tq_hb.InvalidArgument, match="^KVCache.attend: q must hold at most 3 queries.*got 4"):
            cache.attend(tokens(4, 4), out=out)
        with pytest.raises(tq_hb.InvalidArgument, match="^KVCache.attend: q must hold at most 2 queries.*got 4"):
            cache.attend(tokens(4, 4), q_offset=1, out=out)
        assert not out.any()
        cache.attend(tokens(4, 4), q_offset=3)

    @pytest.mark.parametrize("keywords", [{}, {"capacity": 9}, {"sliding_window": 9}], ids=str)
    def test_looking_back_equals_a_trimmed_cache(self, keywords):
        cache, q = filled(9, **keywords), tokens(2, 4, seed=1)
        back = cache.attend(q, q_offset=5)
        cache.trim(3)
        assert np.array_equal(cache.attend(q), back)

    @pytest.mark.parametrize(("window", "capacity", "queries"), [(8, 8, 1), (8, 12, 5), (1, 1, 1), (1, 4, 4)])
    def test_a_full_ring_serves_as_many_queries_as_it_has_spare_slots(self, window, capacity, queries):
        cache = filled(40, capacity, sliding_window=window)
        cache.attend(tokens(queries, 4))
        with pytest.raises(tq_hb.InvalidArgument, match=f"^KVCache.attend: q must see only.*a capacity of {window} "):
            cache.attend(tokens(queries + 1, 4))
        with pytest.raises(tq_hb.InvalidArgument, match="attend: q must see only keys that are still held"):
            cache.attend(tokens(queries, 4), q_offset=38)
        cache.attend(tokens(queries + 1, 4), q_offset=40)

    def test_an_empty_cache_with_a_position_gives_nothing(self, device):
        for cache in (tq_hb.KVCache(2, 256, device=device), tq_hb.KVCache(2, 256, 10, device=device)):
            q, out = tokens(3, 4), np.ones((3, 4, 256), np.float32)
            got, lse = cache.attend(q, q_offset=7, out=out, return_lse=True)
            assert got is out
            assert not out.any()
            assert (lse == -np.inf).all()
            sinks = np.array([1, -np.inf, 0, -2], np.float32)
            assert np.array_equal(cache.attend(q, q_offset=7, sinks=sinks, return_lse=True)[1], np.tile(sinks, (3, 1)))
            assert cache.last_plan == tq_hb.Plan(device.backend, (), 0, 0, "strict", 0)

    @pytest.mark.parametrize(
        ("name", "value"), [("scale", float("nan")), ("softcap", -1.0), ("q_offset", 1), ("sinks", np.zeros(3))]
    )
    def test_an_empty_cache_checks_its_arguments_too(self, name, value):
        out = np.ones((3, 4, 256), np.float32)
        with pytest.raises(tq_hb.InvalidArgument, match="^KVCache.attend"):
            tq_hb.KVCache(2, 256).attend(tokens(3, 4), **{"q_offset": 7, "out": out, name: value})
        assert (out == 1).all()

    def test_a_cleared_cache_counts_from_zero(self):
        cache = filled(12, sliding_window=8)
        cache.clear()
        cache.append(tokens(2), -tokens(2))
        assert np.array_equal(cache.attend(tokens(2, 4)), filled(2).attend(tokens(2, 4)))
        with pytest.raises(tq_hb.InvalidArgument, match="at most 2 queries"):
            cache.attend(tokens(3, 4))


class TestTrim:
    def test_a_linear_cache_forgets_its_newest(self):
        cache = filled(10)
        cache.trim(3)
        assert (len(cache), cache.offset) == (7, 7)
        assert same_as(cache, tokens(10)[:7])
        more = tokens(2, seed=1)
        cache.append(more, -more)
        assert same_as(cache, np.concatenate([tokens(10)[:7], more]))

    def test_nothing_and_everything(self):
        cache = filled(10)
        before = content(cache)
        cache.trim(0)
        assert content(cache) == before
        cache.trim(10)
        assert (len(cache), cache.offset) == (0, 0)

    @pytest.mark.parametrize("n", [11, -1, 1.5, "1", 2**70])
    def test_refusals(self, n):
        cache = filled(10)
        with pytest.raises(tq_hb.InvalidArgument, match="trim.*got"):
            cache.trim(n)
        assert len(cache) == 10

    def test_a_ring_that_overwrote_nothing_trims_like_a_linear_cache(self):
        cache = filled(8, sliding_window=8)
        cache.trim(5)
        assert (len(cache), cache.offset) == (3, 3)
        assert same_as(cache, tokens(8)[:3])

    def test_a_wrapped_ring_without_spare_slots_cannot_be_trimmed(self):
        cache = filled(9, sliding_window=8)
        before = content(cache)
        with pytest.raises(tq_hb.InvalidArgument, match="trim.*got 1"):
            cache.trim(1)
        assert content(cache) == before

    def test_a_wrapped_ring_with_spare_slots_can_be_trimmed_by_them(self):
        cache = filled(15, 12, sliding_window=8)
        with pytest.raises(tq_hb.InvalidArgument, match="trim.*got 5"):
            cache.trim(5)

        cache.trim(4)

        assert (len(cache), cache.offset) == (8, 11)
        assert same_as(cache, tokens(15)[3:11])
        more = tokens(7, seed=1)
        cache.append(more, -more)
        assert (len(cache), cache.offset) == (12, 18)
        assert same_as(cache, np.concatenate([tokens(15)[6:11], more]))

    def test_a_trimmed_ring_attends_to_its_window(self):
        q = tokens(1, 4, seed=2)[0]
        cache = filled(15, 12, sliding_window=8)
        cache.trim(3)
        assert np.array_equal(cache.attend(q), filled(12, sliding_window=8).attend(q))

    def test_a_ring_trimmed_step_by_step_keeps_to_the_rule(self):
        cache = filled(15, 12, sliding_window=8)
        for _ in range(4):
            cache.trim(1)
        with pytest.raises(tq_hb.InvalidArgument, match="trim"):
            cache.trim(1)
        assert same_as(cache, tokens(15)[3:11])


class TestClearCopyReserve:
    @pytest.mark.parametrize("keywords", [{}, {"capacity": 20}, {"sliding_window": 8}], ids=str)
    def test_clear_forgets_everything(self, keywords):
        cache = filled(12, **keywords)
        capacity = cache.capacity
        cache.clear()
        assert (len(cache), cache.offset, cache.capacity) == (0, 0, capacity)
        k, v = cache.dequantize()
        assert k.shape == v.shape == (0, 2, 256)
        cache.append(tokens(5), -tokens(5))
        assert same_as(cache, tokens(5))

    @pytest.mark.parametrize("keywords", [{}, {"capacity": 20}, {"sliding_window": 8}], ids=str)
    def test_a_copy_is_independent(self, keywords):
        cache = filled(12, k_bits=6, v_bits=5, codebook="mlx_native", packing="plane", precision="strict", **keywords)
        before = content(cache)
        twin = cache.copy()
        assert content(twin) == before
        for name in ("k_bits", "v_bits", "codebook", "packing", "precision", "sliding_window", "capacity", "nbytes"):
            assert getattr(twin, name) == getattr(cache, name)

        twin.append(tokens(3), tokens(3))
        assert content(cache) == before
        cache.clear()
        assert twin.offset == 15

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
    def test_the_copy_module_copies_too(self, duplicate):
        cache = filled(12, sliding_window=8)
        before = content(cache)
        twin = duplicate(cache)
        twin.append(tokens(3, seed=1), tokens(3, seed=1))
        assert content(cache) == before

    def test_a_copy_of_an_empty_cache_is_empty(self):
        assert len(tq_hb.KVCache(1, 256).copy()) == 0

    def test_reserve_makes_room_in_all(self):
        cache = filled(10)
        before = content(cache)
        cache.reserve(500)
        assert cache.capacity >= 500
        assert content(cache) == before
        capacity = cache.capacity
        cache.append(tokens(490), -tokens(490))
        assert cache.capacity == capacity
        cache.reserve(3)
        assert cache.capacity == capacity

    @pytest.mark.parametrize("allocations", range(4))
    def test_a_cache_that_cannot_grow_stays_as_it_was(self, monkeypatch, allocations):
        cache = filled(10)
        before, capacity = content(cache), cache.capacity
        empty, left = cache.device.empty, iter(range(allocations))

        def allocate(*arguments):
            if next(left, None) is None:
                raise tq_hb.OutOfMemoryError("no memory is left")
            return empty(*arguments)

        monkeypatch.setattr(cache.device, "empty", allocate)
        with pytest.raises(tq_hb.OutOfMemoryError):
            cache.reserve(1000)
        monkeypatch.undo()

        assert cache.capacity == capacity
        assert content(cache) == before
        cache.append(tokens(100), -tokens(100))

    @pytest.mark.parametrize("n", [-1, 1.5, "8", 2**70])
    def test_reserve_refuses_what_is_no_count(self, n):
        with pytest.raises(tq_hb.InvalidArgument, match="reserve.*got"):
            filled(1).reserve(n)


class TestSizes:
    @pytest.mark.parametrize(("head_dim", "per_head"), [(256, 520), (512, 1040)])
    @pytest.mark.parametrize("heads", [1, 3])
    def test_bytes(self, head_dim, per_head, heads):
        cache = tq_hb.KVCache(heads, head_dim, 1000)
        assert cache.bytes_per_token == per_head * heads
        assert 1.0 <= cache.nbytes / (cache.capacity * cache.bytes_per_token) <= 1.1

    @pytest.mark.parametrize("head_dim", tq_hb.supported_head_dims())
    @pytest.mark.parametrize(("k_bits", "v_bits"), [(8, 8), (8, 6), (6, 5), (5, 5)])
    def test_planes_take_their_bits(self, head_dim, k_bits, v_bits):
        cache = tq_hb.KVCache(3, head_dim, 1000, k_bits=k_bits, v_bits=v_bits, packing="plane")
        norms = 2 * 4 * (head_dim // 256 or 1)
        assert cache.bytes_per_token == 3 * (head_dim * (k_bits + v_bits) // 8 + norms)
        assert 1.0 <= cache.nbytes / (cache.capacity * cache.bytes_per_token) <= 1.1
        assert tq_hb.KVCache(3, head_dim, k_bits=k_bits, v_bits=v_bits).bytes_per_token == 3 * (2 * head_dim + norms)

    def test_an_empty_growing_cache_takes_no_memory(self):
        cache = tq_hb.KVCache(1, 256)
        assert cache.nbytes == 0
        cache.append(tokens(1, 1), tokens(1, 1))
        assert cache.nbytes >= cache.bytes_per_token

    def test_no_memory_beyond_its_bytes_is_allocated(self):
        """A cache that also kept the vectors themselves would be four times as large."""
        cache = filled(1000, 1000)
        assert cache.nbytes <= 1.1 * 1000 * 2 * 520

    def test_repr_says_what_it_is(self):
        text = repr(filled(5, k_bits=6))
        assert "KVCache" in text
        assert "6" in text
