"""Host arrays on devices that cannot use all host memory in place: copied in, and back after success only."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

import tq_hb
from tq_hb.staging import Outstanding, Staging


class CopyingCore:
    """The cpu as a device that uses no host memory but that of its own buffers."""

    def __init__(self):
        self._core = tq_hb.Device("cpu")._core
        self.copies: list[str] = []

    def __getattr__(self, name):
        return getattr(self._core, name)

    def wrap(self, op, field, array):
        base = array
        while isinstance(base, np.ndarray):
            base = base.base
        return self._core.wrap(op, field, array) if isinstance(base, tq_hb.Buffer) else None

    def copy_in(self, op, field, array):
        self.copies.append(field)
        return self._core.copy_in(op, field, array)


@pytest.fixture
def copying() -> tq_hb.Device:
    device = tq_hb.Device("cpu")
    device._core = CopyingCore()
    return device


@pytest.fixture(params=["in place", "copied"])
def core(request, copying):
    return tq_hb.Device("cpu")._core if request.param == "in place" else copying._core


class TestStaging:
    def test_what_is_read_has_the_contents(self, core):
        x = np.arange(6, dtype=np.float32).reshape(2, 3)
        assert np.array_equal(Staging("op", core).read("x", x).numpy(), x)

    def test_what_is_updated_keeps_what_was_not_written(self, core):
        x = np.arange(512, dtype=np.float32).reshape(2, 256)
        staging, encoder = Staging("op", core), core.make_encoder()
        encoder.fwht("op", tq_hb._core.Fwht.PLAIN, staging.update("x", x)[1:])
        staging.run(encoder)
        assert np.array_equal(x[0], np.arange(256))
        assert not np.array_equal(x[1], np.arange(256, 512))

    def test_what_is_filled_comes_back(self, core):
        out = np.full((2, 1, 256), 7.0, np.float32)
        codes, norms = np.zeros((1, 2, 256), np.uint8), np.ones((1, 2), np.float32)
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=0, cache_capacity=2)
        staging, encoder = Staging("op", core), core.make_encoder()
        arguments = staging.read("codes", codes), staging.read("norms", norms), staging.fill("out", out)
        encoder.dequantize("op", hp, 0, *arguments, "lloyd_max")
        staging.run(encoder)
        np.testing.assert_allclose(out, tq_hb.codebook(8)[0] / 16, rtol=1e-6)

    def test_copies_go_back_only_after_success(self, copying):
        x = np.full((1, 256), np.nan, np.float32)
        packed, norms = np.full((1, 1, 256), 9, np.uint8), np.full((1, 1), 9.0, np.float32)
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=0, cache_capacity=1)
        staging, encoder = Staging("op", copying._core), copying._core.make_encoder()
        target = "", staging.read("x", x), staging.fill("packed", packed), staging.fill("norms", norms), 8
        encoder.hadamard_quantize("op", hp, [target], "lloyd_max")
        with pytest.raises(tq_hb.InvalidArgument, match="finite"):
            staging.run(encoder)
        assert (packed == 9).all()
        assert (norms == 9.0).all()


class TestOps:
    """Every op gives on copies what it gives in place."""

    def test_quantize(self, copying):
        x = np.random.default_rng(0).standard_normal((5, 256), np.float32)
        for got, want in zip(tq_hb.quantize(x, 6, device=copying), tq_hb.quantize(x, 6, device="cpu"), strict=True):
            assert np.array_equal(got, want)
        assert copying._core.copies == ["x"]

    @pytest.mark.parametrize("op", [tq_hb.flash_attn_vec_tq_hb, tq_hb.flash_attn_vec_tq_hb_with_fused_undo])
    def test_encode_attend_and_decode(self, copying, op):
        rng = np.random.default_rng(1)
        k, v = rng.standard_normal((2, 6, 2, 256), np.float32)
        q = rng.standard_normal((4, 256), np.float32)
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=2, write_pos=2, cache_capacity=8)
        p = tq_hb.FlashAttnVecTqHbParams(
            num_heads=4, num_kv_heads=2, head_dim=256, kv_seq_len=8, kv_capacity=8, scale=0.0625
        )
        results = []
        for device in ("cpu", copying):
            k_packed, v_packed = np.full((2, 2, 8, 256), 3, np.uint8)
            k_norms, v_norms = np.full((2, 2, 8), 0.5, np.float32)
            tq_hb.hadamard_quantize_kv_hb_dual(k, v, k_packed, v_packed, k_norms, v_norms, hp, device=device)
            out = np.zeros((4, 256), np.float32)
            assert op(q, k_packed, k_norms, v_packed, v_norms, p, out=out, device=device) is out
            decoded = tq_hb.tq_dequantize_hb_kv(k_packed, k_norms, hp, pos=7, device=device)
            results.append([k_packed, v_packed, k_norms, v_norms, out, decoded])
        for in_place, copied in zip(*results, strict=True):
            assert np.array_equal(in_place, copied)

    def test_overlaps_are_seen_although_copies_have_none(self, copying):
        storage = np.zeros(12 * 256 + 12 * 4, np.uint8)
        packed, norms = storage[: 12 * 256].reshape(1, 12, 256), storage[12 * 256 - 8 : -8].view(np.float32)[None]
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=0, cache_capacity=12)
        with pytest.raises(tq_hb.InvalidArgument, match="norms must not overlap packed"):
            tq_hb.hadamard_quantize_kv_hb(np.ones((1, 256), np.float32), packed, norms, hp, device=copying)
        assert not storage.any()

    def test_buffers_of_the_device_are_used_in_place(self, copying):
        src = copying.array(np.ones((1, 256), np.float32))
        packed, norms = copying.empty((1, 4, 256), np.uint8), copying.empty((1, 4))
        copying._core.copies.clear()
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=1, cache_capacity=4)
        tq_hb.hadamard_quantize_kv_hb(src, packed, norms, hp, device=copying)
        assert norms.numpy().tolist() == [[0.0, 16.0, 0.0, 0.0]]
        assert copying._core.copies == []


def test_a_view_that_starts_anywhere_in_a_buffer_is_an_array_like_any_other(device):
    values = np.random.default_rng(3).standard_normal(515)
    view = device.array(values.astype(np.float32)).numpy()[3:].reshape(2, 256)
    for got, want in zip(tq_hb.quantize(view, 8, device=device), tq_hb.quantize(view.copy(), 8), strict=True):
        assert np.array_equal(got, want)


class TestKVCache:
    def test_a_cache_works_on_copies(self, copying):
        rng = np.random.default_rng(2)
        caches = [tq_hb.KVCache(2, 256, sliding_window=16, v_bits=5, device=device) for device in ("cpu", copying)]
        for _ in range(3):
            k, v = rng.standard_normal((2, 9, 2, 256), np.float32)
            q = rng.standard_normal((4, 256), np.float32)
            for cache in caches:
                cache.append(k, v)
            want, got = (cache.attend(q) for cache in caches)
            assert np.array_equal(got, want)
        for want, got in zip(*(cache.dequantize() for cache in caches), strict=True):
            assert np.array_equal(got, want)

    def test_append_takes_arrays_from_anywhere(self, device):
        x = np.random.default_rng(3).standard_normal((2, 33, 2, 256), np.float32)
        contents = []
        for offset in (0, 1, 3):
            cache = tq_hb.KVCache(2, 256, device=device)
            k, v = (tq_hb.empty(rows.size + offset)[offset:].reshape(rows.shape) for rows in x)
            k[:], v[:] = x
            cache.append(k, v)
            contents.append(cache.dequantize())
        for k, v in contents[1:]:
            assert np.array_equal(k, contents[0][0])
            assert np.array_equal(v, contents[0][1])

    def test_recorded_runs_write_what_an_append_does(self, device):
        x = np.random.default_rng(4).standard_normal((2, 3, 5, 2, 256), np.float32)
        counts = [5, 1, 4]
        batches = [tq_hb.BatchedKVCache(3, 2, 256, 8, k_bits=6, v_bits=5, device=device) for _ in range(2)]
        batches[0].append([2, 0, 1], *x, counts=counts)

        core, recorded = device._core, batches[1]
        encoder = core.make_encoder()
        places = enumerate(zip([2, 0, 1], counts, strict=True))
        runs = [recorded[slot]._append_run("op", i, n) for i, (slot, n) in places]
        buffers = [device.array(rows) for rows in x]
        tq_hb._core.record_append(encoder, recorded._form.core_format, True, *buffers, runs)
        encoder.commit()
        encoder.wait()
        for slot, count in zip([2, 0, 1], counts, strict=True):
            recorded[slot]._count(count)
            for want, got in zip(*(batch[slot].dequantize() for batch in batches), strict=True):
                assert len(got) == count
                assert np.array_equal(got, want)

    def test_an_error_of_a_recorded_run_has_its_name(self, device):
        batch, x = tq_hb.BatchedKVCache(2, 1, 256, 8, device=device), np.ones((2, 3, 1, 256), np.float32)
        x[1, 2, 0, 7] = np.nan
        encoder, rows = device._core.make_encoder(), device.array(x)
        runs = [batch[slot]._append_run(f"slot {slot}", slot, 3) for slot in range(2)]
        tq_hb._core.record_append(encoder, batch._form.core_format, True, rows, rows, runs)
        encoder.commit()
        with pytest.raises(tq_hb.InvalidArgument, match="^slot 1: src_k must be finite .* at token 2"):
            encoder.wait()

    def test_attention_takes_arrays_from_anywhere(self, device):
        rng = np.random.default_rng(4)
        cache = tq_hb.KVCache(2, 256, device=device)
        cache.append(*rng.standard_normal((2, 33, 2, 256), np.float32))
        shapes = {"q": (4, 256), "sinks": (4,), "out": (4, 256)}
        results = []
        for offset in (0, 1, 3):
            arrays = {name: tq_hb.empty(1024 + offset)[offset:][: np.prod(shape)] for name, shape in shapes.items()}
            arrays = {name: array.reshape(shapes[name]) for name, array in arrays.items()}
            arrays["q"][:] = np.linspace(-1, 1, 1024).reshape(4, 256)
            arrays["sinks"][:] = [0.5, -np.inf, 1.0, 2.0]
            out, lse = cache.attend(**arrays, return_lse=True)
            assert out is arrays["out"]
            results.append((out, lse))
        for out, lse in results[1:]:
            assert np.array_equal(out, results[0][0])
            assert np.array_equal(lse, results[0][1])


class TestSharing:
    """``Device.array(x, copy=...)``."""

    @pytest.fixture
    def device(self, device):
        if device.backend == "cuda":
            pytest.skip("the host cannot reach the memory of a cuda device: see tests/cuda")
        return device

    @pytest.mark.parametrize("copy", [None, False], ids=str)
    @pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.uint32])
    def test_page_aligned_arrays_are_shared_by_every_device(self, device, copy, dtype):
        x = tq_hb.empty((3, 256), dtype)
        buf = device.array(x, copy=copy)
        x[1] = 5
        assert (buf.numpy()[1] == 5).all()
        buf.numpy()[2] = 6
        assert (x[2] == 6).all()

    def test_the_cpu_shares_any_memory(self):
        x = np.zeros(7, np.uint8)[1:]
        tq_hb.Device("cpu").array(x, copy=False).numpy()[0] = 1
        assert x[0] == 1

    def test_a_shared_array_outlives_its_name(self, device):
        buf = device.array(tq_hb.empty(3), copy=False)
        assert buf.numpy().tolist() == [0.0, 0.0, 0.0]

    def test_an_op_works_in_the_arrays_memory(self, device):
        x = tq_hb.empty((2, 256))
        x[:] = 1.0
        encoder = device.encoder()
        encoder.fwht_sign_premult_f32(device.array(x, copy=False))
        encoder.commit_and_wait()
        assert np.array_equal(x, tq_hb.rotate(np.ones((2, 256), np.float32)))

    def test_a_view_of_a_buffer_is_shared(self, device):
        buf = device.empty((4, 256))
        device.array(buf.numpy()[1:3], copy=False).numpy()[0] = 1.0
        assert buf.numpy().sum(axis=1).tolist() == [0.0, 256.0, 0.0, 0.0]

    def test_what_cannot_be_shared_is_copied_only_if_that_is_allowed(self, copying):
        x = np.ones(300, np.float32)
        buf = copying.array(x, copy=None)
        x[:] = 0
        assert (buf.numpy() == 1).all()
        with pytest.raises(tq_hb.InvalidArgument, match=r"^Device.array: x must be page-aligned.*tq_hb\.empty.*got"):
            copying.array(x, copy=False)

    UNSHAREABLE = {  # noqa: RUF012
        "read-only": lambda: np.frombuffer(b"\0" * 1024, np.float32),
        "strided": lambda: tq_hb.empty((4, 512))[:, ::2],
        "float64": lambda: tq_hb.empty((4, 256), np.float64),
        "byte-swapped": lambda: tq_hb.empty(256, np.dtype(np.float32).newbyteorder()),
    }

    @pytest.mark.parametrize("kind", UNSHAREABLE)
    def test_what_a_device_may_not_write_is_never_shared(self, device, kind):
        x = self.UNSHAREABLE[kind]()
        with pytest.raises(tq_hb.InvalidArgument, match=r"^Device.array: x must.*got"):
            device.array(x, copy=False)
        buf = device.array(x, copy=None)
        assert buf.dtype == np.float32
        assert buf.dtype.isnative
        assert np.array_equal(buf.numpy(), x)
        assert not np.may_share_memory(buf.numpy(), x)

    @pytest.mark.parametrize("copy", ["yes", 1, 0.0], ids=repr)
    def test_copy_is_one_of_three(self, device, copy):
        with pytest.raises(tq_hb.InvalidArgument, match=r"^Device.array: copy must be.*got"):
            device.array(np.ones(3, np.float32), copy=copy)

    def test_nothing_is_shared_without_being_asked(self, device):
        x = tq_hb.empty(8)
        assert not np.may_share_memory(device.array(x).numpy(), x)

    def test_mlx_arrays_are_read_only(self, device):
        mx = pytest.importorskip("mlx.core")
        with pytest.raises(tq_hb.InvalidArgument, match="mlx"):
            device.array(mx.zeros(3), copy=False)
        assert device.array(mx.ones(3), copy=None).numpy().tolist() == [1.0, 1.0, 1.0]


class OnGpu:
    """What says that it is in the memory of a GPU, which nobody here reads."""

    shape = (4, 1, 256)

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, **keywords):
        raise AssertionError("nobody may ask for it")


class OnGpuInterface:
    """The same without DLPack."""

    @property
    def __cuda_array_interface__(self):
        return {"shape": (4, 1, 256), "typestr": "<f4", "data": (4096, False), "version": 3}


class TestArraysOnAGpu:
    @pytest.mark.parametrize("array", [OnGpu(), OnGpuInterface()], ids=["dlpack", "interface"])
    def test_a_call_that_runs_elsewhere_refuses_them(self, array):
        cache = tq_hb.KVCache(1, 256, device="cpu")
        codes, norms = np.zeros((1, 4, 256), np.uint8), np.zeros((1, 4), np.float32)
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=0, cache_capacity=4)
        calls = {
            "KVCache.append: k": lambda: cache.append(array, array),
            "KVCache.attend: q": lambda: cache.attend(array),
            "quantize: x": lambda: tq_hb.quantize(array, 8, device="cpu"),
            "rotate: x": lambda: tq_hb.rotate(array),
            "hadamard_quantize_kv_hb: src": lambda: tq_hb.hadamard_quantize_kv_hb(
                array, codes, norms, hp, device="cpu"
            ),
            "hadamard_quantize_kv_hb: packed": lambda: tq_hb.hadamard_quantize_kv_hb(
                np.ones((1, 256), np.float32), array, norms, hp, device="cpu"
            ),
            "Device.array: x": lambda: tq_hb.Device("cpu").array(array),
        }
        for where, call in calls.items():
            with pytest.raises(
                tq_hb.InvalidArgument, match=rf"^{where} must be in host memory.*got an array on cuda:0"
            ):
                call()
        assert len(cache) == 0

    @pytest.fixture
    def cuda(self, monkeypatch):
        """The cpu as a device whose arrays are torch's of float32, on a stream that torch is asked for."""
        torch = pytest.importorskip("torch")
        device = tq_hb.Device("cpu")
        device._core = BorrowingCore()
        for module in ("gpu_arrays", "interop", "attention_call", "staging"):
            monkeypatch.setattr(f"tq_hb.{module}.is_on_gpu", lambda x: isinstance(x, torch.Tensor))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=77))
        return device

    @pytest.mark.parametrize("queries", [(), (3,)], ids=str)
    def test_an_empty_caches_sinks_are_copied_by_the_library_that_has_them(self, cuda, queries, monkeypatch):
        torch = pytest.importorskip("torch")
        sinks = torch.tensor([0.5, -torch.inf])
        cache = tq_hb.KVCache(1, 256, device=cuda)
        # numpy() is a copy on the device's stream, which knows nothing of what torch's still computes.
        monkeypatch.setattr(tq_hb.Buffer, "numpy", None)
        out, lse = cache.attend(torch.ones((*queries, 2, 256)), sinks=sinks, q_offset=5, return_lse=True)
        assert not out.any()
        assert torch.equal(lse, sinks.expand(*queries, 2))
        assert cuda._core.orders == [BorrowingCore.NO_ORDER] * 2

    def test_sinks_are_waited_for_where_queries_are_the_hosts(self, cuda):
        torch = pytest.importorskip("torch")
        cache = tq_hb.KVCache(1, 256, device=cuda)
        q = np.ones((2, 256), np.float32)
        _, lse = cache.attend(q, sinks=torch.tensor([0.5, -1.0]), q_offset=5, return_lse=True)
        assert lse.tolist() == [0.5, -1.0]
        assert cuda._core.orders == [BorrowingCore.LEGACY_STREAM]


