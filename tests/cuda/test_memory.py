"""Memory that the host cannot reach: copied in and out, and lent to other libraries where it is."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import tq_hb

CPU, CUDA = (1, 0), (2, 0)
DTYPES = [np.float32, np.float16, np.uint8, np.int32]


def ramp(device, shape=(4, 6), dtype=np.float32):
    return device.array(np.arange(np.prod(shape)).reshape(shape).astype(dtype))


class TestCopies:
    def test_numpy_is_a_read_only_copy(self, cuda):
        buf = ramp(cuda)
        seen = buf.numpy()
        assert not seen.flags.writeable
        assert not np.may_share_memory(seen, buf.numpy())
        buf.copy_from(np.ones((4, 6), np.float32))
        assert np.array_equal(seen, np.arange(24).reshape(4, 6))
        assert (buf.numpy() == 1).all()

    def test_slices_are_copied_from_and_to_their_place(self, cuda):
        buf = ramp(cuda)
        assert np.array_equal(buf[1:3].numpy(), np.arange(6, 18).reshape(2, 6))
        buf[2].copy_from(buf[0])
        buf[3].copy_from(np.full(6, 7, np.float32)[::-1])
        assert buf.numpy()[:, 0].tolist() == [0.0, 6.0, 0.0, 7.0]

    def test_between_devices(self, cuda):
        host = tq_hb.Device("cpu").empty((4, 6))
        host.copy_from(ramp(cuda))
        assert np.array_equal(host.numpy(), np.arange(24).reshape(4, 6))
        other = cuda.empty((4, 6))
        other.copy_from(host)
        assert np.array_equal(other.numpy(), host.numpy())

    def test_the_host_has_no_view(self, cuda):
        with pytest.raises(BufferError):
            memoryview(cuda.empty(3))

    def test_host_memory_is_not_shared(self, cuda):
        with pytest.raises(tq_hb.InvalidArgument, match=r"^Device\.array: x must.*cuda"):
            cuda.array(tq_hb.empty(4096), copy=False)

    def test_more_memory_than_there_is(self, cuda):
        with pytest.raises(tq_hb.OutOfMemoryError, match="limit"):
            cuda.empty((2**12, 2**31), np.uint8)
        most_of_it = (2**10, cuda.limits.max_buffer_bytes // 2**10 * 6 // 10)
        buf = cuda.empty(most_of_it, np.uint8)
        with pytest.raises(tq_hb.OutOfMemoryError, match="could not allocate"):
            cuda.empty(most_of_it, np.uint8)
        del buf
        assert cuda.empty(3).numpy().tolist() == [0.0, 0.0, 0.0]


class TestTorch:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_it_sees_the_same_memory(self, cuda, dtype):
        torch = pytest.importorskip("torch")
        buf = ramp(cuda, dtype=dtype)
        tensor = torch.from_dlpack(buf)
        assert tensor.is_cuda
        assert np.array_equal(tensor.cpu().numpy(), buf.numpy())
        tensor[1, 2] = 99
        assert buf.numpy()[1, 2] == 99

    def test_the_memory_lives_as_long_as_what_was_lent(self, cuda):
        torch = pytest.importorskip("torch")
        tensor = torch.from_dlpack(ramp(cuda)[1:])
        gc.collect()
        assert tensor[0].tolist() == [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]

    def test_a_copy_for_the_host(self, cuda):
        buf = ramp(cuda)
        seen = np.from_dlpack(buf, device="cpu")
        assert np.array_equal(seen, buf.numpy())
        with pytest.raises(BufferError, match="copy"):
            buf.__dlpack__(dl_device=CPU, copy=False)

    def test_where_it_is(self, cuda):
        assert cuda.empty(3).__dlpack_device__() == CUDA

    @pytest.mark.parametrize("keywords", [{"stream": 0}, {"dl_device": (8, 0)}, {"dl_device": (2, 1)}], ids=str)
    def test_what_cannot_be_exported_is_a_buffer_error(self, cuda, keywords):
        with pytest.raises(BufferError, match="__dlpack__.*got"):
            cuda.empty(3).__dlpack__(**keywords)


def test_the_cuda_array_interface(cuda):
    cupy = pytest.importorskip("cupy")
    buf = ramp(cuda)
    seen = cupy.asarray(buf[1:])
    assert np.array_equal(cupy.asnumpy(seen), np.arange(6, 24).reshape(3, 6))
    seen[0, 0] = -1
    assert buf.numpy()[1, 0] == -1
    with pytest.raises(AttributeError, match="cuda"):
        _ = tq_hb.Device("cpu").empty(3).__cuda_array_interface__
