"""Arrays of torch and cupy on the GPU: used where they are, on the caller's stream, and given back there."""

from __future__ import annotations

import numpy as np
import pytest

import tq_hb

torch = pytest.importorskip("torch")


def normal(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def host(x):
    return x.float().cpu().numpy()


def make_cache(device, **options):
    return tq_hb.KVCache(2, 256, device=device, **options)


@pytest.fixture(params=["torch", "cupy"])
def to_library(request):
    """What makes an array of a library from a tensor on the GPU."""
    if request.param == "torch":
        return lambda x: x
    cupy = pytest.importorskip("cupy")
    return cupy.from_dlpack


class TestCache:
    @pytest.mark.parametrize("options", [{}, {"k_bits": 5, "v_bits": 6, "packing": "plane"}, {"k_mean": True}], ids=str)
    def test_it_holds_and_gives_what_it_does_from_the_host(self, cuda, to_library, options):
        if options.get("k_mean"):
            options = {"k_mean": np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)}
        k, v, q = normal((70, 2, 256), 1), normal((70, 2, 256), 2), normal((3, 8, 256), 3)
        ours, other = make_cache(cuda, **options), make_cache(cuda, **options)
        ours.append(to_library(k), to_library(v))
        other.append(host(k), host(v))
        for side, its in zip(ours.dequantize(), other.dequantize(), strict=True):
            assert np.array_equal(side, its)
        sinks = np.linspace(-1, 1, 8, dtype=np.float32)
        out, lse = ours.attend(to_library(q), softcap=20.0, sinks=sinks, return_lse=True)
        want, want_lse = other.attend(host(q), softcap=20.0, sinks=sinks, return_lse=True)
        assert type(out) is type(to_library(q))
        assert type(lse) is type(out)
        assert np.abs(host(torch.from_dlpack(out)) - want).max() < 1e-5
        assert np.abs(host(torch.from_dlpack(lse)) - want_lse).max() < 1e-4

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_other_dtypes_are_rounded_to_and_from_float32(self, cuda, dtype):
        k, q = normal((9, 2, 256), 1, dtype), normal((4, 256), 2, dtype)
        cache, other = make_cache(cuda), make_cache(cuda)
        cache.append(k, k)
        other.append(host(k), host(k))
        out = cache.attend(q)
        assert out.dtype == (torch.float32 if dtype == torch.float64 else dtype)
        want = torch.from_numpy(other.attend(host(q))).to(out.dtype)
        assert torch.equal(out.cpu(), want)

    def test_strided_tensors_and_such_at_odd_addresses(self, cuda):
        k = normal((2, 9, 256)).transpose(0, 1)
        shifted = normal(9 * 512 + 1)[1:].view(9, 2, 256)
        cache, other = make_cache(cuda), make_cache(cuda)
        cache.append(k, shifted)
        other.append(host(k), host(shifted))
        for side, its in zip(cache.dequantize(), other.dequantize(), strict=True):
            assert np.array_equal(side, its)

    @pytest.mark.parametrize("on_gpu", ["q", "sinks"])
    def test_sinks_may_be_elsewhere_than_queries(self, cuda, on_gpu):
        cache = make_cache(cuda)
        cache.append(normal((9, 2, 256), 1), normal((9, 2, 256), 2))
        arrays = {"q": normal((4, 256), 3), "sinks": normal(4, 4)}
        want = cache.attend(**{name: host(x) for name, x in arrays.items()})
        got = cache.attend(**{name: x if name == on_gpu else host(x) for name, x in arrays.items()})
        assert np.array_equal(host(torch.as_tensor(got)), want)

    def test_the_output_goes_where_it_is_asked_to(self, cuda):
        cache = make_cache(cuda)
        cache.append(normal((9, 2, 256)), normal((9, 2, 256)))
        q = normal((4, 256))
        out = torch.full((4, 256), float("nan"), device="cuda")
        assert cache.attend(q, out=out) is out
        assert torch.equal(out, cache.attend(q))
        halves = torch.zeros((4, 256), device="cuda", dtype=torch.float16)
        assert torch.equal(cache.attend(q.half(), out=halves), cache.attend(q.half()))
        for wrong in (torch.zeros(4, 256), torch.zeros((4, 255), device="cuda"), halves):
            with pytest.raises(tq_hb.InvalidArgument, match=r"^KVCache\.attend: out must"):
                cache.attend(q, out=wrong)

    def test_it_grows_and_is_copied_on_the_gpu(self, cuda):
        k, v = normal((200, 2, 256), 1), normal((200, 2, 256), 2)
        cache, other = make_cache(cuda), make_cache(cuda, capacity=200)
        for first in range(0, 200, 40):
            cache.append(k[first : first + 40], v[first : first + 40])
        other.append(k, v)
        for held in (cache, cache.copy()):
            for side, its in zip(held.dequantize(), other.dequantize(), strict=True):
                assert np.array_equal(side, its)

    def test_a_ring(self, cuda):
        cache, other = (make_cache(cuda, sliding_window=8) for _ in range(2))
        for seed in range(5):
            k = normal((3, 2, 256), seed)
            cache.append(k, k)
            other.append(host(k), host(k))
        q = normal((8, 256))
        assert np.abs(host(cache.attend(q)) - other.attend(host(q))).max() < 1e-6

    def test_a_query_that_sees_nothing(self, cuda):
        out, lse = make_cache(cuda).attend(normal((4, 256)), q_offset=0, return_lse=True)
        assert not out.any()
        assert torch.isinf(lse).all()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
    def test_a_row_that_cannot_be_encoded_is_named_by_a_later_call(self, cuda, bad):
        cache = make_cache(cuda, capacity=8)
        k = normal((3, 2, 256))
        broken = k.clone()
        broken[1, 1] = bad
        cache.append(broken, k)
        with pytest.raises(tq_hb.InvalidArgument, match=r"^KVCache\.append: src_k .*token 1, head 1"):
            cache.dequantize()
        decoded, _ = cache.dequantize()
        assert not decoded[1, 1].any()
        assert decoded[[0, 2]].all(axis=-1).any()

    def test_a_query_that_is_not_finite_is_named_by_a_later_call(self, cuda):
        cache = make_cache(cuda)
        cache.append(normal((3, 2, 256)), normal((3, 2, 256)))
        q = normal((4, 256))
        q[2, 7] = float("nan")
        cache.attend(q)
        with pytest.raises(tq_hb.InvalidArgument, match=r"^KVCache\.attend: q.*head 2"):
            cache.dequantize()

    def test_many_calls_before_anything_waits(self, cuda):
        cache, other = make_cache(cuda, capacity=300), make_cache(cuda, capacity=300)
        k = normal((300, 2, 256))
        for token in k:
            cache.append(token, token)
            cache.attend(normal((4, 256)))
        other.append(k, k)
        assert np.array_equal(cache.dequantize()[0], other.dequantize()[0])


