"""Ops on other libraries' streams, captured into graphs, and in processes that were forked."""

from __future__ import annotations

import os

import numpy as np
import pytest

import tq_hb


class Attention:
    """A cache on the GPU and the buffers of one attention call."""

    def __init__(self, cuda):
        rng = np.random.default_rng(0)
        k, v = rng.standard_normal((2, 2, 300, 256), np.float32)
        sides = [x for rows in (k, v) for x in tq_hb.quantize(rows, 8)]
        self.q = cuda.array(rng.standard_normal((8, 256), np.float32))
        self.sides = [cuda.array(x) for x in sides]
        self.output = cuda.empty((8, 256))
        self.tmp = cuda.empty(tq_hb.tmp_buffer_bytes(8, 256, splits=256) // 4)
        self.p = tq_hb.FlashAttnVecTqHbParams(
            num_heads=8, num_kv_heads=2, head_dim=256, kv_seq_len=300, kv_capacity=300, scale=0.0625
        )

    def record(self, encoder):
        encoder.flash_attn_vec_tq_hb(self.q, *self.sides, self.output, self.tmp, self.p)

    def expected(self, cuda):
        encoder = cuda.encoder()
        self.record(encoder)
        encoder.commit_and_wait()
        return self.output.numpy()


@pytest.mark.parametrize("kind", ["torch", "cupy", "address"])
def test_an_encoder_runs_on_a_given_stream(cuda, kind):
    torch = pytest.importorskip("torch")
    attention = Attention(cuda)
    want = attention.expected(cuda)
    attention.output.copy_from(np.zeros((8, 256), np.float32))
    torch_stream = torch.cuda.Stream()
    if kind == "cupy":
        stream = pytest.importorskip("cupy").cuda.Stream(non_blocking=True)
    else:
        stream = torch_stream if kind == "torch" else torch_stream.cuda_stream
    encoder = cuda.encoder(stream=stream)
    attention.record(encoder)
    encoder.commit_and_wait()
    assert np.array_equal(attention.output.numpy(), want)
    assert 0.0 < encoder.gpu_time < 1.0


@pytest.mark.parametrize("stream", [True, -1, 1.5, "default"], ids=repr)
def test_anything_else_is_no_stream(cuda, stream):
    with pytest.raises(tq_hb.InvalidArgument, match=r"^Device\.encoder: stream must be.*got"):
        cuda.encoder(stream=stream)


def test_a_stream_orders_an_op_after_the_callers_work(cuda):
    torch = pytest.importorskip("torch")
    attention = Attention(cuda)
    q = torch.from_dlpack(attention.q)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # some 10 ms, which q's new values come after
        q.mul_(-1)
    encoder = cuda.encoder(stream=stream)
    attention.record(encoder)
    encoder.commit_and_wait()
    got = attention.output.numpy()
    assert np.array_equal(got, attention.expected(cuda))


@pytest.mark.parametrize("brings_tmp", [True, False])
def test_a_captured_op_replays_with_what_is_in_its_buffers(cuda, brings_tmp):
    torch = pytest.importorskip("torch")
    attention = Attention(cuda)
    if not brings_tmp:
        attention.tmp = None
    first = attention.expected(cuda)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    encoder = cuda.encoder(stream=stream)
    attention.record(encoder)
    with torch.cuda.graph(graph, stream=stream):
        encoder.commit()
    for sign in (1, -1):
        q = attention.q.numpy() * sign
        attention.q.copy_from(q)
        attention.output.copy_from(np.zeros((8, 256), np.float32))
        graph.replay()
        torch.cuda.synchronize()
        got = attention.output.numpy()
        assert np.array_equal(got, first) == (sign == 1)
        assert np.array_equal(got, attention.expected(cuda))
    encoder.wait()
    attention.q.copy_from(np.full((8, 256), np.nan, np.float32))
    graph.replay()
    torch.cuda.synchronize()


def test_a_forked_child_says_that_it_cannot_use_the_gpu(cuda):
    buf = cuda.empty(3)
    encoder = cuda.encoder()
    encoder.fwht_sign_premult_f32(cuda.empty((1, 256)))
    encoder.commit_and_wait()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        seen = []
        for call in (lambda: cuda.empty(3), cuda.encoder, buf.numpy, encoder.wait, lambda: tq_hb.Device("cuda")):
            try:
                call()
                seen.append("no error")
            except tq_hb.DeviceError as error:
                seen.append("fork" if "fork" in str(error) else str(error))
        os.write(writer, ",".join(seen).encode())
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1000).decode() == ",".join(["fork"] * 5)
    assert os.waitpid(child, 0)[1] == 0
    assert cuda.empty(3).numpy().tolist() == [0.0, 0.0, 0.0]
