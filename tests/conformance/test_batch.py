"""BatchedKVCache: every sequence of a batch is, bit for bit, what it would be in a cache of its own."""

from __future__ import annotations

import copy
import threading
import time

import numpy as np
import pytest

import tq_hb

HEADS, KV_HEADS = 4, 2


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def content(cache: tq_hb.KVCache) -> tuple[int, int, bytes, bytes]:
    k, v = cache.dequantize()
    return len(cache), cache.offset, k.tobytes(), v.tobytes()


def contents(batch: tq_hb.BatchedKVCache) -> list[tuple[int, int, bytes, bytes]]:
    return [content(batch[slot]) for slot in range(batch.num_slots)]


def filled(counts: tuple[int, ...] = (5, 3, 9), capacity: int = 20, **keywords) -> tq_hb.BatchedKVCache:
    """A batch with a sequence of its own length in every slot."""
    batch = tq_hb.BatchedKVCache(len(counts), KV_HEADS, 64, capacity, **keywords)
    k, v = rows(2, len(counts), max(counts), KV_HEADS, 64)
    batch.append(range(len(counts)), k, v, counts=counts)
    return batch


WINDOWS = [None, 12, [None, 1, 12, 30, 7]]
FORMATS = [
    {"head_dim": 64, "k_bits": 6, "v_bits": 5, "packing": "plane", "k_mean": True},
    {"head_dim": 256, "k_bits": 8, "v_bits": 6, "codebook": "mlx_native"},
    {"head_dim": 512, "k_bits": 5, "v_bits": 5, "packing": "plane"},
]


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: "d{head_dim}k{k_bits}v{v_bits}".format(**form))
def test_a_batch_equals_single_caches(device, windows, form):
    """Sequences come, grow by ragged runs, and go; others take their slots."""
    form = dict(form)
    head_dim, slots, capacity = form.pop("head_dim"), 5, 64
    if form.get("k_mean"):
        form["k_mean"] = rows(KV_HEADS, head_dim, seed=99)
    each = windows if isinstance(windows, list) else [windows] * slots
    rng = np.random.default_rng((head_dim, len(str(windows))))
    batch = tq_hb.BatchedKVCache(slots, KV_HEADS, head_dim, capacity, sliding_window=windows, device=device, **form)
    singles = [
        tq_hb.KVCache(KV_HEADS, head_dim, capacity, sliding_window=window, device=device, **form) for window in each
    ]
    for _ in range(14):
        chosen = rng.permutation(slots)[: rng.integers(1, slots + 1)]
        for slot in chosen:
            if singles[slot].offset > 45 and (each[slot] is None or rng.random() < 0.4):
                batch.reset(slot)
                singles[slot].clear()
        most = int(rng.integers(0, 17))
        k, v = rng.standard_normal((2, len(chosen), most, KV_HEADS, head_dim)).astype(np.float32)
        counts = rng.integers(0, most + 1, len(chosen))
        for index, count in enumerate(counts):
            k[index, count:], v[index, count:] = np.nan, np.inf

        batch.append(chosen, k, v, counts=counts)
        for index, (slot, count) in enumerate(zip(chosen, counts, strict=True)):
            singles[slot].append(k[index, :count], v[index, :count])

        assert batch.lengths.tolist() == [len(cache) for cache in singles]
        assert batch.offsets.tolist() == [cache.offset for cache in singles]
        num_queries = int(rng.integers(1, 4))
        ready = [slot for slot in chosen if len(singles[slot]) >= num_queries]
        q = rng.standard_normal((len(ready), num_queries, HEADS, head_dim)).astype(np.float32)
        sinks = rng.standard_normal(HEADS).astype(np.float32) if rng.random() < 0.5 else None
        out, lse = batch.attend(ready, q, softcap=3.0, sinks=sinks, return_lse=True)
        for index, slot in enumerate(ready):
            alone, its_lse = singles[slot].attend(q[index], softcap=3.0, sinks=sinks, return_lse=True)
            assert out[index].tobytes() == alone.tobytes()
            assert lse[index].tobytes() == its_lse.tobytes()
            assert batch[slot].last_plan == singles[slot].last_plan
    assert contents(batch) == [content(cache) for cache in singles]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: "d{head_dim}k{k_bits}v{v_bits}".format(**form))