class TestStreams:
    def test_calls_come_after_what_the_caller_did_on_the_stream(self, cuda):
        want = make_cache(cuda)
        k = normal((9, 2, 256))
        want.append(-k, -k)
        cache, stream = make_cache(cuda, capacity=16), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            k.mul_(-1)
            cache.append(k, k)
            q = normal((4, 256))
            out = cache.attend(q) * 1
        stream.synchronize()
        assert np.array_equal(cache.dequantize()[0], want.dequantize()[0])
        assert torch.equal(out, want.attend(q))

    def test_calls_on_several_streams_come_one_after_the_other(self, cuda):
        cache, want = make_cache(cuda, capacity=64), make_cache(cuda, capacity=64)
        k = normal((64, 2, 256))
        torch.cuda.synchronize()
        for first in range(0, 64, 8):
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(2_000_000)
                cache.append(k[first : first + 8], k[first : first + 8])
        want.append(k, k)
        assert np.array_equal(cache.dequantize()[0], want.dequantize()[0])

    def test_a_captured_call_replays_with_what_is_in_its_tensors(self, cuda):
        cache = make_cache(cuda, capacity=300)
        cache.append(normal((300, 2, 256), 1), normal((300, 2, 256), 2))
        q, out = normal((8, 256), 3), torch.empty((8, 256), device="cuda")
        cache.attend(q, out=out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cache.attend(q, out=out)
        for sign in (1, -1):
            q.mul_(sign)
            out.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, cache.attend(q))


class TestBatch:
    def test_it_equals_calls_on_each(self, cuda):
        batch = tq_hb.BatchedKVCache(3, 2, 256, 64, device=cuda)
        k, v, q = normal((2, 9, 2, 256), 1), normal((2, 9, 2, 256), 2), normal((2, 8, 256), 3)
        batch.append([2, 0], k, v, counts=[9, 4])
        out = batch.attend([2, 0], q)
        assert out.is_cuda
        for index, (slot, count) in enumerate([(2, 9), (0, 4)]):
            cache = make_cache(cuda)
            cache.append(k[index, :count], v[index, :count])
            assert torch.equal(out[index], cache.attend(q[index]))
            assert torch.equal(out[index], batch[slot].attend(q[index]))