class BorrowingCore:
    """The cpu as a device on which arrays of another library are, and how each was ordered with its stream."""

    NO_ORDER, LEGACY_STREAM = -1, 1
    backend = "cuda"

    def __init__(self):
        self._core = tq_hb.Device("cpu")._core
        self.orders: list[int] = []

    def __getattr__(self, name):
        return getattr(self._core, name)

    def borrow(self, op, field, array, order):
        self.orders.append(order)
        return self._core.wrap(op, field, array.numpy())

    def is_capturing(self, stream):
        return False


class FakeDevice:
    def __init__(self, capturing=()):
        self._capturing = capturing

    def is_capturing(self, stream):
        return stream in self._capturing


class FakeEncoder:
    """A call that runs until it is told to end, or until somebody waits for one that may end."""

    TIMEOUT = 10.0  # seconds, so that no test hangs

    def __init__(self, *, may_end=True, error=None):
        self.waited_for = threading.Event()
        self.may_end = threading.Event()
        if may_end:
            self.may_end.set()
        self.is_done = False
        self.waits = 0
        self._error = error

    def commit(self):
        pass

    def wait(self):
        self.waits += 1
        self.waited_for.set()
        assert self.may_end.wait(self.TIMEOUT)
        self.is_done = True
        if self._error is not None:
            raise self._error