def test_one_token_per_sequence(device, form):
    """Without an axis of tokens it is what it is with one of length 1."""
    form = dict(form)
    head_dim = form.pop("head_dim")
    if form.get("k_mean"):
        form["k_mean"] = rows(KV_HEADS, head_dim, seed=99)
    short, long = (tq_hb.BatchedKVCache(3, KV_HEADS, head_dim, 5, device=device, **form) for _ in range(2))
    k, v = rows(2, 2, KV_HEADS, head_dim)
    for counts in (None, [1, 1], [0, 1]):
        short.append([2, 0], k, v, counts=counts)
        long.append([2, 0], k[:, None], v[:, None], counts=counts)
    assert short.lengths.tolist() == [3, 0, 2]
    assert contents(short) == contents(long)


def test_one_query_per_sequence(device):
    batch = filled(device=device)
    q = rows(2, HEADS, 64, seed=1)
    out = batch.attend([2, 0], q)
    assert out.shape == q.shape
    for index, slot in enumerate((2, 0)):
        assert np.array_equal(out[index], batch[slot].attend(q[index]))


def test_several_questions_to_one_sequence(device):
    batch = filled(device=device)
    q = rows(3, HEADS, 64, seed=1)
    out = batch.attend([1, 1, 2], q)
    assert [np.array_equal(out[i], batch[slot].attend(q[i])) for i, slot in enumerate((1, 1, 2))] == [True] * 3


@pytest.mark.parametrize("q_offset", [30, [7, 4, 30], np.array([4, 2, 8], np.int32), (4, 2, 8)], ids=str)
def test_positions_for_all_or_for_each(device, q_offset):
    batch = filled(device=device, sliding_window=[None, 9, 9])
    q = rows(3, 2, HEADS, 64, seed=1)
    out, lse = batch.attend([0, 1, 2], q, q_offset=q_offset, return_lse=True)
    for slot in range(3):
        position = q_offset if isinstance(q_offset, int) else int(q_offset[slot])
        alone, its_lse = batch[slot].attend(q[slot], q_offset=position, return_lse=True)
        assert np.array_equal(out[slot], alone)
        assert np.array_equal(lse[slot], its_lse)


def test_a_sequence_without_tokens_beside_others(device):
    batch = filled(device=device)
    batch.reset(1)
    q, sinks = rows(3, HEADS, 64, seed=1), np.array([1, 2, -np.inf, 4], np.float32)
    with pytest.raises(tq_hb.InvalidArgument, match="attend: slot 1: cache must hold"):
        batch.attend([0, 1, 2], q)

    out, lse = batch.attend([0, 1, 2], q, q_offset=9, sinks=sinks, return_lse=True)
    assert not out[1].any()
    assert np.array_equal(lse[1], sinks)
    assert batch[1].last_plan.kernels == ()
    for slot in (0, 2):
        assert np.array_equal(out[slot], batch[slot].attend(q[slot], sinks=sinks))


def test_out_is_filled_and_returned(device):
    batch, q = filled(device=device), rows(2, HEADS, 64, seed=1)
    for dtype in (np.float32, np.float16):
        out = np.zeros((2, HEADS, 64), dtype)
        assert batch.attend([0, 2], q.astype(dtype), out=out) is out
        assert np.array_equal(out, batch.attend([0, 2], q.astype(dtype)))


def test_one_step_of_the_core_serves_all(device, monkeypatch):
    batch, steps = filled(device=device), []

    def count(name):
        step = getattr(tq_hb._core, name)
        monkeypatch.setattr(tq_hb._core, name, lambda *arguments: steps.append(name) or step(*arguments))

    count("append")
    count("attend")
    batch.append([0, 1, 2], *rows(2, 3, 1, KV_HEADS, 64))
    batch.attend([0, 1, 2], rows(3, HEADS, 64))
    assert steps == ["append", "attend"]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda batch: batch.copy()], ids=["copy", "deep", ""])
