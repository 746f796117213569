"""Devices, their buffers, and the life of a command encoder."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import tq_hb
from refusals import refusal


def record(enc, device):
    data = device.array(np.ones((2, 256), np.float32))
    enc.fwht_sign_premult_f32(data)
    return data


class TestLife:
    def test_nothing_runs_before_the_commit(self, device):
        enc = device.encoder()
        data = record(enc, device)
        assert (data.numpy() == 1.0).all()

        enc.commit()
        enc.wait()

        assert np.array_equal(data.numpy(), tq_hb.rotate(np.ones((2, 256), np.float32)))

    def test_an_empty_encoder_commits(self, device):
        device.encoder().commit_and_wait()

    def test_wait_before_commit_raises(self, device):
        enc = device.encoder()
        record(enc, device)
        with pytest.raises(tq_hb.DeviceError, match="wait.*commit"):
            enc.wait()

    def test_committing_twice_raises(self, device):
        enc = device.encoder()
        enc.commit()
        with pytest.raises(tq_hb.DeviceError, match="commit"):
            enc.commit()
        enc.wait()

    def test_recording_after_the_commit_raises(self, device):
        enc = device.encoder()
        enc.commit()
        with pytest.raises(tq_hb.DeviceError, match="fwht_sign_premult_f32.*commit"):
            record(enc, device)
        with pytest.raises(tq_hb.DeviceError, match="memory_barrier.*commit"):
            enc.memory_barrier()
        enc.wait()

    def test_waiting_twice_is_harmless(self, device):
        enc = device.encoder()
        record(enc, device)
        enc.commit()
        enc.wait()
        enc.wait()

    def test_gpu_time_is_known_after_the_wait(self, device):
        enc = device.encoder()
        record(enc, device)
        with pytest.raises(tq_hb.DeviceError, match="gpu_time.*wait"):
            _ = enc.gpu_time
        enc.commit_and_wait()
        assert 0.0 <= enc.gpu_time < 10.0

    def test_ops_keep_their_buffers_alive(self, device):
        enc = device.encoder()
        output = device.empty((1, 256), np.float32)
        packed = device.array(np.full((1, 1, 256), 255, np.uint8))
        norms = device.array(np.full((1, 1), 16.0, np.float32))
        p = tq_hb.FlashAttnVecTqHbParams(
            num_heads=1, num_kv_heads=1, head_dim=256, kv_seq_len=1, kv_capacity=1, scale=1.0
        )
        q = np.zeros((1, 256), np.float32)
        enc.flash_attn_vec_tq_hb(q, packed, norms, packed, norms, output, None, p, precision="strict")
        del packed, norms

        enc.commit_and_wait()

        assert (output.numpy() == tq_hb.codebook(8)[255]).all()

    def test_params_are_taken_when_the_op_is_recorded(self, device):
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=0, cache_capacity=2)
        packed, norms = device.empty((1, 2, 256), np.uint8), device.empty((1, 2), np.float32)
        enc = device.encoder()
        for pos in range(2):
            hp.write_pos = pos
            enc.hadamard_quantize_kv_hb(np.full((1, 256), pos + 1.0, np.float32), packed, norms, hp)

        enc.commit_and_wait()

        np.testing.assert_allclose(norms.numpy(), [[16.0, 32.0]], rtol=1e-6)

    def test_array_inputs_are_taken_when_the_op_is_recorded(self, device):
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=1, write_pos=0, cache_capacity=1)
        packed, norms = device.empty((1, 1, 256), np.uint8), device.empty((1, 1), np.float32)
        src = np.ones((1, 256), np.float32)
        enc = device.encoder()
        enc.hadamard_quantize_kv_hb(src, packed, norms, hp)
        src[:] = 5.0

        enc.commit_and_wait()

        np.testing.assert_allclose(norms.numpy(), [[16.0]], rtol=1e-6)


class TestNodes:
    def test_every_launch_and_barrier_is_listed_in_order(self, device):
        enc = device.encoder()
        record(enc, device)
        enc.memory_barrier()
        record(enc, device)
        assert [(node.kind, node.kernel) for node in enc.nodes] == [
            ("other", "fwht_sign_premult_f32_d256"), ("barrier", ""), ("other", "fwht_sign_premult_f32_d256"),
        ]  # fmt: skip
        assert enc.kernels == ("fwht_sign_premult_f32_d256",) * 2
        with pytest.raises(dataclasses.FrozenInstanceError):
            enc.nodes[0].kind = "sdpa"

    def test_launches_have_sizes_where_there_are_any(self, device):
        enc = device.encoder()
        record(enc, device)
        (node,) = enc.nodes
        if device.backend == "cpu":
            assert node == tq_hb.Node("other", "fwht_sign_premult_f32_d256", (0, 0, 0), (0, 0, 0), 0)
        else:
            assert (node.threadgroups, node.threads) == ((2, 1, 1), (32, 1, 1))

    def test_the_kernels_of_attention_are_told_apart(self, device):
        enc = device.encoder()
        attend(enc, device)
        kinds = [node.kind for node in enc.nodes]
        assert kinds.count("sdpa") == len(enc.kernels) == 2
        assert "other" not in kinds


def attend(enc, device, q=None, **keywords):
    p = tq_hb.FlashAttnVecTqHbParams(num_heads=2, num_kv_heads=1, head_dim=256, kv_seq_len=4, kv_capacity=4, scale=1.0)
    codes, norms = tq_hb.quantize(np.ones((1, 4, 256), np.float32), 8)
    out = device.empty((2, 256))
    q = np.zeros((2, 256), np.float32) if q is None else q
    enc.flash_attn_vec_tq_hb(q, codes, norms, codes, norms, out, None, p, **keywords)
    return out


class TestAutoBarrier:
    def test_off_by_default(self, device):
        enc = device.encoder()
        data = record(enc, device)
        enc.fwht_sign_undo_f32(data)
        assert [node.kind for node in enc.nodes] == ["other", "other"]

    def test_a_barrier_is_placed_where_an_op_needs_one(self, device):
        enc = device.encoder(auto_barrier=True)
        data = record(enc, device)
        record(enc, device)  # another buffer
        enc.fwht_sign_undo_f32(data)
        assert [node.kind for node in enc.nodes] == ["other", "other", "barrier", "other"]
        enc.commit_and_wait()
        np.testing.assert_allclose(data.numpy(), 1.0, rtol=1e-5)

    def test_a_barrier_is_placed_before_a_reader_of_lse_or_a_writer_of_sinks(self, device):
        enc = device.encoder(auto_barrier=True)
        lse = device.empty((2,))
        attend(enc, device, lse=lse)
        before = len(enc.nodes)
        attend(enc, device, sinks=lse)
        assert enc.nodes[before].kind == "barrier"
        enc.commit_and_wait()

    def test_a_barrier_is_placed_before_a_writer_of_what_an_op_reads_to_its_end(self, device):
        enc = device.encoder(auto_barrier=True)
        q = device.array(np.zeros((2, 256), np.float32))
        attend(enc, device, q, lse=device.empty((2,)))  # which has a merge
        before = len(enc.nodes)
        enc.fwht_sign_premult_f32(q)
        assert enc.nodes[before].kind == "barrier"
        enc.commit_and_wait()

    @pytest.mark.parametrize(("value", "is_on"), [("1", True), ("0", False), ("yes", False)])
    def test_the_variable_turns_it_on(self, device, environment, value, is_on):
        environment(HF2Q_AUTO_BARRIER=value)
        for auto_barrier, expected in ((None, is_on), (False, False), (True, True)):
            enc = device.encoder(auto_barrier=auto_barrier)
            enc.fwht_sign_undo_f32(record(enc, device))
            assert ("barrier" in [node.kind for node in enc.nodes]) == expected

    @pytest.mark.parametrize("value", [1, "on"])
    def test_anything_else_is_refused(self, device, value):
        with pytest.raises(tq_hb.InvalidArgument, match="auto_barrier must be.*got"):
            device.encoder(auto_barrier=value)


class TestStandaloneTransform:
    @pytest.mark.parametrize("head_dim", tq_hb.supported_head_dims())
    def test_it_is_the_transform_without_the_signs(self, device, head_dim):
        x = np.random.default_rng(0).standard_normal((3, head_dim), np.float32)
        data, enc = device.array(x), device.encoder()
        enc.fwht_standalone_f32(data)
        enc.commit_and_wait()
        hadamard = np.array([[1.0]])
        while len(hadamard) < head_dim:
            hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
        np.testing.assert_allclose(data.numpy(), x @ hadamard / np.sqrt(head_dim), atol=1e-5)
        assert np.array_equal(data.numpy(), tq_hb.fwht_standalone_f32(x))

    def test_it_undoes_itself(self):
        x = np.random.default_rng(1).standard_normal((2, 256), np.float32)
        np.testing.assert_allclose(tq_hb.fwht_standalone_f32(tq_hb.fwht_standalone_f32(x)), x, atol=1e-5)


class TestDevice:
    def test_properties(self, device):
        assert device.backend in ("cpu", "metal", "cuda")
        assert device.name
        assert isinstance(device.is_simulated, bool)
        assert device.limits.max_buffer_bytes > 2**20
        limits = device.limits
        assert (limits.num_threads > 0) == (device.backend == "cpu")
        for limit in (limits.max_threadgroup_bytes, limits.max_threads_per_threadgroup):
            assert (limit > 0) == (device.backend != "cpu")
        with pytest.raises(dataclasses.FrozenInstanceError):
            device.limits.num_threads = 1

    def test_devices_lists_every_backend_once(self):
        infos = tq_hb.devices()
        assert sorted(d.backend for d in infos) == ["cpu", "cuda", "metal"]
        assert all(d.available or d.reason for d in infos)
        assert next(d for d in infos if d.backend == "cpu").available

    def test_an_unknown_name_is_refused(self):
        with pytest.raises(tq_hb.InvalidArgument, match="cpu.*got.*tpu"):
            tq_hb.Device("tpu")

    @pytest.mark.parametrize("value", [3, b"cpu", object()], ids=["int", "bytes", "object"])
    def test_a_device_is_none_a_name_or_a_device(self, value):
        with pytest.raises(tq_hb.InvalidArgument, match="[Dd]evice.*got"):
            tq_hb.quantize(np.ones((1, 256), np.float32), 8, device=value)

    def test_none_auto_name_and_device_all_serve(self, device):
        x = np.ones((1, 256), np.float32)
        results = [tq_hb.quantize(x, 8, device=d)[0] for d in (None, "auto", device.backend, device)]
        assert all(np.array_equal(results[0], r) for r in results)

    def test_the_device_of_a_cache_is_visible(self, device):
        assert tq_hb.KVCache(1, 256, device=device).device.backend == device.backend


class TestBuffer:
    def test_array_copies_in_and_numpy_copies_or_views_out(self, device):
        x = np.arange(24, dtype=np.float32).reshape(4, 6)
        buf = device.array(x)
        x[:] = 0.0

        assert buf.shape == (4, 6)
        assert buf.dtype == np.float32
        assert np.array_equal(buf.numpy(), np.arange(24).reshape(4, 6))

    @pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8, np.uint16, np.uint32, np.int32])
    def test_every_dtype_round_trips(self, device, dtype):
        x = np.arange(10).astype(dtype)
        assert np.array_equal(device.array(x).numpy(), x)
        assert device.array(x).dtype == dtype

    @pytest.mark.parametrize("dtype", [np.complex64, object, "U3"], ids=["complex", "object", "text"])
    def test_other_dtypes_are_refused(self, device, dtype):
        with pytest.raises(tq_hb.InvalidArgument, match="^Device.empty: dtype .*got"):
            device.empty((3,), dtype)
        with pytest.raises(tq_hb.InvalidArgument, match="^Device.array: x .*got"):
            device.array(np.zeros(3, dtype))

    def test_slices_share_storage(self, device):
        buf = device.array(np.zeros((4, 2, 256), np.float32))
        part = buf[1:2]
        assert part.shape == (1, 2, 256)
        enc = device.encoder()
        src = device.array(np.ones((2, 256), np.float32))
        packed, norms = device.empty((2, 1, 256), np.uint8), device.empty((2, 1), np.float32)
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=2, write_pos=0, cache_capacity=1)
        enc.hadamard_quantize_kv_hb(src, packed, norms, hp)
        enc.memory_barrier()
        enc.tq_dequantize_hb_kv(packed, norms, part, hp, pos=0)

        enc.commit_and_wait()

        got = buf.numpy()
        assert not got[[0, 2, 3]].any()
        assert got[1].any()
        assert np.array_equal(got[1, 0], got[1, 1])

    def test_a_slice_of_a_slice_keeps_its_offset(self, device):
        buf = device.array(np.arange(40, dtype=np.float32).reshape(10, 4))
        assert np.array_equal(buf[2:9][3:5].numpy(), buf.numpy()[5:7])
        assert np.array_equal(buf[-3:].numpy(), buf.numpy()[-3:])
        assert np.array_equal(buf[4].numpy(), buf.numpy()[4])

    def test_other_axes_show_the_same_memory(self, device):
        buf = device.array(np.arange(24, dtype=np.float32).reshape(4, 6))
        seen = buf[1:].reshape((2, 1, 9))
        assert (seen.shape, seen.ndim, seen.offset) == ((2, 1, 9), 3, 24)
        buf[1].copy_from(np.full(6, -1, np.float32))
        assert np.array_equal(seen.numpy().ravel(), [-1] * 6 + list(range(12, 24)))
        for shape in ((2, 8), (), (18, 2)):
            with pytest.raises(tq_hb.InvalidArgument, match=r"^Buffer\.reshape: shape must hold as many elements"):
                buf[1:].reshape(shape)

    def test_axes_may_be_any_integers(self, device):
        buf = device.empty((4, 6))
        assert buf.reshape(24).shape == buf.reshape([np.int64(24)]).shape == buf.reshape(np.array([24])).shape == (24,)
        assert device.empty(1).reshape(()).shape == ()

    @pytest.mark.parametrize(
        "shape",
        [-1, (4, -1), 24.0, (24.0,), np.array(24.0), 2**63, (2**63,), (2**64,), "24", ("24",), None, (None,), ((24,),)],
        ids=repr,
    )
    def test_axes_that_are_no_integers_from_0_on_are_refused(self, device, shape):
        rule = "must be an integer from 0 to 9223372036854775807 or a tuple of them"
        with refusal(r"Buffer\.reshape", "shape", f"{rule}, got {shape!r}"):
            device.empty((4, 6)).reshape(shape)

    def test_slices_with_a_step_are_refused(self, device):
        with pytest.raises(tq_hb.InvalidArgument, match="step"):
            _ = device.array(np.zeros((4, 4), np.float32))[::2]

    def test_an_index_beyond_the_end_is_an_index_error(self, device):
        with pytest.raises(IndexError):
            _ = device.array(np.zeros((4, 4), np.float32))[4]

    @pytest.mark.parametrize("shape", [(-1, 4), (2.5,), (2**40, 2**40), "ab"], ids=str)
    def test_bad_shapes_are_refused(self, device, shape):
        with pytest.raises((tq_hb.InvalidArgument, tq_hb.OutOfMemoryError)):
            device.empty(shape, np.float32)

    @pytest.mark.parametrize("dtype", ["no such type", 3, ""])
    def test_what_is_no_dtype_is_refused(self, device, dtype):
        for op, make in (("Device.empty", device.empty), ("empty", tq_hb.empty)):
            with pytest.raises(tq_hb.InvalidArgument, match=f"^{op}: dtype .*got"):
                make(3, dtype)

    @pytest.mark.parametrize("dtype", [object, "V0"])
    def test_objects_and_nothing_cannot_be_shared_with_a_device(self, dtype):
        with pytest.raises(tq_hb.InvalidArgument, match="^empty: dtype .*got"):
            tq_hb.empty(3, dtype)

    def test_strides_that_overflow_are_refused_without_elements_too(self, device):
        for make in (device.empty, tq_hb.empty):
            with pytest.raises(tq_hb.InvalidArgument, match="63 bits"):
                make((0, 2**32 - 1, 2**32 - 1))

    def test_memory_that_cannot_be_had_is_an_out_of_memory_error(self, device):
        with pytest.raises(tq_hb.OutOfMemoryError, match=r"\d+ bytes"):
            device.empty((2**30, 2**24), np.float32)

    def test_a_buffer_outlives_its_slices_and_device_name(self, device):
        part = tq_hb.Device(device.backend).array(np.full((4, 8), 3.0, np.float32))[1:2]
        assert (part.numpy() == 3.0).all()


def test_empty_is_aligned_and_writable():
    x = tq_hb.empty((3, 256), np.float32)
    assert x.shape == (3, 256)
    assert x.dtype == np.float32
    assert x.flags.c_contiguous
    assert x.flags.writeable
    # A page: what a GPU needs to use host memory in place.
    assert x.ctypes.data % 4096 == 0


def test_warmup_leaves_everything_usable(device):
    tq_hb.warmup(device=device)
    assert tq_hb.quantize(np.ones((1, 256), np.float32), 8, device=device)[0].shape == (1, 256)


class WarmedUp:
    """A device's core that notes which widths it is told of."""

    def __init__(self, core):
        self._core = core
        self.widths: list[int] = []

    def warm_up(self, widths):
        self._core.warm_up(widths)
        self.widths += widths


@pytest.mark.parametrize(
    ("bits", "widths"),
    [
        (8, [8]),
        ((5, 6), [5, 6]),
        ([np.int64(8)], [8]),
        (np.array(8), [8]),
        (np.array([5, 6]), [5, 6]),
        ((), []),
        (None, list(tq_hb.supported_bits())),
    ],
    ids=str,
)
def test_warmup_takes_the_widths_that_will_be_used(device, bits, widths):
    other = tq_hb.Device(device.backend)
    other._core = WarmedUp(device._core)
    tq_hb.warmup(other, bits=bits)
    assert other._core.widths == widths


@pytest.mark.parametrize("bits", [7, (8, 4), "8", 8.0, np.array(7), np.array("8")], ids=repr)
def test_warmup_refuses_other_widths(device, bits):
    with pytest.raises(tq_hb.InvalidArgument, match="^warmup: bits must.*got"):
        tq_hb.warmup(device, bits=bits)


def test_auto_is_never_a_simulated_device():
    assert not tq_hb.Device("auto").is_simulated
