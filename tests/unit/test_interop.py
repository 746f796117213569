"""Arrays of every library and layout in, and results back in the caller's library."""

from __future__ import annotations

import array
import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import tolerance
import tq_hb
from tq_hb import gpu_arrays, interop


def library(name: str):
    return pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((6, 2, 256)).astype(np.float32)


def strided(x):
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def read_only(x):
    x = x.copy()
    x.setflags(write=False)
    return x


LAYOUTS = {
    "strided": strided,
    "reversed": lambda x: x[::-1].copy()[::-1],
    "fortran": np.asfortranarray,
    "read-only": read_only,
    "byte-swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "native, spelt out": lambda x: x.view(x.dtype.newbyteorder("<" if sys.byteorder == "little" else ">")),
    "float64": lambda x: x.astype(np.float64),
    "unaligned": lambda x: np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape),
    "memoryview": memoryview,
    "transposed": lambda x: np.ascontiguousarray(x.transpose(1, 0, 2)).transpose(1, 0, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_input_gives_the_same_bytes(x, layout):
    codes, norms = tq_hb.quantize(x, 8)

    other_codes, other_norms = tq_hb.quantize(LAYOUTS[layout](x), 8)

    assert np.array_equal(codes, other_codes)
    assert np.array_equal(norms, other_norms)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_goes_through_a_cache(x, layout):
    q = x[0, :1].repeat(2, axis=0)
    plain, other = tq_hb.KVCache(2, 256), tq_hb.KVCache(2, 256)
    plain.append(x, x)

    other.append(LAYOUTS[layout](x), LAYOUTS[layout](x))

    got = other.attend(LAYOUTS[layout](q[None])) if layout == "transposed" else other.attend(LAYOUTS[layout](q))
    assert np.array_equal(np.asarray(got).reshape(2, 256), plain.attend(q))


@pytest.mark.parametrize("layout", ["strided", "fortran", "read-only", "transposed"])
def test_codes_and_norms_may_be_in_any_layout_too(x, layout):
    codes, norms = tq_hb.quantize(x, 8)
    norms = norms[..., None]

    back = tq_hb.dequantize(LAYOUTS[layout](codes), LAYOUTS[layout](norms)[..., 0], 8, head_dim=256)

    assert np.array_equal(back, tq_hb.dequantize(codes, norms[..., 0], 8, head_dim=256))


def test_float16_input_is_taken_at_its_value(x):
    half = x.astype(np.float16)
    codes, norms = tq_hb.quantize(half, 8)
    want_codes, want_norms = tq_hb.quantize(half.astype(np.float32), 8)
    assert np.array_equal(codes, want_codes)
    assert np.array_equal(norms, want_norms)
    assert norms.dtype == np.float32


def test_float64_is_rounded_to_float32_first(x):
    wide = x.astype(np.float64) * (1 + 1e-12)
    assert np.array_equal(tq_hb.quantize(wide, 8)[1], tq_hb.quantize(wide.astype(np.float32), 8)[1])


def test_the_buffer_protocol_suffices(x):
    flat = array.array("f", x[0, 0].tolist())
    codes, _ = tq_hb.quantize(flat, 8)
    assert np.array_equal(codes, tq_hb.quantize(x[0, 0], 8)[0])


@pytest.mark.parametrize("has_module", [True, False], ids=["of a module", "of none"])
def test_arrays_of_ctypes_have_the_buffer_protocol(x, has_module):
    names = {"ctypes": ctypes} | ({"__name__": __name__} if has_module else {})
    exec("kind = ctypes.c_float * 256 * 2 * 6", names)  # the class takes its module from where it is made
    source, target = names["kind"].from_buffer_copy(x), (ctypes.c_float * 256 * 2)()

    codes, norms = tq_hb.quantize(source, 8)
    cache = tq_hb.KVCache(2, 256)
    cache.append(source, source)
    cache.attend(x[0], out=target)

    assert np.array_equal(codes, tq_hb.quantize(x, 8)[0])
    assert isinstance(norms, np.ndarray)
    assert np.array_equal(np.asarray(target), cache.attend(x[0]))


class ByDlpackOnly:
    """An array that offers nothing but DLPack."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **keywords):
        return self._array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class LegacyDlpack(ByDlpackOnly):
    """An exporter from before ``max_version`` and its friends."""

    def __dlpack__(self, stream=None):
        return self._array.__dlpack__(stream=stream)


class ElsewhereDlpack(ByDlpackOnly):
    """An array on a GPU that this process does not use."""

    def __dlpack_device__(self):
        return (2, 5)


@pytest.mark.parametrize("exporter", [ByDlpackOnly, LegacyDlpack])
def test_dlpack_suffices(x, exporter):
    codes, _ = tq_hb.quantize(exporter(x), 8)
    assert np.array_equal(np.asarray(codes), tq_hb.quantize(x, 8)[0])


def test_an_array_on_another_gpu_is_refused(x):
    with pytest.raises(tq_hb.InvalidArgument, match="quantize.*x"):
        tq_hb.quantize(ElsewhereDlpack(x), 8)


class LyingDlpack:
    """An exporter that answers with what is no device and no capsule."""

    def __init__(self, device=(1, 0), capsule=None):
        self._device, self._capsule = device, capsule

    def __dlpack__(self, **keywords):
        return self._capsule

    def __dlpack_device__(self):
        return self._device


@pytest.mark.parametrize("device", [None, (), ("cpu", 0), (2**40, 0)], ids=str)
def test_an_exporter_without_a_device_is_refused(device):
    with pytest.raises(tq_hb.InvalidArgument, match="^rotate: x .*got"):
        tq_hb.rotate(LyingDlpack(device))


def test_an_exporter_without_a_capsule_is_refused():
    with pytest.raises(tq_hb.InvalidArgument, match="^rotate: x .*capsule.*got"):
        tq_hb.rotate(LyingDlpack())


def test_a_capsule_is_consumed_once(x):
    exporter = LyingDlpack(capsule=x.__dlpack__())
    tq_hb.rotate(exporter)
    with pytest.raises(tq_hb.InvalidArgument, match="^rotate: x .*capsule.*got"):
        tq_hb.rotate(exporter)


def test_an_exporter_without_memory_is_not_the_callers_fault():
    class Full(ByDlpackOnly):
        def __dlpack__(self, **keywords):
            raise MemoryError("no memory is left")

    with pytest.raises(tq_hb.OutOfMemoryError, match="^rotate: x could not be read: no memory is left"):
        tq_hb.rotate(Full(np.zeros(256, np.float32)))


# More than any machine addresses, all of it one value.
ENDLESS = {
    dtype: np.lib.stride_tricks.as_strided(np.zeros(1, dtype), (2**40, 2, 256), (0, 0, 0))
    for dtype in ("float16", "float32", ">f4", "float64", "uint8")
}


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("rotate: x", lambda: tq_hb.rotate(ENDLESS["float32"])),
        ("quantize: x", lambda: tq_hb.quantize(ENDLESS["float16"], 8)),
        ("dequantize: codes", lambda: tq_hb.dequantize(ENDLESS["uint8"], np.ones(1, np.float32), 8, head_dim=256)),
        ("KVCache.append: k", lambda: tq_hb.KVCache(2, 256).append(ENDLESS["float64"], ENDLESS["float64"])),
        ("KVCache.attend: q", lambda: tq_hb.KVCache(2, 256).attend(ENDLESS["float32"])),
        ("Device.array: x", lambda: tq_hb.Device("cpu").array(ENDLESS[">f4"])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_array_too_large_to_be_copied_is_named(name, call):
    with pytest.raises(tq_hb.OutOfMemoryError, match=f"^{name} could not be copied: Unable to allocate"):
        call()


def test_arrays_between_each_others_rows_do_not_overlap():
    cache = tq_hb.KVCache(2, 256)
    cache.append(np.ones((1, 2, 256), np.float32), np.ones((1, 2, 256), np.float32))
    rows = np.random.default_rng(0).standard_normal((10, 256)).astype(np.float32)
    q = rows[::9]
    want = cache.attend(q)

    assert np.array_equal(cache.attend(q, out=rows[4:6]), want)
    for out in (rows[:2], rows[8:]):
        with pytest.raises(tq_hb.InvalidArgument, match=r"^KVCache\.attend: out must not overlap q"):
            cache.attend(q, out=out)


def test_an_overlap_too_hard_to_rule_out_is_refused(monkeypatch):
    memory = np.zeros(10_000, np.float32)
    read = np.lib.stride_tricks.as_strided(memory, (9, 8, 64), (1296, 1304, 8))  # every other value
    written = memory[64 * 37 + 65 :][:128]
    interop.require_disjoint("attend", "out", written, "q", read)

    monkeypatch.setattr(interop, "_MOST_WORK", 1)

    with pytest.raises(tq_hb.InvalidArgument, match="^attend: out must not overlap q"):
        interop.require_disjoint("attend", "out", written, "q", read)


@pytest.mark.parametrize("name", ["bool", "complex64", "int64"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_dtype_that_does_not_fit_is_named_beside_those_that_do(x, kind, name):
    one = x[:1].astype(name)
    if kind == "torch":
        one = library("torch").from_numpy(one)
    rule = "must have dtype float16, bfloat16, float32 or float64"
    with pytest.raises(tq_hb.InvalidArgument, match=rf"^KVCache\.append: k {rule}, got {name}$"):
        tq_hb.KVCache(2, 256).append(one, one)
    with pytest.raises(tq_hb.InvalidArgument, match=f"^dequantize: codes must have dtype uint8, got {name}$"):
        tq_hb.dequantize(one, x[..., 0], 8, head_dim=256)


def test_what_an_exporter_says_is_not_lost_behind_its_dtype(x):
    class Exporter:
        dtype = "<dtype: 'float32'>"

        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **_):
            raise BufferError("it is being written")

    with pytest.raises(tq_hb.InvalidArgument, match=r"^KVCache\.append: k .*got it is being written$"):
        tq_hb.KVCache(2, 256).append(Exporter(), x)


@pytest.mark.parametrize("name", ["bool", "bfloat16"])
def test_slots_that_are_no_integers_are_named_by_their_dtype(x, name):
    torch = library("torch")
    batch = tq_hb.BatchedKVCache(2, 2, 256, 10)
    rule = rf"^BatchedKVCache\.append: slots must hold integers, got {name}$"
    with pytest.raises(tq_hb.InvalidArgument, match=rule):
        batch.append(torch.zeros(1, dtype=getattr(torch, name)), x[:1], x[:1])
    with pytest.raises(tq_hb.InvalidArgument, match="^dequantize: codes must have dtype uint8, got bfloat16$"):
        tq_hb.dequantize(torch.zeros(256, dtype=torch.bfloat16), x[..., 0], 8, head_dim=256)


def test_a_read_only_array_may_come_through_dlpack(x):
    assert np.array_equal(tq_hb.rotate(ByDlpackOnly(read_only(x))), tq_hb.rotate(x))


@pytest.mark.parametrize("value", [np.ndarray, 1.0, None, "x", (1.0, 2.0)], ids=str)
def test_what_is_no_array_is_refused(value):
    with pytest.raises(tq_hb.InvalidArgument, match="^rotate: x .*got"):
        tq_hb.rotate(value)


def test_a_released_memoryview_is_refused(x):
    view = memoryview(x)
    view.release()
    with pytest.raises(tq_hb.InvalidArgument, match="^rotate: x .*got"):
        tq_hb.rotate(view)


def test_a_matrix_is_an_array(x):
    matrix = x[0].view(np.matrix)
    codes, norms = tq_hb.quantize(matrix, 8)
    assert np.array_equal(codes, tq_hb.quantize(x[0], 8)[0])
    assert norms.shape == (2,)


def test_rounding_ignores_the_callers_error_state():
    with np.errstate(all="raise"):
        tiny = tq_hb.rotate(np.full(256, 1e-310))
        cache = tq_hb.KVCache(1, 256)
        cache.append(np.full((1, 256), 1e-7, np.float32), np.full((1, 256), 1e-7, np.float32))
        out = cache.attend(np.ones((1, 256), np.float16))
    assert not tiny.any()
    assert out.dtype == np.float16


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_results_have_the_type_of_the_query(x, dtype):
    cache = tq_hb.KVCache(2, 256)
    cache.append(x, x)
    q = np.random.default_rng(1).standard_normal((4, 256)).astype(dtype)

    got = cache.attend(q)

    want = cache.attend(q.astype(np.float32))
    assert got.dtype == (np.float32 if dtype == "float64" else q.dtype)
    assert np.array_equal(got, want.astype(got.dtype))


def test_a_result_beyond_float16_is_infinite_without_a_warning():
    cache = tq_hb.KVCache(1, 256)
    large = np.full((1, 1, 256), 1e5, np.float32)
    cache.append(large, large)
    assert np.isinf(cache.attend(np.ones((1, 256), np.float16))).all()


def test_a_byte_swapped_query_gives_a_native_result(x):
    cache = tq_hb.KVCache(2, 256)
    cache.append(x, x)
    q = x[0].repeat(2, axis=0)
    got = cache.attend(q.astype(">f4"))
    assert got.dtype.isnative
    assert np.array_equal(got, cache.attend(q))


def test_rotations_leave_their_input_alone(x):
    before = x.copy()
    for op in (tq_hb.rotate, tq_hb.unrotate):
        op(x)
    tq_hb.quantize(x, 8)
    assert np.array_equal(x, before)


def test_ml_dtypes_bfloat16(x):
    bfloat16 = library("ml_dtypes").bfloat16
    narrow = x.astype(bfloat16)
    cache, plain = tq_hb.KVCache(2, 256), tq_hb.KVCache(2, 256)
    cache.append(narrow, narrow)
    plain.append(narrow.astype(np.float32), narrow.astype(np.float32))
    q = np.random.default_rng(1).standard_normal((4, 256)).astype(bfloat16)

    got = cache.attend(q)

    assert got.dtype == bfloat16
    assert np.array_equal(got, plain.attend(q.astype(np.float32)).astype(bfloat16))
    out = np.zeros((4, 256), bfloat16)
    assert cache.attend(q, out=out) is out
    assert np.array_equal(out, got)


class TestTorch:
    @pytest.fixture
    def torch(self):
        return library("torch")

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_results_are_tensors_of_the_querys_type(self, torch, x, dtype):
        t = torch.from_numpy(x).to(getattr(torch, dtype))
        cache, plain = tq_hb.KVCache(2, 256), tq_hb.KVCache(2, 256)
        cache.append(t, t)
        plain.append(t.to(torch.float32).numpy(), t.to(torch.float32).numpy())
        q = torch.from_numpy(np.random.default_rng(1).standard_normal((4, 256))).to(t.dtype)

        got = cache.attend(q)

        want = torch.from_numpy(plain.attend(q.to(torch.float32).numpy()))
        result_dtype = torch.float32 if dtype == "float64" else t.dtype
        assert isinstance(got, torch.Tensor)
        assert got.dtype == result_dtype
        assert torch.equal(got, want.to(result_dtype))

    def test_codes_and_norms_are_tensors(self, torch, x):
        codes, norms = tq_hb.quantize(torch.from_numpy(x), 8)
        assert (codes.dtype, norms.dtype) == (torch.uint8, torch.float32)
        assert np.array_equal(codes.numpy(), tq_hb.quantize(x, 8)[0])
        assert isinstance(tq_hb.dequantize(codes, norms, 8, head_dim=256), torch.Tensor)
        assert isinstance(tq_hb.rotate(torch.from_numpy(x)), torch.Tensor)

    def test_a_cache_in_tensors_is_written_in_place(self, torch, x):
        packed, norms = torch.zeros((2, 6, 256), dtype=torch.uint8), torch.zeros((2, 6))
        pointer = packed.data_ptr()
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=2, write_pos=0, cache_capacity=6)
        tq_hb.hadamard_quantize_kv_hb(torch.from_numpy(x), packed, norms, hp)
        codes, lengths = tq_hb.quantize(x, 8)
        assert packed.data_ptr() == pointer
        assert np.array_equal(packed.numpy(), codes.swapaxes(0, 1))
        assert np.array_equal(norms.numpy(), lengths.swapaxes(0, 1))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_out_is_filled_in_place(self, torch, x, dtype):
        cache = tq_hb.KVCache(2, 256)
        cache.append(x, x)
        q = torch.from_numpy(x[0].repeat(2, axis=0)).to(getattr(torch, dtype))
        out = torch.zeros((4, 256), dtype=q.dtype)
        pointer = out.data_ptr()
        assert cache.attend(q, out=out) is out
        assert out.data_ptr() == pointer
        assert torch.equal(out, cache.attend(q))

    def test_results_own_their_memory(self, torch, x):
        cache = tq_hb.KVCache(2, 256)
        cache.append(x, x)
        q = torch.from_numpy(x[0].repeat(2, axis=0))
        results = [cache.attend(q) for _ in range(8)]
        want = results[0].clone()
        results[0].zero_()
        assert all(torch.equal(result, want) for result in results[1:])
        assert torch.equal(cache.attend(q), want)

    def test_non_contiguous_and_gradient_carrying_tensors(self, torch, x):
        t = torch.from_numpy(strided(x)).requires_grad_()
        assert np.array_equal(tq_hb.quantize(t, 8)[0].numpy(), tq_hb.quantize(x, 8)[0])

    def test_the_negative_bit_is_seen(self, torch, x):
        t = torch.from_numpy(x)
        negated = torch.complex(torch.zeros_like(t), -t).conj().imag
        assert negated.is_neg()
        assert np.array_equal(tq_hb.rotate(negated).numpy(), tq_hb.rotate(x))
        assert np.array_equal(tq_hb.Device("cpu").array(negated).numpy(), x)

    def test_the_negative_bit_is_seen_on_a_gpu_too(self, torch):
        lent = []

        def borrow(op, field, x, stream):
            lent.append(x)
            return SimpleNamespace(dtype=np.float32)

        gpu = SimpleNamespace(backend="cuda", borrow=borrow)
        negated = torch._neg_view(torch.ones(2, 64))

        gpu_arrays.as_float32("op", "x", negated, gpu)

        assert not lent[0].is_neg()
        assert torch.equal(lent[0], -torch.ones(2, 64))
        with pytest.raises(tq_hb.InvalidArgument, match=r"^op: x must not have torch's negative bit"):
            gpu_arrays.view("op", "x", negated, gpu)

    def test_a_destination_with_the_negative_bit_is_refused(self, torch, x):
        cache = tq_hb.KVCache(2, 256)
        cache.append(x, x)
        q = torch.from_numpy(x[0])
        with pytest.raises(
            tq_hb.InvalidArgument, match=r"^KVCache\.attend: out must not have torch's negative bit.*got"
        ):
            cache.attend(q, out=torch._neg_view(torch.zeros(2, 256)))
        with pytest.raises(tq_hb.InvalidArgument, match=r"^Device\.array: x must not have torch's negative bit"):
            tq_hb.Device("cpu").array(torch._neg_view(torch.from_numpy(tq_hb.empty(3))), copy=False)

    def test_a_non_contiguous_destination_is_refused(self, torch, x):
        packed = torch.zeros((6, 2, 256), dtype=torch.uint8).transpose(0, 1)
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=2, write_pos=0, cache_capacity=6)
        with pytest.raises(tq_hb.InvalidArgument, match="packed"):
            tq_hb.hadamard_quantize_kv_hb(torch.from_numpy(x), packed, torch.zeros((2, 6)), hp)

    def test_a_tensor_without_memory_is_refused(self, torch):
        with pytest.raises(tq_hb.InvalidArgument, match="quantize.*x"):
            tq_hb.quantize(torch.zeros((2, 256), device="meta"), 8)

    def test_a_subclass_of_tensor_gives_a_tensor(self, torch, x):
        class Tagged(torch.Tensor):
            pass

        assert isinstance(tq_hb.rotate(torch.from_numpy(x).as_subclass(Tagged)), torch.Tensor)

    def test_a_norm_of_nan_is_nan_in_a_bfloat16_out(self, torch):
        cache = tq_hb.KVCache(1, 256)
        cache.append(np.ones((1, 256), np.float32), np.ones((1, 256), np.float32))
        cache._v.norms.copy_from(np.full(cache._v.norms.shape, 0xFFFFFFFF, np.uint32).view(np.float32))
        out = torch.zeros(1, 256, dtype=torch.bfloat16)
        cache.attend(torch.ones(1, 256, dtype=torch.bfloat16), out=out)
        assert torch.isnan(out).all()

    def test_integer_tensors_are_refused(self, torch):
        with pytest.raises(tq_hb.InvalidArgument, match="quantize.*x.*got"):
            tq_hb.quantize(torch.zeros((2, 256), dtype=torch.int64), 8)


class TestMlx:
    @pytest.fixture
    def mx(self):
        return library("mlx.core")

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_results_are_mlx_arrays_of_the_querys_type(self, mx, x, dtype):
        a = mx.array(x).astype(getattr(mx, dtype))
        cache, plain = tq_hb.KVCache(2, 256), tq_hb.KVCache(2, 256)
        cache.append(a, a)
        wide = np.array(a.astype(mx.float32))
        plain.append(wide, wide)
        q = a[0][:1] + a[1]

        got = cache.attend(q)

        want = mx.array(plain.attend(np.array(q.astype(mx.float32)))).astype(q.dtype)
        assert isinstance(got, mx.array)
        assert got.dtype == q.dtype
        assert mx.array_equal(got, want)

    def test_codes_and_norms_are_mlx_arrays(self, mx, x):
        codes, norms = tq_hb.quantize(mx.array(x), 8)
        assert (codes.dtype, norms.dtype) == (mx.uint8, mx.float32)
        assert np.array_equal(np.array(codes), tq_hb.quantize(x, 8)[0])
        assert isinstance(tq_hb.dequantize(codes, norms, 8, head_dim=256), mx.array)
        assert isinstance(tq_hb.rotate(mx.array(x)), mx.array)

    def test_lazy_and_transposed_arrays(self, mx, x):
        a = mx.array(x).transpose(1, 0, 2) * 2.0
        codes, _ = tq_hb.quantize(a, 8)
        assert np.array_equal(np.array(codes), tq_hb.quantize(x.transpose(1, 0, 2) * 2.0, 8)[0])

    def test_an_mlx_array_cannot_be_a_destination(self, mx, x):
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=2, write_pos=0, cache_capacity=6)
        with pytest.raises(tq_hb.InvalidArgument, match="packed"):
            tq_hb.hadamard_quantize_kv_hb(x, mx.zeros((2, 6, 256), dtype=mx.uint8), np.zeros((2, 6), np.float32), hp)


class TestBuffers:
    """A device's own buffers in the array form."""

    @pytest.fixture
    def device(self, device):
        if device.backend == "cuda":
            pytest.skip("the host cannot reach the memory of a cuda device: see tests/cuda")
        return device

    def test_a_cache_in_buffers(self, device, x):
        packed, norms = device.empty((2, 6, 256), np.uint8), device.empty((2, 6), np.float32)
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=2, write_pos=0, cache_capacity=6)
        p = tq_hb.FlashAttnVecTqHbParams(
            num_heads=4, num_kv_heads=2, head_dim=256, kv_seq_len=6, kv_capacity=6, scale=1.0
        )
        q = x[0].repeat(2, axis=0)

        tq_hb.hadamard_quantize_kv_hb(device.array(x), packed, norms, hp, device=device)
        got = tq_hb.flash_attn_vec_tq_hb(device.array(q), packed, norms, packed, norms, p, device=device)

        want = tq_hb.flash_attn_vec_tq_hb(
            q, packed.numpy(), norms.numpy(), packed.numpy(), norms.numpy(), p, device=device
        )
        assert np.array_equal(got.numpy(), want)

    def test_a_buffer_is_a_buffer_and_speaks_dlpack(self, device, x):
        buf = device.array(x)
        assert np.array_equal(np.asarray(memoryview(buf)), x)
        assert np.array_equal(np.from_dlpack(buf), x)