def test_a_copy_has_sequences_of_its_own(device, duplicate):
    batch = filled(sliding_window=[None, 4, 8], device=device, k_bits=6, packing="plane")
    before, first = contents(batch), batch[0]
    q, token = rows(3, HEADS, 64), rows(3, KV_HEADS, 64, seed=1)
    attended = batch.attend([0, 1, 2], q)

    twin = duplicate(batch)

    assert contents(twin) == before
    assert (twin.capacity, twin.nbytes, twin[1].sliding_window) == (batch.capacity, batch.nbytes, 4)
    assert np.array_equal(twin.attend([0, 1, 2], q), attended)
    twin.append([0, 1, 2], token, token)
    twin.reset(2)
    assert contents(batch) == before
    assert batch[0] is first
    batch.append([0, 1, 2], token, token)
    assert contents(batch)[:2] == contents(twin)[:2]
    assert (len(batch[2]), len(twin[2])) == (10, 0)


def forbidden(*_):
    raise AssertionError("memory was asked for")


class TestMemory:
    @pytest.mark.parametrize(
        ("slots", "capacity", "windows"),
        [
            (2**32 - 1, 1, None),
            (2**32 - 1, 1, 1),
            (3 * 10**8, 1000, None),
            (2**31, 2**31, 5),
            (2, 2**32 - 1, [1, None]),
        ],
    )
    def test_more_slots_than_fit_are_refused_before_any_is_made(self, device, monkeypatch, slots, capacity, windows):
        monkeypatch.setattr(tq_hb.KVCache, "_make", forbidden)
        message = rf"^BatchedKVCache: {slots} slots take \d+ bytes, more than the \w+( device)?'s memory of \d+$"
        with pytest.raises(tq_hb.OutOfMemoryError, match=message):
            tq_hb.BatchedKVCache(slots, 1 if slots > 2 else 2**20, 64, capacity, sliding_window=windows, device=device)

    def test_objects_of_slots_count_too(self, device, monkeypatch):
        monkeypatch.setattr(tq_hb.KVCache, "_make", forbidden)
        limit = tq_hb.Device("cpu").limits.max_buffer_bytes
        with pytest.raises(tq_hb.OutOfMemoryError, match="more than the host's memory of "):
            tq_hb.BatchedKVCache(limit // 1000, 1, 64, 1, device=device)


class TestSlots:
    def test_the_same_object_every_time(self):
        batch = filled()
        assert batch[1] is batch[1]
        assert batch[np.int64(1)] is batch[1]
        assert [cache is batch[slot] for slot, cache in enumerate(batch)] == [True] * 3

    def test_storage_is_shared_both_ways(self):
        batch = filled()
        one, x = batch[1], rows(2, KV_HEADS, 64, seed=5)
        one.append(x, -x)
        assert batch.lengths.tolist() == [5, 5, 9]
        one.trim(4)
        assert batch.offsets.tolist() == [5, 1, 9]
        batch.append([1], x[None], x[None])
        assert len(one) == 3
        one.clear()
        assert batch.lengths.tolist() == [5, 0, 9]

    def test_a_slot_does_not_grow(self):
        batch = filled()
        batch[0].reserve(20)
        with pytest.raises(tq_hb.InvalidArgument, match="reserve: n must be <= the capacity of 20, got 21"):
            batch[0].reserve(21)
        x = rows(16, KV_HEADS, 64)
        with pytest.raises(tq_hb.InvalidArgument, match="append"):
            batch[0].append(x, x)

    def test_a_copy_leaves_the_batch(self):
        batch = filled()
        twin = batch[0].copy()
        twin.clear()
        assert batch.lengths.tolist() == [5, 3, 9]

    def test_windows(self):
        assert [cache.sliding_window for cache in filled(sliding_window=8)] == [8, 8, 8]
        assert [cache.sliding_window for cache in filled(sliding_window=[8, None, 20])] == [8, None, 20]
        assert [cache.sliding_window for cache in filled(sliding_window=np.array([8, 9, 20]))] == [8, 9, 20]

    def test_sizes(self):
        batch = tq_hb.BatchedKVCache(3, KV_HEADS, 64, 50, k_bits=6, v_bits=5, packing="plane")
        assert (batch.num_slots, batch.capacity) == (3, 50)
        assert 1.0 <= batch.nbytes / (3 * 50 * KV_HEADS * (48 + 40 + 8)) <= 1.1
        assert batch.lengths.dtype.kind == batch.offsets.dtype.kind == "i"
        assert "num_slots=3" in repr(batch)


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("num_slots", 0), ("num_slots", 1.5), ("num_slots", -1), ("num_kv_heads", 0), ("head_dim", 96),
            ("capacity", 0), ("capacity", None), ("k_bits", 7), ("packing", "nibble"), ("codebook", "x"),
            ("sliding_window", 0), ("sliding_window", 2.5), ("sliding_window", [3, 0]), ("sliding_window", [3, "a"]),
            ("sliding_window", [3]), ("sliding_window", [3, 4, 5]), ("precision", "fast"), ("device", "tpu"),
        ],
    )  # fmt: skip
    def test_of_the_constructor(self, name, value):
        arguments = {"num_slots": 2, "num_kv_heads": 1, "head_dim": 64, "capacity": 10, name: value}
        with pytest.raises(tq_hb.InvalidArgument, match=f"^BatchedKVCache: {name} must.*got"):
            tq_hb.BatchedKVCache(**arguments)

    @pytest.mark.parametrize("windows", [11, [3, 11], [None, 2**32 - 1]], ids=str)
    def test_of_windows_beyond_the_capacity(self, windows):
        with pytest.raises(tq_hb.InvalidArgument, match="^BatchedKVCache: capacity must be >= sliding_window.*got 10"):
            tq_hb.BatchedKVCache(2, 1, 64, 10, sliding_window=windows)

    @pytest.mark.parametrize(
        "slots",
        [[0, 3], [-1, 0], [0, 1.0], [0.0, 1.0], [2**40, 0], np.array([0, 3]), np.array([-1, 0]), np.array([0.0, 1.0]),
         np.array([[0, 1]]), [True, False], np.array([True, False]), [None, 1], ["0", "1"], "01", None, 3],
        ids=repr,
    )  # fmt: skip
    def test_of_slots(self, slots):
        batch = filled()
        before = contents(batch)
        x = rows(2, 1, KV_HEADS, 64)
        with pytest.raises(tq_hb.InvalidArgument, match="^BatchedKVCache.append: slots .*got"):
            batch.append(slots, x, x)
        with pytest.raises(tq_hb.InvalidArgument, match="^BatchedKVCache.attend: slots .*got"):
            batch.attend(slots, rows(2, HEADS, 64))
        assert contents(batch) == before

    def test_of_a_slot_twice(self):
        batch = filled()
        before = contents(batch)
        x = rows(3, 1, KV_HEADS, 64)
        with pytest.raises(tq_hb.InvalidArgument, match="append: slots must name each slot once, got 2 twice"):
            batch.append([2, 0, 2], x, x)
        assert contents(batch) == before

    @pytest.mark.parametrize("slot", [3, -1, 1.0, "1", None, slice(0, 2)], ids=repr)
    def test_of_single_slots(self, slot):
        batch = filled()
        with pytest.raises(tq_hb.InvalidArgument, match="^BatchedKVCache: slot must"):
            batch[slot]
        with pytest.raises(tq_hb.InvalidArgument, match="^BatchedKVCache.reset: slot must"):
            batch.reset(slot)

    @pytest.mark.parametrize("counts", [[1], [1, 4], [1, -1], [1, 1.0], np.array([1, 4]), [[1, 1]], 1, "11"], ids=repr)
    def test_of_counts(self, counts):
        batch = filled()
        before = contents(batch)
        x = rows(2, 3, KV_HEADS, 64)
        with pytest.raises(tq_hb.InvalidArgument, match="^BatchedKVCache.append: counts must.*got"):
            batch.append([0, 1], x, x, counts=counts)
        assert contents(batch) == before

    def test_of_counts_beyond_one_token(self):
        batch = filled()
        before = contents(batch)
        x = rows(2, KV_HEADS, 64)
        with pytest.raises(
            tq_hb.InvalidArgument, match="append: counts must be at most the 1 tokens of k and v, got 2"
        ):
            batch.append([0, 1], x, x, counts=[1, 2])
        assert contents(batch) == before

    @pytest.mark.parametrize("field", ["k", "v"])
    def test_of_a_bad_row_of_one_token(self, device, field):
        batch = filled(device=device)
        before = contents(batch)
        x = {"k": rows(3, KV_HEADS, 64), "v": rows(3, KV_HEADS, 64)}
        x[field][2, 1, 5] = np.nan
        with pytest.raises(tq_hb.InvalidArgument, match=rf"append: {field}\[2\].*token 0.*head 1"):
            batch.append([0, 1, 2], **x)
        assert contents(batch) == before

    def test_of_one_token_that_does_not_fit(self, device):
        batch = filled(capacity=9, device=device)
        before = contents(batch)
        x = rows(3, KV_HEADS, 64)
        with pytest.raises(tq_hb.InvalidArgument, match="append: slot 2: tokens must fit in the capacity of 9"):
            batch.append([0, 1, 2], x, x)
        assert contents(batch) == before

    @pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
    @pytest.mark.parametrize("field", ["k", "v"])
    def test_of_a_bad_row_in_one_sequence(self, device, bad, field):
        batch = filled(device=device)
        before = contents(batch)
        x = {"k": rows(3, 4, KV_HEADS, 64), "v": rows(3, 4, KV_HEADS, 64)}
        x[field][2, 1, 1] = bad
        with pytest.raises(tq_hb.InvalidArgument, match=rf"append: {field}\[2\].*token 1.*head 1"):
            batch.append([0, 1, 2], **x)
        assert contents(batch) == before
        batch.append([0, 1, 2], **x, counts=[4, 4, 1])
        assert batch.lengths.tolist() == [9, 7, 10]

    def test_of_a_sequence_that_does_not_fit(self, device):
        batch = filled(device=device)
        before = contents(batch)
        x = rows(3, 12, KV_HEADS, 64)
        with pytest.raises(
            tq_hb.InvalidArgument, match=r"append: slot 2: tokens must fit in the capacity of 20 \(.*\), got 21"
        ):
            batch.append([0, 1, 2], x, x)
        assert contents(batch) == before
        batch.append([0, 1, 2], x, x, counts=[12, 12, 11])
        assert batch.lengths.tolist() == [17, 15, 20]

    @pytest.mark.parametrize(
        ("k_shape", "v_shape"),
        [
            ((3, 1, 2, 64), (3, 1, 2, 64)), ((2, 1, 3, 64), (2, 1, 3, 64)), ((2, 1, 2, 128), (2, 1, 2, 128)),
            ((2, 1, 2, 64), (2, 2, 2, 64)), ((2, 2, 64), (2, 2, 2, 64)), ((3, 2, 64), (3, 2, 64)),
            ((2, 3, 64), (2, 3, 64)), ((2, 2, 128), (2, 2, 128)), ((2, 2, 64), (3, 2, 64)), ((2, 64), (2, 64)),
            ((1, 2, 1, 2, 64), (1, 2, 1, 2, 64)),
        ],
    )  # fmt: skip
    def test_of_shapes(self, k_shape, v_shape):
        batch = filled()
        before = contents(batch)
        with pytest.raises(tq_hb.InvalidArgument, match="^BatchedKVCache.append: [kv] must have"):
            batch.append([0, 1], rows(*k_shape), rows(*v_shape))
        assert contents(batch) == before

    def test_of_shapes_name_both_forms(self):
        message = r"append: k must have shape \(2, 2, 64\) or \(2, tokens, 2, 64\), got \(3, 2, 64\)$"
        with pytest.raises(tq_hb.InvalidArgument, match=message):
            filled().append([0, 1], rows(3, 2, 64), rows(3, 2, 64))

    @pytest.mark.parametrize("shape", [(3, 4, 64), (4, 64), (2, 1, 1, 4, 64), (2, 3, 64), (2, 4, 128), (2, 0, 4, 64)])
    def test_of_queries(self, shape):
        with pytest.raises(tq_hb.InvalidArgument, match="^BatchedKVCache.attend: q must"):
            filled().attend([0, 1], rows(*shape))

    def test_of_a_query_that_is_not_finite(self, device):
        q = rows(2, 3, HEADS, 64)
        q[1, 2, 3, 5] = np.nan
        with pytest.raises(tq_hb.InvalidArgument, match=r"attend: q\[1\].*token 2.*head 3"):
            filled(device=device).attend([0, 2], q)

    @pytest.mark.parametrize("q_offset", [-1, 1.5, "1", [1, 2], [1, 2, -3], [[1, 2, 3]], np.zeros(3)], ids=repr)
    def test_of_positions(self, q_offset):
        with pytest.raises(tq_hb.InvalidArgument, match="^BatchedKVCache.attend: q_offset must.*got"):
            filled().attend([0, 1, 2], rows(3, HEADS, 64), q_offset=q_offset)

    def test_of_more_queries_than_one_sequence_has_positions(self):
        out = np.zeros((3, 4, HEADS, 64), np.float32)
        with pytest.raises(tq_hb.InvalidArgument, match="attend: slot 1: q must hold at most 3 queries.*got 4"):
            filled().attend([0, 1, 2], rows(3, 4, HEADS, 64), out=out)
        assert not out.any()


