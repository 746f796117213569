"""NaN, infinity and norms that overflow: refused whole on host arrays, row by row on recorded buffers."""

from __future__ import annotations

import numpy as np
import pytest

import reference
import tq_hb

BAD_ROWS = {
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "overflowing norm": 1e19,
}
HEAD_DIMS = tq_hb.supported_head_dims()


def rows_with_a_bad_one(head_dim: int, value: float, token: int = 1, head: int = 2) -> np.ndarray:
    """(3 tokens, 4 heads, D), fine but for one row."""
    x = np.random.default_rng(0).standard_normal((3, 4, head_dim)).astype(np.float32)
    if np.isfinite(value):
        x[token, head] = value * 8.0  # the sum of squares overflows, no single value does
    else:
        x[token, head, head_dim - 1] = value
    return x


def cache_buffers(head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((4, 5, head_dim), 9, np.uint8), np.full(reference.norms_shape(head_dim, 4, 5), 9.0, np.float32)


def encode_params(head_dim: int) -> tq_hb.HadamardQuantizeKvHbParams:
    return tq_hb.HadamardQuantizeKvHbParams(head_dim=head_dim, num_kv_heads=4, write_pos=1, cache_capacity=5)


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_host_encode_raises_and_writes_nothing(device, head_dim, kind):
    packed, norms = cache_buffers(head_dim)
    src = rows_with_a_bad_one(head_dim, BAD_ROWS[kind])

    with pytest.raises(tq_hb.InvalidArgument, match="hadamard_quantize_kv_hb.*src.*token 1.*head 2"):
        tq_hb.hadamard_quantize_kv_hb(src, packed, norms, encode_params(head_dim), device=device)

    assert (packed == 9).all()
    assert (norms == 9.0).all()


@pytest.mark.parametrize("bad", ["k", "v"])
def test_host_dual_encode_raises_and_writes_neither(device, bad):
    buffers = [cache_buffers(256) for _ in range(2)]
    (k_packed, k_norms), (v_packed, v_norms) = buffers
    src = {name: rows_with_a_bad_one(256, np.nan if name == bad else 0.5) for name in "kv"}

    with pytest.raises(tq_hb.InvalidArgument, match=f"src_{bad}.*token 1.*head 2"):
        tq_hb.hadamard_quantize_kv_hb_dual(
            src["k"], src["v"], k_packed, v_packed, k_norms, v_norms, encode_params(256), device=device
        )

    assert all((packed == 9).all() and (norms == 9.0).all() for packed, norms in buffers)


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_quantize_raises(device, head_dim, kind):
    with pytest.raises(tq_hb.InvalidArgument, match="quantize"):
        tq_hb.quantize(rows_with_a_bad_one(head_dim, BAD_ROWS[kind]), 8, device=device)


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_recorded_encode_leaves_the_bad_row_and_writes_the_others(device, head_dim, kind):
    host_packed, host_norms = cache_buffers(head_dim)
    packed, norms = device.array(host_packed), device.array(host_norms)
    src = rows_with_a_bad_one(head_dim, BAD_ROWS[kind])
    good = src.copy()
    good[1, 2] = 0.0
    codes, lengths = reference.encode_float32(good, 8)
    want_packed, want_norms = host_packed.copy(), host_norms.copy()
    want_packed[:, 1:4], want_norms[:, 1:4] = codes.swapaxes(0, 1), lengths.swapaxes(0, 1)
    want_packed[2, 2], want_norms[2, 2] = 9, 9.0
    enc = device.encoder()
    enc.hadamard_quantize_kv_hb(device.array(src), packed, norms, encode_params(head_dim))
    enc.commit()

    with pytest.raises(tq_hb.InvalidArgument, match="token 1.*head 2"):
        enc.wait()

    assert np.array_equal(packed.numpy(), want_packed)
    assert np.array_equal(norms.numpy(), want_norms)


def test_the_wait_names_the_first_bad_token_and_head(device):
    src = rows_with_a_bad_one(256, np.nan, token=2, head=0)
    src[1, 3, 0] = np.inf
    packed, norms = (device.array(a) for a in cache_buffers(256))
    enc = device.encoder()
    enc.hadamard_quantize_kv_hb(device.array(src), packed, norms, encode_params(256))

    with pytest.raises(tq_hb.InvalidArgument, match="token 1.*head 3"):
        enc.commit_and_wait()


def test_every_wait_says_what_went_wrong(device):
    packed, norms = (device.array(a) for a in cache_buffers(256))
    enc = device.encoder()
    enc.hadamard_quantize_kv_hb(device.array(rows_with_a_bad_one(256, np.nan)), packed, norms, encode_params(256))
    enc.commit()
    for _ in range(2):
        with pytest.raises(tq_hb.InvalidArgument, match="token 1.*head 2"):
            enc.wait()


def test_a_device_is_usable_after_a_bad_row(device):
    packed, norms = (device.array(a) for a in cache_buffers(256))
    enc = device.encoder()
    enc.hadamard_quantize_kv_hb(device.array(rows_with_a_bad_one(256, np.nan)), packed, norms, encode_params(256))
    with pytest.raises(tq_hb.InvalidArgument):
        enc.commit_and_wait()
    good = np.ones((3, 4, 256), np.float32)

    again = device.encoder()
    again.hadamard_quantize_kv_hb(device.array(good), packed, norms, encode_params(256))
    again.commit_and_wait()

    assert np.array_equal(packed.numpy()[:, 1:4], reference.encode_float32(good, 8)[0].swapaxes(0, 1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_host_attend_refuses_a_bad_query_and_writes_nothing(device, value):
    p = tq_hb.FlashAttnVecTqHbParams(num_heads=4, num_kv_heads=2, head_dim=256, kv_seq_len=1, kv_capacity=1, scale=1.0)
    packed, norms = np.zeros((2, 1, 256), np.uint8), np.ones((2, 1), np.float32)
    q, out = np.ones((4, 256), np.float32), np.full((4, 256), 7.0, np.float32)
    q[3, 17] = value

    with pytest.raises(tq_hb.InvalidArgument, match="flash_attn_vec_tq_hb.*q.*head 3"):
        tq_hb.flash_attn_vec_tq_hb(q, packed, norms, packed, norms, p, out=out, device=device)

    assert (out == 7.0).all()


def test_recorded_attend_leaves_the_row_of_a_bad_query(device):
    p = tq_hb.FlashAttnVecTqHbParams(num_heads=4, num_kv_heads=2, head_dim=256, kv_seq_len=1, kv_capacity=1, scale=1.0)
    packed = device.array(np.full((2, 1, 256), 200, np.uint8))
    norms = device.array(np.ones((2, 1), np.float32))
    q = np.ones((4, 256), np.float32)
    q[2, 5] = np.nan
    output = device.array(np.full((4, 256), 7.0, np.float32))
    enc = device.encoder()
    enc.flash_attn_vec_tq_hb(device.array(q), packed, norms, packed, norms, output, None, p, precision="strict")

    with pytest.raises(tq_hb.InvalidArgument, match="head 2"):
        enc.commit_and_wait()

    got = output.numpy()
    assert (got[2] == 7.0).all()
    want = tq_hb.codebook(8)[200] / 16
    np.testing.assert_allclose(got[[0, 1, 3]], want, rtol=1e-6)


def test_all_that_a_query_is_asked_is_to_be_finite(device):
    cache = tq_hb.KVCache(2, 256, 8, device=device)
    rows = np.ones((2, 2, 256), np.float32)
    cache.append(rows, rows)
    q = np.full((2, 4, 256), 1e30, np.float32)  # whose squares float32 does not have
    assert np.isfinite(cache.attend(q)).all()
    q[1, 3, 7] = np.nan
    with pytest.raises(
        tq_hb.InvalidArgument, match=r"^KVCache.attend: q must be finite, got a bad row at token 1, head 3$"
    ):
        cache.attend(q)
    with pytest.raises(tq_hb.InvalidArgument, match=r"^KVCache.append: v must be finite with a squared norm that fits"):
        cache.append(rows, q[:, :2])


@pytest.mark.parametrize("has_mean", [False, True])
@pytest.mark.parametrize("is_empty", [False, True])
def test_a_cache_that_refuses_a_query_has_written_nothing(device, has_mean, is_empty):
    mean = np.ones((2, 256), np.float32) if has_mean else None
    cache = tq_hb.KVCache(2, 256, 8, k_mean=mean, device=device)
    batch = tq_hb.BatchedKVCache(2, 2, 256, 8, k_mean=mean, device=device)
    if not is_empty:
        rows = np.ones((2, 3, 2, 256), np.float32)
        cache.append(*rows)
        batch.append([0, 1], rows, rows)
    q, out = np.ones((2, 4, 256), np.float32), np.full((2, 4, 256), 7.0, np.float32)
    q[1, 3, 7] = np.nan

    with pytest.raises(tq_hb.InvalidArgument, match=r"^KVCache.attend: q must be finite, .* token 1, head 3$"):
        cache.attend(q, q_offset=1, return_lse=True, out=out)
    with pytest.raises(tq_hb.InvalidArgument, match=r"^BatchedKVCache.attend: q\[1\] must be .* token 0, head 3$"):
        batch.attend([0, 1], q, q_offset=1, return_lse=True, out=out)

    assert (out == 7.0).all()


def test_a_recorded_query_is_asked_no_more(device):
    p = tq_hb.FlashAttnVecTqHbParams(num_heads=4, num_kv_heads=2, head_dim=256, kv_seq_len=1, kv_capacity=1, scale=1.0)
    packed, norms = device.empty((2, 1, 256), np.uint8), device.empty((2, 1))
    enc = device.encoder()
    enc.flash_attn_vec_tq_hb(
        np.full((4, 256), np.inf, np.float32), packed, norms, packed, norms, device.empty((4, 256)), None, p
    )
    with pytest.raises(tq_hb.InvalidArgument, match=r"q must be finite, got a bad row at token 0, head 0$"):
        enc.commit_and_wait()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_query_among_several_is_named_by_its_token_and_head(device, value):
    p = tq_hb.FlashAttnVecTqHbParams(num_heads=4, num_kv_heads=2, head_dim=256, kv_seq_len=3, kv_capacity=3, scale=1.0)
    packed, norms = np.zeros((2, 3, 256), np.uint8), np.ones((2, 3), np.float32)
    q, out = np.ones((3, 4, 256), np.float32), np.full((3, 4, 256), 7.0, np.float32)
    q[1, 2, 255] = value

    with pytest.raises(tq_hb.InvalidArgument, match="flash_attn_vec_tq_hb.*q.*token 1.*head 2"):
        tq_hb.flash_attn_vec_tq_hb(q, packed, norms, packed, norms, p, out=out, device=device)

    assert (out == 7.0).all()


@pytest.mark.parametrize("mode", ["off", "on"])
def test_recorded_attend_leaves_the_row_of_a_bad_query_among_several(environment, device, mode):
    environment(TQ_HB_GQA=mode)
    p = tq_hb.FlashAttnVecTqHbParams(num_heads=4, num_kv_heads=2, head_dim=256, kv_seq_len=3, kv_capacity=3, scale=1.0)
    packed = device.array(np.full((2, 3, 256), 200, np.uint8))
    norms = device.array(np.ones((2, 3), np.float32))
    q = np.ones((3, 4, 256), np.float32)
    q[1, 2, 5] = q[2, 0, 0] = np.nan
    output, lse = device.array(np.full(q.shape, 7.0, np.float32)), device.array(np.full((3, 4), 7.0, np.float32))
    enc = device.encoder()
    enc.flash_attn_vec_tq_hb(
        device.array(q), packed, norms, packed, norms, output, None, p, precision="strict", lse=lse
    )

    with pytest.raises(tq_hb.InvalidArgument, match="token 1.*head 2"):
        enc.commit_and_wait()

    bad = np.isnan(q).any(-1)
    assert (output.numpy()[bad] == 7.0).all()
    assert (lse.numpy()[bad] == 7.0).all()
    np.testing.assert_allclose(output.numpy()[~bad], tq_hb.codebook(8)[200] / 16, rtol=1e-6)
    assert (lse.numpy()[~bad] != 7.0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("form", ["array", "recorded"])
def test_a_bad_sink_is_named_by_its_head(device, form, value):
    p = tq_hb.FlashAttnVecTqHbParams(num_heads=4, num_kv_heads=2, head_dim=256, kv_seq_len=1, kv_capacity=1, scale=1.0)
    inputs = np.ones((4, 256), np.float32), *(np.zeros((2, 1, 256), np.uint8), np.ones((2, 1), np.float32)) * 2
    sinks = np.array([0.0, -np.inf, value, value], np.float32)
    forms = {
        "array": lambda: tq_hb.flash_attn_vec_tq_hb(*inputs, p, sinks=sinks, device=device),
        "recorded": lambda: device.encoder().flash_attn_vec_tq_hb(
            *inputs, device.empty((4, 256)), None, p, sinks=sinks
        ),
    }

    with pytest.raises(tq_hb.InvalidArgument, match=rf"^flash_attn_vec_tq_hb: sinks must be .*got {value} at head 2$"):
        forms[form]()


@pytest.mark.parametrize("bad", ["k", "v"])
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_append_of_a_bad_row_leaves_the_cache_as_it_was(device, kind, bad):
    cache = tq_hb.KVCache(4, 256, sliding_window=3, device=device)
    good = np.random.default_rng(1).standard_normal((5, 4, 256)).astype(np.float32)
    cache.append(good, good)
    before = [len(cache), cache.offset, *(x.tobytes() for x in cache.dequantize())]
    x = {name: rows_with_a_bad_one(256, BAD_ROWS[kind] if name == bad else 0.5) for name in "kv"}

    with pytest.raises(tq_hb.InvalidArgument, match=f"append.*{bad}.*token 1.*head 2"):
        cache.append(x["k"], x["v"])

    assert [len(cache), cache.offset, *(x.tobytes() for x in cache.dequantize())] == before


def test_attend_of_a_bad_query_raises(device):
    cache = tq_hb.KVCache(2, 256, device=device)
    cache.append(np.ones((2, 2, 256), np.float32), np.ones((2, 2, 256), np.float32))
    q = np.ones((4, 256), np.float32)
    q[1, 0] = np.nan

    with pytest.raises(tq_hb.InvalidArgument, match="attend.*q.*head 1"):
        cache.attend(q)


def test_a_float64_value_beyond_float32_is_bad(device):
    with pytest.raises(tq_hb.InvalidArgument, match="quantize"):
        tq_hb.quantize(np.full((1, 256), 1e300), 8, device=device)


def test_a_query_whose_product_with_the_mean_key_overflows_is_refused_whole(device):
    mean = np.full((1, 64), 1e17, np.float32)
    cache = tq_hb.KVCache(1, 64, k_mean=mean, device=device)
    cache.append(mean[None], np.ones((1, 1, 64), np.float32))
    q = np.ones((3, 64), np.float32)
    q[1] = 1e22
    out = np.full((3, 64), 7, np.float32)

    rule = r"attend: q must have a product with k_mean that, times the scale, fits in float32, got 7\.99.*e\+39"
    with pytest.raises(tq_hb.InvalidArgument, match=rule):
        cache.attend(q, softcap=30.0, out=out)

    assert np.all(out == 7)


@pytest.mark.parametrize(
    ("lead", "where", "name"),
    [((), (), "x"), ((5,), (3,), r"x\[3\]"), ((3, 2), (1, 1), r"x\[1, 1\]"), ((2, 3, 4), (1, 0, 2), r"x\[1, 0, 2\]")],
    ids=str,
)
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38], ids=str)
def test_quantize_says_where_along_the_callers_axes_a_bad_row_is(lead, where, name, value):
    x = np.ones((*lead, 64), np.float32)
    x[where] = value
    with pytest.raises(tq_hb.InvalidArgument, match=f"^quantize: {name} must be finite .*, got a bad row$"):
        tq_hb.quantize(x, 8)
