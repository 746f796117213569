"""Rotation, encoding and decoding: byte-exact where the format promises bytes, else to float32 rounding."""

from __future__ import annotations

import numpy as np
import pytest

import reference
import tolerance
import tq_hb

HEAD_DIMS = tq_hb.supported_head_dims()
CODEBOOKS = ("lloyd_max", "mlx_native")
WIDTHS = (5, 6, 8)
PACKINGS = ("byte", "plane")


def packed(codes: np.ndarray, cbits: int, packing: str) -> np.ndarray:
    """Codes of one byte each in the layout of a cache."""
    return codes if packing == "byte" else reference.pack_planes(codes, cbits)


def row_bytes(head_dim: int, cbits: int, packing: str) -> int:
    return head_dim if packing == "byte" else head_dim * cbits // 8


def inputs(head_dim: int) -> dict[str, np.ndarray]:
    """Rows that a rotation treats very differently."""
    rng = np.random.default_rng(head_dim)
    gaussian = rng.standard_normal((40, head_dim))
    uneven = gaussian.copy()
    uneven[:, head_dim // 2 :] *= 1000.0
    # Rotated back, so that the two norm blocks of 512 get unequal energy.
    uneven_blocks = reference.unrotate(uneven)
    ramp = np.arange(head_dim) - head_dim / 2
    rows = {
        "gaussian": gaussian,
        "unequal blocks": uneven_blocks,
        "one-hot": np.eye(head_dim)[:: head_dim // 16],
        "constant": np.array([[1.0], [-3.5], [1e-3]]) * np.ones(head_dim),
        "alternating": np.array([[1.0, -1.0] * (head_dim // 2)]),
        "zero": np.zeros((1, head_dim)),
        "negative zero": np.full((1, head_dim), -0.0),
        "ramp": ramp[None] * np.array([[1.0], [1e-3]]),
        "heavy tail": gaussian**5,
        "denormal": gaussian * 1e-40,
        "near the flush threshold": gaussian * 2.0**-60,
        "a lone value at the threshold": reference.unrotate(np.eye(head_dim)[:4] * 2.0**-59.5),
        "around the tiny-norm rule": gaussian[:20] * np.geomspace(1e-12, 1e-10, 20)[:, None],
        "small": gaussian * 1e-12,
        "huge": gaussian * 1e17,
        "mixed magnitudes": gaussian * 10.0 ** rng.integers(-30, 15, gaussian.shape),
    }
    return {name: x.astype(np.float32) for name, x in rows.items()}


INPUT_NAMES = tuple(inputs(256))


@pytest.mark.parametrize("name", INPUT_NAMES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_encode_gives_the_bytes_of_the_format(device, head_dim, name):
    x = inputs(head_dim)[name]
    for codebook in CODEBOOKS:
        for cbits in WIDTHS:
            codes, norms = tq_hb.quantize(x, cbits, codebook=codebook, device=device)

            want_codes, want_norms = reference.encode_float32(x, cbits, codebook)
            assert np.array_equal(norms.view(np.uint32), want_norms.view(np.uint32)), (codebook, cbits)
            assert np.array_equal(codes, want_codes), (codebook, cbits)

            planes, plane_norms = tq_hb.quantize(x, cbits, codebook=codebook, packing="plane", device=device)
            assert np.array_equal(planes, reference.pack_planes(want_codes, cbits)), (codebook, cbits)
            assert np.array_equal(plane_norms, norms), (codebook, cbits)


@pytest.mark.parametrize("factor", [0.5, 1.25, 16.0])
def test_scale_factor_d512_gives_the_bytes_of_the_format(device, factor):
    x = inputs(512)["gaussian"]
    params = tq_hb.HadamardQuantizeKvHbParams(
        head_dim=512, num_kv_heads=len(x), write_pos=0, cache_capacity=1, scale_factor_d512=factor, codebook_bits=8
    )
    codes, norms = np.zeros((len(x), 1, 512), np.uint8), np.zeros((len(x), 1, 2), np.float32)

    tq_hb.hadamard_quantize_kv_hb(x, codes, norms, params, device=device)

    want_codes, want_norms = reference.encode_float32(x, 8, scale_factor_d512=factor)
    assert np.array_equal(codes[:, 0], want_codes)
    assert np.array_equal(norms[:, 0], want_norms)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_scale_factor_d512_is_ignored_below_512(device, head_dim):
    x = inputs(head_dim)["gaussian"]
    outputs = []
    for factor in (1.0, 3.0):
        params = tq_hb.HadamardQuantizeKvHbParams(
            head_dim=head_dim, num_kv_heads=len(x), write_pos=0, cache_capacity=1, scale_factor_d512=factor
        )
        codes, norms = np.zeros((len(x), 1, head_dim), np.uint8), np.zeros((len(x), 1), np.float32)
        tq_hb.hadamard_quantize_kv_hb(x, codes, norms, params, device=device)
        outputs.append((codes, norms))

    assert np.array_equal(outputs[0][0], outputs[1][0])
    assert np.array_equal(outputs[0][1], outputs[1][1])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_norms_agree_with_float64(device, head_dim):
    x = inputs(head_dim)["gaussian"]

    _, norms = tq_hb.quantize(x, 8, device=device)

    _, want = reference.encode(x, 8)
    np.testing.assert_allclose(norms, want, rtol=tolerance.NORM_RTOL)


@pytest.mark.parametrize("tokens", [None, 1, 5], ids=lambda t: f"tokens={t}")
@pytest.mark.parametrize(("cbits", "packing"), [(6, "byte"), (5, "plane"), (6, "plane"), (8, "plane")])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_encode_op_writes_its_slots_and_nothing_else(device, head_dim, cbits, packing, tokens):
    rng = np.random.default_rng(0)
    src = rng.standard_normal((3, head_dim) if tokens is None else (tokens, 3, head_dim)).astype(np.float32)
    rows = rng.integers(0, 256, (3, 20, row_bytes(head_dim, cbits, packing))).astype(np.uint8)
    norms = rng.standard_normal(reference.norms_shape(head_dim, 3, 20)).astype(np.float32)
    want_rows, want_norms = rows.copy(), norms.copy()
    run = src[None] if tokens is None else src
    codes, lengths = reference.encode_float32(run, cbits)
    want_rows[:, 7 : 7 + len(run)] = packed(codes, cbits, packing).swapaxes(0, 1)
    want_norms[:, 7 : 7 + len(run)] = lengths.swapaxes(0, 1)

    params = tq_hb.HadamardQuantizeKvHbParams(
        head_dim=head_dim, num_kv_heads=3, write_pos=7, cache_capacity=20, codebook_bits=cbits
    )
    tq_hb.hadamard_quantize_kv_hb(src, rows, norms, params, packing=packing, device=device)

    assert np.array_equal(rows, want_rows)
    assert np.array_equal(norms, want_norms)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    ("write_pos", "tokens"),
    [(7, 1), (8, 1), (6, 5), (1000, 8), (3, 8), (5, 19), (0, 9), (2**31, 3)],
    ids=lambda value: str(value),
)
def test_encode_op_on_a_ring_equals_one_token_after_the_other(device, write_pos, tokens, packing):
    rng = np.random.default_rng(tokens)
    src = rng.standard_normal((tokens, 2, 256)).astype(np.float32)
    rows, norms = np.zeros((2, 8, row_bytes(256, 5, packing)), np.uint8), np.zeros((2, 8), np.float32)
    want_rows, want_norms = rows.copy(), norms.copy()
    codes, lengths = reference.encode_float32(src, 5)
    for t in range(tokens):
        want_rows[:, (write_pos + t) % 8] = packed(codes[t], 5, packing)
        want_norms[:, (write_pos + t) % 8] = lengths[t]

    params = tq_hb.HadamardQuantizeKvHbParams(
        head_dim=256, num_kv_heads=2, write_pos=write_pos, cache_capacity=8, is_sliding=1, codebook_bits=5
    )
    tq_hb.hadamard_quantize_kv_hb(src, rows, norms, params, packing=packing, device=device)

    assert np.array_equal(rows, want_rows)
    assert np.array_equal(norms, want_norms)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("k_bits", "v_bits"), [(8, None), (8, 5), (6, 5)])
def test_dual_encode_equals_two_single_encodes(device, head_dim, k_bits, v_bits, packing):
    rng = np.random.default_rng(9)
    src_k, src_v = rng.standard_normal((2, 4, 3, head_dim)).astype(np.float32)
    params = tq_hb.HadamardQuantizeKvHbParams(
        head_dim=head_dim, num_kv_heads=3, write_pos=1, cache_capacity=6, codebook_bits=k_bits
    )

    def buffers(cbits):
        rows = np.zeros((3, 6, row_bytes(head_dim, cbits, packing)), np.uint8)
        return rows, np.zeros(reference.norms_shape(head_dim, 3, 6), np.float32)

    (k_rows, k_norms), (v_rows, v_norms) = buffers(k_bits), buffers(v_bits or k_bits)
    tq_hb.hadamard_quantize_kv_hb_dual(
        src_k, src_v, k_rows, v_rows, k_norms, v_norms, params, v_bits=v_bits, packing=packing, device=device
    )

    for src, cbits, rows, norms in ((src_k, k_bits, k_rows, k_norms), (src_v, v_bits or k_bits, v_rows, v_norms)):
        codes, lengths = reference.encode_float32(src, cbits)
        assert np.array_equal(rows[:, 1:5], packed(codes, cbits, packing).swapaxes(0, 1))
        assert np.array_equal(norms[:, 1:5], lengths.swapaxes(0, 1))
        assert not rows[:, [0, 5]].any()
        assert not norms[:, [0, 5]].any()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_recorded_encode_then_attend_sees_the_new_token(device, head_dim, packing):
    rng = np.random.default_rng(2)
    k, v = rng.standard_normal((2, 2, head_dim)).astype(np.float32)
    q = rng.standard_normal((4, head_dim)).astype(np.float32)
    k_rows, v_rows = (device.empty((2, 1, row_bytes(head_dim, 6, packing)), np.uint8) for _ in range(2))
    k_norms, v_norms = (device.empty(reference.norms_shape(head_dim, 2, 1), np.float32) for _ in range(2))
    output = device.empty((4, head_dim), np.float32)
    hp = tq_hb.HadamardQuantizeKvHbParams(
        head_dim=head_dim, num_kv_heads=2, write_pos=0, cache_capacity=1, codebook_bits=6
    )
    p = tq_hb.FlashAttnVecTqHbParams(
        num_heads=4, num_kv_heads=2, head_dim=head_dim, kv_seq_len=1, kv_capacity=1, scale=1.0, codebook_bits=6
    )

    enc = device.encoder()
    enc.hadamard_quantize_kv_hb_dual(k, v, k_rows, v_rows, k_norms, v_norms, hp, packing=packing)
    enc.memory_barrier()
    enc.flash_attn_vec_tq_hb(q, k_rows, k_norms, v_rows, v_norms, output, None, p, packing=packing, precision="strict")
    enc.commit_and_wait()

    codes, lengths = reference.encode_float32(v, 6)
    want = np.repeat(reference.decode(codes, lengths, 6), 2, axis=0)
    assert tolerance.nmse(output.numpy(), want) <= tolerance.ATTEND_NMSE


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("cbits", WIDTHS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_dequantize_matches_reference(head_dim, cbits, codebook, packing):
    rng = np.random.default_rng(cbits)
    codes = rng.integers(0, 2**cbits, (3, 7, head_dim)).astype(np.uint8)
    norms = rng.uniform(0.1, 20.0, reference.norms_shape(head_dim, 3, 7)).astype(np.float32)
    factor = 1.5 if head_dim == 512 else 1.0
    want = reference.decode(codes, norms, cbits, codebook, factor)
    rows = packed(codes, cbits, packing)
    keywords = {"head_dim": head_dim, "codebook": codebook, "packing": packing, "scale_factor_d512": factor}

    rotated = tq_hb.dequantize(rows, norms, cbits, rotated=True, **keywords)
    unrotated = tq_hb.dequantize(rows, norms, cbits, **keywords)

    assert rotated.dtype == unrotated.dtype == np.float32
    np.testing.assert_allclose(rotated, want, rtol=tolerance.DECODE_RTOL)
    assert tolerance.nmse(unrotated, reference.unrotate(want)) <= tolerance.DECODE_UNROTATED_NMSE


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("is_sliding", [0, 1])
@pytest.mark.parametrize("cbits", WIDTHS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_dequantize_op_reads_one_position(device, head_dim, cbits, is_sliding, packing):
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 2**cbits, (3, 9, head_dim)).astype(np.uint8)
    norms = rng.uniform(0.1, 20.0, reference.norms_shape(head_dim, 3, 9)).astype(np.float32)
    params = tq_hb.HadamardQuantizeKvHbParams(
        head_dim=head_dim, num_kv_heads=3, write_pos=0, cache_capacity=9, is_sliding=is_sliding, codebook_bits=cbits
    )
    pos = 9 * 4 + 5 if is_sliding else 5

    got = tq_hb.tq_dequantize_hb_kv(
        packed(codes, cbits, packing), norms, params, pos=pos, packing=packing, device=device
    )

    np.testing.assert_allclose(got, reference.decode(codes[:, 5], norms[:, 5], cbits), rtol=tolerance.DECODE_RTOL)


@pytest.mark.parametrize("cbits", WIDTHS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_converting_the_packing_is_exact_both_ways(head_dim, cbits):
    codes = np.random.default_rng(cbits).integers(0, 2**cbits, (3, 5, head_dim)).astype(np.uint8)
    keywords = {"head_dim": head_dim}

    planes = tq_hb.convert_packing(codes, cbits, source="byte", target="plane", **keywords)

    assert planes.shape == (3, 5, head_dim * cbits // 8)
    assert np.array_equal(planes, reference.pack_planes(codes, cbits))
    assert np.array_equal(reference.unpack_planes(planes, cbits, head_dim), codes)
    assert np.array_equal(tq_hb.convert_packing(planes, cbits, source="plane", target="byte", **keywords), codes)
    for rows, packing in ((codes, "byte"), (planes, "plane")):
        same = tq_hb.convert_packing(rows, cbits, source=packing, target=packing, **keywords)
        assert np.array_equal(same, rows)
        assert not np.shares_memory(same, rows)


@pytest.mark.parametrize("cbits", [5, 6])
def test_bits_above_the_width_are_left_out_of_the_planes(cbits):
    codes = np.random.default_rng(0).integers(0, 256, (4, 256)).astype(np.uint8)
    keywords = {"head_dim": 256, "source": "byte", "target": "plane"}
    clean = tq_hb.convert_packing(codes & (2**cbits - 1), cbits, **keywords)
    assert np.array_equal(tq_hb.convert_packing(codes, cbits, **keywords), clean)


@pytest.mark.parametrize(
    ("head_dim", "cbits", "coordinate", "nibble", "high"),
    [
        # (byte, first bit) of the low four bits, and of those above them.
        (256, 5, 0, (0, 0), (128, 0)),
        (256, 5, 64, (0, 4), (128, 4)),
        (256, 5, 16, (16, 0), (128, 1)),
        (256, 5, 255, (127, 4), (159, 7)),
        (256, 6, 33, (33, 0), (129, 2)),
        (256, 6, 128, (64, 0), (160, 0)),
        (64, 5, 40, (8, 4), (32, 5)),
        (64, 6, 63, (31, 4), (47, 6)),
        (128, 6, 70, (6, 4), (70, 4)),
        (512, 5, 511, (255, 4), (319, 7)),
    ],
)
def test_where_the_bits_of_a_coordinate_lie(head_dim, cbits, coordinate, nibble, high):
    codes = np.zeros(head_dim, np.uint8)
    codes[coordinate] = 2**cbits - 1
    want = np.zeros(head_dim * cbits // 8, np.uint8)
    want[nibble[0]] = 15 << nibble[1]
    want[high[0]] |= (2 ** (cbits - 4) - 1) << high[1]

    got = tq_hb.convert_packing(codes, cbits, head_dim=head_dim, source="byte", target="plane")

    assert np.array_equal(got, want)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotate_and_unrotate_match_the_matrix(head_dim):
    x = np.random.default_rng(5).standard_normal((2, 3, head_dim)).astype(np.float32)

    assert tolerance.nmse(tq_hb.rotate(x), reference.rotate(x)) <= tolerance.ROTATE_NMSE
    assert tolerance.nmse(tq_hb.unrotate(x), reference.unrotate(x)) <= tolerance.ROTATE_NMSE


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_fwht_ops_match_the_matrix(device, head_dim):
    x = np.random.default_rng(6).standard_normal((5, head_dim)).astype(np.float32)
    forward, backward = device.array(x), device.array(x)

    enc = device.encoder()
    enc.fwht_sign_premult_f32(forward)
    enc.fwht_sign_undo_f32(backward)
    enc.commit_and_wait()

    assert tolerance.nmse(forward.numpy(), reference.rotate(x)) <= tolerance.ROTATE_NMSE
    assert tolerance.nmse(backward.numpy(), reference.unrotate(x)) <= tolerance.ROTATE_NMSE


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_fwht_array_forms_are_rotate_and_unrotate(head_dim):
    x = np.random.default_rng(7).standard_normal((5, head_dim)).astype(np.float32)

    assert np.array_equal(tq_hb.fwht_sign_premult_f32(x.copy()), tq_hb.rotate(x))
    assert np.array_equal(tq_hb.fwht_sign_undo_f32(x.copy()), tq_hb.unrotate(x))


@pytest.mark.parametrize(("codebook", "cbits"), list(tolerance.FORMAT_ERROR), ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_format_error_is_that_of_its_codebook(head_dim, codebook, cbits):
    x = np.random.default_rng(8).standard_normal((2**17 // head_dim, head_dim)).astype(np.float32)

    codes, norms = tq_hb.quantize(x, cbits, codebook=codebook)
    back = tq_hb.dequantize(codes, norms, cbits, head_dim=head_dim, codebook=codebook)

    assert tolerance.nmse(back, x) == pytest.approx(
        tolerance.FORMAT_ERROR[codebook, cbits], rel=tolerance.FORMAT_ERROR_RTOL
    )