@pytest.mark.parametrize("queries", [(), (2,)])
def test_no_sequences_and_no_tokens(device, queries):
    batch = filled(device=device)
    before = contents(batch)
    batch.append([], rows(0, 3, KV_HEADS, 64), rows(0, 3, KV_HEADS, 64))
    batch.append([], rows(0, KV_HEADS, 64), rows(0, KV_HEADS, 64))
    batch.append([0, 1], rows(2, 0, KV_HEADS, 64), rows(2, 0, KV_HEADS, 64))
    batch.append([0, 1], rows(2, 3, KV_HEADS, 64), rows(2, 3, KV_HEADS, 64), counts=[0, 0])
    assert contents(batch) == before
    out, lse = batch.attend([], rows(0, *queries, HEADS, 64), return_lse=True)
    assert out.shape == (0, *queries, HEADS, 64)
    assert lse.shape == (0, *queries, HEADS)


def test_libraries_and_dtypes(device):
    torch = pytest.importorskip("torch")
    batch = filled(device=device)
    x = torch.from_numpy(rows(2, 2, KV_HEADS, 64)).to(torch.bfloat16)
    batch.append(torch.tensor([2, 1]), x, x, counts=torch.tensor([2, 1], dtype=torch.int32))
    assert batch.lengths.tolist() == [5, 4, 11]
    out, lse = batch.attend(torch.tensor([2, 1]), x.repeat_interleave(2, 2)[:, 0], return_lse=True)
    assert (type(out), out.dtype, type(lse), lse.dtype) == (torch.Tensor, torch.bfloat16, torch.Tensor, torch.float32)


def test_batched_and_single_calls_from_several_threads_do_not_deadlock(device):
    """Calls that name the same slots in opposite orders, and calls on the sequences themselves."""
    batch = tq_hb.BatchedKVCache(4, KV_HEADS, 64, 2000, device=device)
    x, q = rows(4, 1, KV_HEADS, 64), rows(4, HEADS, 64)
    batch.append(range(4), x, x)
    rounds = 10

    def forwards() -> None:
        batch.append([0, 1, 2, 3], x, x)
        batch.attend([0, 1, 2, 3], q)

    def backwards() -> None:
        batch.append([3, 2, 1, 0], x, x)
        batch.attend([3, 1, 2, 0], q)

    def alone() -> None:
        for slot in (2, 0, 3, 1):
            batch[slot].append(x[slot], x[slot])
            batch[slot].attend(q[slot])

    def repeat(work) -> None:
        for _ in range(rounds):
            work()

    threads = [threading.Thread(target=repeat, args=(work,), daemon=True) for work in (forwards, backwards, alone) * 2]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 120
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads)
    assert batch.lengths.tolist() == [1 + 6 * rounds] * 4