class TestOutstanding:
    """Calls of several threads and streams on caches that share what a GPU still works on."""

    @pytest.mark.parametrize(
        "then", [lambda calls: calls.wait(), lambda calls: calls.enter(FakeDevice(), 2)], ids=["wait", "enter"]
    )
    def test_a_thread_waits_for_what_another_is_waiting_for(self, then):
        calls, encoder = Outstanding(), FakeEncoder(may_end=False)
        calls.run(FakeDevice(), 1, encoder)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(calls.wait)
            assert encoder.waited_for.wait(encoder.TIMEOUT)
            second = pool.submit(then, calls)
            with pytest.raises(TimeoutError):
                second.result(timeout=0.2)
            encoder.may_end.set()
            for call in (first, second):
                call.result(timeout=encoder.TIMEOUT)
        assert encoder.waits == 1

    def test_a_call_comes_after_those_that_entered_before_and_ran_later(self):
        calls, device, (first, second) = Outstanding(), FakeDevice(), (FakeEncoder(), FakeEncoder())
        calls.enter(device, 1)
        calls.enter(device, 2)
        calls.run(device, 1, first)
        calls.run(device, 2, second)
        calls.enter(device, 2)
        assert first.is_done

    def test_calls_on_one_stream_wait_for_nothing(self):
        calls, device, encoders = Outstanding(), FakeDevice(), [FakeEncoder() for _ in range(3)]
        for encoder in encoders:
            calls.enter(device, 1)
            calls.run(device, 1, encoder)
        encoders[0].is_done = True
        calls.enter(device, 1)
        assert [encoder.waits for encoder in encoders] == [1, 0, 0]  # of what is done, errors are seen

    def test_so_many_calls_are_not_waited_for_and_no_more(self):
        calls, device, encoders = Outstanding(), FakeDevice(), [FakeEncoder() for _ in range(Outstanding.MOST)]
        for encoder in encoders:
            calls.enter(device, None)
            calls.run(device, None, encoder)
        assert not any(encoder.waits for encoder in encoders)
        calls.enter(device, None)
        assert all(encoder.waits == 1 for encoder in encoders)

    def test_every_error_is_raised_once(self):
        calls, device = Outstanding(), FakeDevice()
        encoders = [FakeEncoder(error=ValueError("first")), FakeEncoder(), FakeEncoder(error=ValueError("last"))]
        for encoder in encoders:
            calls.run(device, 1, encoder)
        with pytest.raises(ValueError, match="first"):
            calls.enter(device, 2)
        assert not encoders[1].is_done
        with pytest.raises(ValueError, match="last"):
            calls.wait()
        calls.wait()
        assert [encoder.waits for encoder in encoders] == [1, 1, 1]

    def test_nothing_is_waited_for_while_a_stream_is_captured(self):
        calls, device, (running, captured) = Outstanding(), FakeDevice(capturing=(2,)), (FakeEncoder(), FakeEncoder())
        calls.run(device, 1, running)
        calls.enter(device, 2)
        calls.run(device, 2, captured)
        assert running.waits == 0
        calls.wait()
        assert (running.waits, captured.waits) == (1, 0)