def test_lse_and_converted_codes_are_in_the_callers_library(x):
    torch = library("torch")
    p = tq_hb.FlashAttnVecTqHbParams(num_heads=2, num_kv_heads=2, head_dim=256, kv_seq_len=6, kv_capacity=6, scale=1.0)
    codes, norms = tq_hb.quantize(torch.from_numpy(x.swapaxes(0, 1).copy()), 5)
    q, sinks = torch.from_numpy(x[0]).to(torch.bfloat16), torch.tensor([1.0, -float("inf")], dtype=torch.float16)
    planes = tq_hb.convert_packing(codes, 5, head_dim=256, source="byte", target="plane")
    assert (type(planes), planes.dtype, planes.shape) == (torch.Tensor, torch.uint8, (2, 6, 160))
    p.codebook_bits = 5

    out, lse = tq_hb.flash_attn_vec_tq_hb(
        q, planes, norms, planes, norms, p, packing="plane", sinks=sinks, return_lse=True
    )

    assert (type(out), out.dtype) == (type(lse), lse.dtype) == (torch.Tensor, torch.float32)
    want, want_lse = tq_hb.flash_attn_vec_tq_hb(
        q.to(torch.float32).numpy(), codes.numpy(), norms.numpy(), codes.numpy(), norms.numpy(), p,
        sinks=sinks.to(torch.float32).numpy(), return_lse=True,
    )  # fmt: skip
    assert np.array_equal(out.numpy(), want)
    assert np.array_equal(lse.numpy(), want_lse)


