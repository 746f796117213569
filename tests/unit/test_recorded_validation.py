"""Ops that are recorded refuse what their direct forms refuse."""

from __future__ import annotations

import numpy as np
import pytest

import tq_hb
from refusals import ATTEND, BAD_ATTEND_PARAMS, ENCODE, refusal


class TestRecorded:
    """The recorded form checks the same rules when an op is recorded, and then records nothing."""

    @pytest.fixture
    def buffers(self, device):
        return {
            "q": device.array(np.ones((4, 256), np.float32)),
            "k_packed": device.empty((2, 12, 256), np.uint8),
            "k_norms": device.empty((2, 12), np.float32),
            "v_packed": device.empty((2, 12, 256), np.uint8),
            "v_norms": device.empty((2, 12), np.float32),
            "output": device.array(np.full((4, 256), 7.0, np.float32)),
            "tmp": device.empty((tq_hb.tmp_buffer_bytes(4, 256) // 4,), np.float32),
        }

    @staticmethod
    def params(**changes):
        values = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 256, "kv_seq_len": 10, "kv_capacity": 12, "scale": 1.0}
        return tq_hb.FlashAttnVecTqHbParams(**{**values, **changes})

    def refuse(self, device, buffers, *parts, **changes):
        enc = device.encoder()
        with refusal(ATTEND, *parts):
            enc.flash_attn_vec_tq_hb(*buffers.values(), self.params(**changes))
        enc.commit_and_wait()
        assert (buffers["output"].numpy() == 7.0).all()

    @pytest.mark.parametrize(("name", "value", "rule"), BAD_ATTEND_PARAMS[:12])
    def test_bad_fields(self, device, buffers, name, value, rule):
        self.refuse(device, buffers, name, rule, "got", **{name: value})

    @pytest.mark.parametrize("name", ["q", "k_packed", "k_norms", "v_packed", "v_norms", "tmp"])
    def test_a_buffer_of_another_dtype(self, device, buffers, name):
        buffers[name] = device.empty(buffers[name].shape, np.int32)
        self.refuse(device, buffers, name, "got")

    @pytest.mark.parametrize("name", ["q", "k_packed", "k_norms", "v_packed", "v_norms"])
    def test_a_buffer_of_another_shape(self, device, buffers, name):
        buffers[name] = buffers[name][:1]
        self.refuse(device, buffers, name, "got")

    def test_a_tmp_that_is_too_small(self, device, buffers):
        buffers["tmp"] = buffers["tmp"][1:]
        self.refuse(device, buffers, "tmp", str(tq_hb.tmp_buffer_bytes(4, 256)), "got")

    @pytest.mark.parametrize("name", ["q", "tmp"])
    def test_output_may_not_overlap(self, device, buffers, name):
        rows = tq_hb.tmp_buffer_bytes(4, 256) // 1024 + 4
        storage = device.array(np.full((rows, 256), 7.0, np.float32))
        buffers["output"] = storage[:4]
        buffers[name] = storage[3:7] if name == "q" else storage[3:]
        self.refuse(device, buffers, r"\w+ must not overlap")

    def test_slices_of_one_buffer_that_do_not_overlap_are_fine(self, device, buffers):
        storage = device.array(np.full((8, 256), 7.0, np.float32))
        buffers["q"], buffers["output"] = storage[:4], storage[4:]
        enc = device.encoder()

        enc.flash_attn_vec_tq_hb(*buffers.values(), self.params())
        enc.commit_and_wait()

        assert (storage.numpy()[:4] == 7.0).all()
        assert (storage.numpy()[4:] == 0.0).all()

    def test_tmp_may_be_left_to_the_encoder(self, device, buffers):
        buffers["tmp"] = None
        enc = device.encoder()

        enc.flash_attn_vec_tq_hb(*buffers.values(), self.params())
        enc.commit_and_wait()

        assert (buffers["output"].numpy() == 0.0).all()

    @pytest.mark.parametrize(("name", "dtype"), [("q", np.uint8), ("k_packed", np.int32), ("v_norms", np.uint8)])
    def test_arrays_of_another_dtype(self, device, buffers, name, dtype):
        wanted = "uint8" if name == "k_packed" else "float32"
        changed = buffers | {name: np.ones(buffers[name].shape, dtype)}
        self.refuse(device, changed, name, "dtype", wanted, "got")

    def test_what_is_written_must_be_a_buffer(self, device, buffers):
        buffers["output"] = np.zeros((4, 256), np.float32)
        with refusal(ATTEND, "output", "got"):
            device.encoder().flash_attn_vec_tq_hb(*buffers.values(), self.params())

    def test_return_lse_needs_a_buffer_to_write(self, device, buffers):
        enc = device.encoder()
        with refusal(ATTEND, "return_lse", "lse=", "got True"):
            enc.flash_attn_vec_tq_hb(*buffers.values(), self.params(), return_lse=True)
        with refusal(ATTEND, "lse", "must be a Buffer", "got ndarray"):
            enc.flash_attn_vec_tq_hb(*buffers.values(), self.params(), lse=np.zeros(4, np.float32))
        assert enc.kernels == ()

    @pytest.mark.parametrize("return_lse", [False, True])
    def test_lse_is_written_where_there_is_a_buffer(self, device, buffers, return_lse):
        lse = device.array(np.full(4, 7.0, np.float32))
        enc = device.encoder()
        enc.flash_attn_vec_tq_hb(*buffers.values(), self.params(), lse=lse, return_lse=return_lse)
        enc.commit_and_wait()
        np.testing.assert_allclose(lse.numpy(), np.log(10.0), rtol=1e-6)

    @pytest.mark.parametrize("name", ["sinks", "lse"])
    @pytest.mark.parametrize(
        ("shape", "dtype"), [((3,), np.float32), ((1, 4), np.float32), ((4,), np.int32)], ids=["short", "2d", "int32"]
    )
    def test_optional_buffers_that_do_not_fit(self, device, buffers, name, shape, dtype):
        enc = device.encoder()
        with refusal(ATTEND, name, "got"):
            enc.flash_attn_vec_tq_hb(*buffers.values(), self.params(), **{name: device.empty(shape, dtype)})
        assert enc.kernels == ()

    def test_lse_may_not_overlap(self, device, buffers):
        storage = device.array(np.full((3, 4), 7.0, np.float32))
        enc = device.encoder()
        with refusal(ATTEND, "lse", "must not overlap sinks", "got"):
            enc.flash_attn_vec_tq_hb(*buffers.values(), self.params(), sinks=storage[1], lse=storage[1])
        enc.flash_attn_vec_tq_hb(*buffers.values(), self.params(), sinks=storage[0], lse=storage[1])
        enc.commit_and_wait()
        assert (storage.numpy()[[0, 2]] == 7.0).all()

    def test_tmp_grows_with_the_queries(self, device, buffers):
        buffers["q"] = device.array(np.ones((3, 4, 256), np.float32))
        buffers["output"] = device.array(np.full((3, 4, 256), 7.0, np.float32))
        self.refuse(device, buffers, "tmp", str(tq_hb.tmp_buffer_bytes(4, 256, num_queries=3)), "got")

    def test_no_queries(self, device, buffers):
        buffers["q"] = device.empty((0, 4, 256))
        self.refuse(device, buffers, "q", "at least one query", "got 0")

    @pytest.mark.parametrize("op", ["fwht_sign_premult_f32", "fwht_sign_undo_f32"])
    def test_rotations_take_float32_rows_of_a_known_size(self, device, op):
        enc = device.encoder()
        with refusal(op, "head_dim", "got 96"):
            getattr(enc, op)(device.empty((4, 96), np.float32))
        with refusal(op, "x", "float32", "got"):
            getattr(enc, op)(device.empty((4, 256), np.int32))

    @pytest.mark.parametrize(
        ("tokens", "pos", "words"),
        [
            (1, 12, ("pos", "plus the 1 token(s) read must be <= cache_capacity 12 unless is_sliding is 1, got 12")),
            (3, 10, ("pos", "plus the 3 token(s) read must be <= cache_capacity 12 unless is_sliding is 1, got 10")),
            (13, 0, ("output", "must hold at most cache_capacity 12 tokens, got 13")),
        ],
    )
    def test_decode_reads_what_the_cache_holds(self, device, buffers, tokens, pos, words):
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=2, write_pos=0, cache_capacity=12)
        output = device.array(np.full((tokens, 2, 256), 7.0, np.float32))
        enc = device.encoder()

        with refusal("tq_dequantize_hb_kv", *words):
            enc.tq_dequantize_hb_kv(buffers["k_packed"], buffers["k_norms"], output, hp, pos=pos)
        enc.commit_and_wait()

        assert (output.numpy() == 7.0).all()

    def test_a_ring_may_be_read_over_its_end(self, device, buffers):
        hp = tq_hb.HadamardQuantizeKvHbParams(
            head_dim=256, num_kv_heads=2, write_pos=0, cache_capacity=12, is_sliding=1
        )
        enc = device.encoder()
        enc.tq_dequantize_hb_kv(buffers["k_packed"], buffers["k_norms"], device.empty((12, 2, 256)), hp, pos=7)
        with refusal("tq_dequantize_hb_kv", "output", "cache_capacity 12", "got 13"):
            enc.tq_dequantize_hb_kv(buffers["k_packed"], buffers["k_norms"], device.empty((13, 2, 256)), hp, pos=7)

    def test_encode_checks_ring_and_capacity(self, device, buffers):
        src = device.array(np.ones((3, 2, 256), np.float32))
        hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=256, num_kv_heads=2, write_pos=10, cache_capacity=12)
        enc = device.encoder()

        with refusal(ENCODE, "write_pos", "got 10"):
            enc.hadamard_quantize_kv_hb(src, buffers["k_packed"], buffers["k_norms"], hp)
        enc.commit_and_wait()

        assert not buffers["k_packed"].numpy().any()
