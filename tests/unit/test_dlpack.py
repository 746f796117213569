"""Buffers lent to other libraries through DLPack, and Metal buffers borrowed from them."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import tq_hb
from tq_hb import _core

CPU, METAL = (1, 0), (8, 0)
DTYPES = [np.float32, np.float16, np.uint8, np.uint16, np.uint32, np.int32]


class Exporter:
    """An array that offers nothing but DLPack, from a given device."""

    def __init__(self, buffer, device=CPU, **fixed):
        self._buffer, self._device, self._fixed = buffer, device, fixed

    def __dlpack__(self, *, max_version=None):
        return self._buffer.__dlpack__(max_version=max_version, **self._fixed)

    def __dlpack_device__(self):
        return self._device


class LegacyExporter(Exporter):
    """An exporter from before ``max_version``."""

    def __dlpack__(self):
        return self._buffer.__dlpack__(**self._fixed)


@pytest.fixture
def device(device):
    if device.backend == "cuda":
        pytest.skip("the host cannot reach the memory of a cuda device: see tests/cuda")
    return device


@pytest.fixture
def metal() -> tq_hb.Device:
    info = next(d for d in tq_hb.devices() if d.backend == "metal")
    if not info.available:
        pytest.skip(f"backend 'metal' not available: {info.reason}")
    return tq_hb.Device("metal")


def ramp(device, shape=(4, 6), dtype=np.float32):
    return device.array(np.arange(np.prod(shape)).reshape(shape).astype(dtype))


class TestExport:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_numpy_sees_the_same_memory(self, device, dtype):
        buf = ramp(device, dtype=dtype)
        seen = np.from_dlpack(buf)
        assert seen.dtype == dtype
        assert np.array_equal(seen, buf.numpy())
        buf.numpy()[1, 2] = 99
        assert seen[1, 2] == 99

    def test_torch_and_mlx_see_it(self, device):
        torch = pytest.importorskip("torch")
        buf = ramp(device)
        tensor = torch.from_dlpack(buf)
        tensor[0, 0] = 7.0
        assert buf.numpy()[0, 0] == 7.0

    def test_slices_start_at_their_offset(self, device):
        assert np.array_equal(np.from_dlpack(ramp(device)[2:]), np.arange(12, 24).reshape(2, 6))

    @pytest.mark.parametrize("max_version", [None, (0, 8), (1, 0), (2, 3)], ids=str)
    def test_the_capsule_is_of_the_version_asked_for(self, device, max_version):
        capsule = device.empty(3).__dlpack__(max_version=max_version)
        is_versioned = max_version is not None and max_version[0] >= 1
        assert ("dltensor_versioned" in repr(capsule)) == is_versioned

    @pytest.mark.parametrize("max_version", [None, (1, 0)], ids=str)
    def test_a_copy_is_one_only_if_asked_for(self, device, max_version):
        buf = ramp(device)
        for copy in (None, False, True):
            exporter = Exporter(buf, copy=copy) if max_version else LegacyExporter(buf, copy=copy)
            lent, _ = _core.from_dlpack("op", "x", exporter, "must have a dtype")
            assert np.array_equal(lent, buf.numpy())
            assert np.may_share_memory(lent, buf.numpy()) == (copy is not True)

    def test_the_memory_lives_as_long_as_what_was_lent(self, device):
        lent = np.from_dlpack(ramp(device))
        gc.collect()
        assert np.array_equal(lent, np.arange(24).reshape(4, 6))

    def test_a_capsule_that_nobody_takes_is_released(self):
        class Watched(np.ndarray):
            pass

        x = np.zeros(4, np.float32).view(Watched)
        watch = weakref.ref(x)
        buf = tq_hb.Device("cpu")._core.wrap("op", "x", x)
        del x
        capsule = buf.__dlpack__()
        del buf
        assert watch() is not None
        del capsule
        assert watch() is None

    def test_it_is_on_the_host_wherever_it_is(self, device):
        assert device.empty(3).__dlpack_device__() == CPU

    @pytest.mark.parametrize(
        "keywords",
        [{"stream": 1}, {"dl_device": (2, 0)}, {"dl_device": (1, 1)}, {"dl_device": 1}]
        + [{"max_version": value} for value in (1, (1,), ("1", 0), (1.0, 0), "12", (2**64, 0))]
        + [{"copy": value} for value in ("yes", 1, [True])],
        ids=str,
    )
    def test_what_cannot_be_exported_is_a_buffer_error(self, device, keywords):
        with pytest.raises(BufferError, match="__dlpack__.*got"):
            device.empty(3).__dlpack__(**keywords)

    def test_the_cpu_has_no_metal_buffers(self):
        with pytest.raises(BufferError, match="dl_device"):
            tq_hb.Device("cpu").empty(3).__dlpack__(dl_device=METAL)


@pytest.mark.parametrize("kind", [Exporter, LegacyExporter])
def test_a_host_pointer_from_a_metal_device_is_borrowed(kind):
    """What mlx hands out on a Mac."""
    buf = tq_hb.Device("cpu").array(np.ones((1, 256), np.float32))
    assert np.array_equal(tq_hb.rotate(kind(buf, METAL)), tq_hb.rotate(np.ones((1, 256), np.float32)))


class TestMetalBuffers:
    """What torch hands out on a Mac: a capsule with the Metal buffer itself."""

    @pytest.mark.parametrize("kind", [Exporter, LegacyExporter])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_round_trip_without_a_copy(self, metal, kind, dtype):
        buf = ramp(metal, dtype=dtype)
        shared = metal.array(kind(buf, METAL, dl_device=METAL), copy=False)
        assert (shared.shape, shared.dtype) == (buf.shape, buf.dtype)
        shared.numpy()[1, 2] = 99
        assert buf.numpy()[1, 2] == 99

    def test_an_offset_is_kept(self, metal):
        buf = ramp(metal, (4, 8))
        shared = metal.array(Exporter(buf[1:], METAL, dl_device=METAL), copy=False)
        assert (shared.offset, shared.shape) == (32, (3, 8))
        assert np.array_equal(shared.numpy(), buf.numpy()[1:])

    def test_it_lives_as_long_as_what_uses_it(self, metal):
        shared = metal.array(Exporter(ramp(metal), METAL, dl_device=METAL), copy=False)
        gc.collect()
        assert np.array_equal(shared.numpy(), np.arange(24).reshape(4, 6))

    @pytest.mark.parametrize("backend", ["metal", "cpu"])
    def test_ops_on_either_device_take_it(self, metal, backend):
        x = np.random.default_rng(0).standard_normal((3, 256), np.float32)
        exported = Exporter(metal.array(x), METAL, dl_device=METAL)
        codes, norms = tq_hb.quantize(exported, 8, device=backend)
        want_codes, want_norms = tq_hb.quantize(x, 8, device="cpu")
        assert np.array_equal(codes, want_codes)
        assert np.array_equal(norms, want_norms)

    def test_a_cache_in_such_buffers_is_written_in_place(self, metal):
        packed, norms = metal.empty((1, 4, 256), np.uint8), metal.empty((1, 4))
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=2, cache_capacity=4)
        lent = (Exporter(buf, METAL, dl_device=METAL) for buf in (packed, norms))
        tq_hb.hadamard_quantize_kv_hb(np.ones((1, 256), np.float32), *lent, hp, device=metal)
        assert norms.numpy().tolist() == [[0.0, 0.0, 16.0, 0.0]]
        assert packed.numpy()[0, 2].any()