def test_several_queries_come_back_in_out(x):
    p = tq_hb.FlashAttnVecTqHbParams(num_heads=2, num_kv_heads=2, head_dim=256, kv_seq_len=6, kv_capacity=6, scale=1.0)
    codes, norms = tq_hb.quantize(np.ascontiguousarray(x.swapaxes(0, 1)), 8)
    out = np.empty((3, 2, 256), np.float32)

    got, lse = tq_hb.flash_attn_vec_tq_hb(x[:3], codes, norms, codes, norms, p, return_lse=True, out=out)

    assert got is out
    assert lse.shape == (3, 2)
    assert np.array_equal(out, tq_hb.flash_attn_vec_tq_hb(x[:3], codes, norms, codes, norms, p))


def test_numpy_results_of_the_op_keep_the_querys_library(x):
    p = tq_hb.FlashAttnVecTqHbParams(num_heads=2, num_kv_heads=2, head_dim=256, kv_seq_len=6, kv_capacity=6, scale=1.0)
    codes, norms = tq_hb.quantize(np.ascontiguousarray(x.swapaxes(0, 1)), 8)
    got = tq_hb.flash_attn_vec_tq_hb(x[0].astype(np.float64), codes, norms, codes, norms, p)
    assert type(got) is np.ndarray
    assert got.dtype == np.float32
    assert tolerance.nmse(got, tq_hb.flash_attn_vec_tq_hb(x[0], codes, norms, codes, norms, p)) == 0.0