class TestOps:
    @pytest.mark.parametrize("shape", [(3, 5, 256), (1, 512), (64,), (0, 128)], ids=str)
    def test_quantize(self, cuda, to_library, shape):
        x = normal(shape)
        codes, norms = tq_hb.quantize(to_library(x), 6, packing="plane", device=cuda)
        want_codes, want_norms = tq_hb.quantize(host(x), 6, packing="plane", device="cpu")
        assert type(codes) is type(to_library(x))
        assert np.array_equal(torch.from_dlpack(codes).cpu().numpy(), want_codes)
        assert np.array_equal(host(torch.from_dlpack(norms)), want_norms)

    def test_a_cache_of_tensors(self, cuda, to_library):
        packed, norms = torch.zeros((2, 2, 16, 256), dtype=torch.uint8, device="cuda"), normal((2, 2, 16))
        k_packed, v_packed, k_norms, v_norms = map(to_library, (*packed, *norms))
        k, v, q = normal((16, 2, 256), 1), normal((16, 2, 256), 2), normal((4, 256), 3)
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=2, write_pos=0, cache_capacity=16)
        sides = (k_packed, v_packed, k_norms, v_norms)
        tq_hb.hadamard_quantize_kv_hb_dual(to_library(k), to_library(v), *sides, hp, device=cuda)
        cache = make_cache("cpu")
        cache.append(host(k), host(v))
        p = tq_hb.FlashAttnVecTqHbParams(
            num_heads=4, num_kv_heads=2, head_dim=256, kv_seq_len=16, kv_capacity=16, scale=0.0625, fuse_fwht_pre=1
        )
        out = tq_hb.flash_attn_vec_tq_hb_with_fused_undo(
            to_library(q), k_packed, k_norms, v_packed, v_norms, p, device=cuda
        )
        assert np.abs(host(torch.from_dlpack(out)) - cache.attend(host(q))).max() < 2e-3
        row = tq_hb.tq_dequantize_hb_kv(v_packed, v_norms, hp, pos=3, device=cuda)
        assert np.abs(tq_hb.unrotate(host(torch.from_dlpack(row))) - cache.dequantize()[1][3]).max() < 1e-5

    def test_what_is_read_may_not_be_written(self, cuda):
        k = normal((4, 256))
        p = tq_hb.FlashAttnVecTqHbParams(
            num_heads=4, num_kv_heads=1, head_dim=256, kv_seq_len=4, kv_capacity=4, scale=0.0625
        )
        codes, norms = tq_hb.quantize(normal((1, 4, 256)), 8, device=cuda)
        with pytest.raises(tq_hb.InvalidArgument, match="overlap"):
            tq_hb.flash_attn_vec_tq_hb(k, codes, norms, codes, norms, p, out=k, device=cuda)


class TestRefusals:
    def test_another_device_takes_no_array_on_a_gpu(self, cuda, to_library):
        x = to_library(normal((4, 2, 256)))
        cache = make_cache("cpu")
        calls = {
            "KVCache.append: k": lambda: cache.append(x, x),
            "KVCache.attend: q": lambda: cache.attend(x),
            "quantize: x": lambda: tq_hb.quantize(x, 8, device="cpu"),
            "rotate: x": lambda: tq_hb.rotate(x),
            "Device.array: x": lambda: tq_hb.Device("cpu").array(x),
        }
        for where, call in calls.items():
            with pytest.raises(
                tq_hb.InvalidArgument, match=rf"^{where} must be in host memory.*got an array on cuda:0"
            ):
                call()

    def test_of_dtypes(self, cuda):
        with pytest.raises(tq_hb.InvalidArgument, match=r"^KVCache\.append: k must have dtype"):
            make_cache(cuda).append(torch.zeros((1, 2, 256), dtype=torch.int32, device="cuda"), normal((1, 2, 256)))

    def test_an_array_of_another_gpu(self, cuda):
        class Elsewhere:
            def __dlpack_device__(self):
                return (2, 1)

            def __dlpack__(self, **keywords):
                return normal((1, 2, 256)).__dlpack__()

        if torch.cuda.device_count() > 1:
            with pytest.raises(tq_hb.InvalidArgument, match="cuda:0"):
                make_cache(cuda).append(normal((1, 2, 256)).to("cuda:1"), normal((1, 2, 256)))
        with pytest.raises(tq_hb.InvalidArgument, match=r"^quantize: x must be in host memory.*cuda:1"):
            tq_hb.quantize(Elsewhere(), 8, device="cpu")


def test_an_array_with_nothing_but_the_cuda_array_interface(cuda):
    class Interface:
        def __init__(self, x):
            self._x, self.__cuda_array_interface__ = x, x.__cuda_array_interface__

    x = normal((3, 256))
    codes, norms = tq_hb.quantize(Interface(x), 8, device=cuda)
    want = tq_hb.quantize(host(x), 8, device="cpu")
    assert np.array_equal(codes.numpy(), want[0])
    assert np.array_equal(norms.numpy(), want[1])


def test_a_device_copies_a_tensor(cuda):
    x = normal((3, 4))
    buffer = cuda.array(x)
    x.zero_()
    assert buffer.numpy().any()
    shared = cuda.array(x, copy=False)
    x.fill_(2)
    assert (shared.numpy() == 2).all()
