"""The mistakes that implementations of this format really make, each pinned by the behaviour it breaks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import reference
import tolerance
import tq_hb
from cases import Case, expected, make_problem

HEAD_DIMS = tq_hb.supported_head_dims()
WIDTHS = (5, 6, 8)
CODEBOOKS = ("lloyd_max", "mlx_native")


PACKINGS = ("byte", "plane")


def unit_norms(head_dim: int, *lead: int) -> np.ndarray:
    """Norms under which a decoded value is the level itself."""
    return np.full(reference.norms_shape(head_dim, *lead), reference.unit_norm(head_dim), np.float32)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_coordinate_of_the_query_reaches_the_score(device, head_dim):
    # Head j asks for coordinate j alone.
    case = Case(head_dim=head_dim, num_heads=head_dim, num_kv_heads=1, kv_seq_len=33, kv_capacity=33)
    problem = make_problem(case)
    q = 50.0 * np.eye(head_dim, dtype=np.float32)
    k, v = (
        reference.decode(packed, norms, 8)
        for packed, norms in ((problem.k_packed, problem.k_norms), (problem.v_packed, problem.v_norms))
    )

    got = tq_hb.flash_attn_vec_tq_hb(q, *problem.buffers()[1:], case.params(), precision="strict", device=device)

    want = reference.attend(q, k, v, scale=case.scale)
    worst = max(tolerance.nmse(got[j], want[j]) for j in range(head_dim))
    assert worst <= tolerance.ATTEND_NMSE


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("cbits", WIDTHS)
def test_every_decoder_uses_the_encoders_table(device, cbits, packing, codebook, head_dim):
    count = 2**cbits
    codes = np.stack([(np.arange(head_dim) + start) % count for start in range(0, count, head_dim)]).astype(np.uint8)
    keywords = {"codebook": codebook, "packing": packing}
    for row in codes[:, None, None]:  # small heads need several to have every code once
        check_every_decoder(device, row, cbits, head_dim, keywords)


def check_every_decoder(device, codes, cbits, head_dim, keywords):
    norms = unit_norms(head_dim, 1, 1)
    want = tq_hb.codebook(cbits, keywords["codebook"])[codes[0]]
    if keywords["packing"] == "plane":
        codes = reference.pack_planes(codes, cbits)
    hp = tq_hb.HadamardQuantizeKvHbParams(
        head_dim=head_dim, num_kv_heads=1, write_pos=0, cache_capacity=1, codebook_bits=cbits
    )
    p = tq_hb.FlashAttnVecTqHbParams(
        num_heads=1, num_kv_heads=1, head_dim=head_dim, kv_seq_len=1, kv_capacity=1, scale=1.0, codebook_bits=cbits
    )
    q = np.zeros((1, head_dim), np.float32)

    standalone = tq_hb.tq_dequantize_hb_kv(codes, norms, hp, pos=0, device=device, **keywords)
    attention = tq_hb.flash_attn_vec_tq_hb(
        q, codes, norms, codes, norms, p, precision="strict", device=device, **keywords
    )
    whole = tq_hb.dequantize(codes, norms, cbits, head_dim=head_dim, rotated=True, **keywords)

    np.testing.assert_allclose(standalone, want, rtol=tolerance.DECODE_RTOL)
    np.testing.assert_allclose(attention, want, rtol=tolerance.DECODE_RTOL)
    np.testing.assert_allclose(whole[0], want, rtol=tolerance.DECODE_RTOL)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decoders_ignore_the_unused_high_bits_of_a_code(device, head_dim):
    case = Case(head_dim=head_dim, k_bits=5, v_bits=6)
    problem = make_problem(case)
    q, k_packed, k_norms, v_packed, v_norms = problem.buffers()
    k_marked, v_marked = k_packed | np.uint8(0xE0), v_packed | np.uint8(0xC0)
    hp = tq_hb.HadamardQuantizeKvHbParams(
        head_dim=head_dim, num_kv_heads=case.num_kv_heads, write_pos=0, cache_capacity=case.kv_capacity, codebook_bits=5
    )

    def attend(k: np.ndarray, v: np.ndarray) -> np.ndarray:
        return tq_hb.flash_attn_vec_tq_hb(q, k, k_norms, v, v_norms, case.params(), device=device, **case.keywords())

    def standalone(k: np.ndarray) -> np.ndarray:
        return tq_hb.tq_dequantize_hb_kv(k, k_norms, hp, pos=3, device=device)

    def whole(k: np.ndarray) -> np.ndarray:
        return tq_hb.dequantize(k, k_norms, 5, head_dim=head_dim)

    np.testing.assert_array_equal(attend(k_marked, v_marked), attend(k_packed, v_packed))
    np.testing.assert_array_equal(standalone(k_marked), standalone(k_packed))
    np.testing.assert_array_equal(whole(k_marked), whole(k_packed))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("k_bits", "v_bits"), list(itertools.product(WIDTHS, WIDTHS)), ids=str)
def test_every_entry_point_takes_every_width(device, head_dim, k_bits, v_bits, packing):
    rng = np.random.default_rng(k_bits * 10 + v_bits)
    k, v = rng.standard_normal((2, 3, 1, head_dim)).astype(np.float32)
    q = rng.standard_normal((2, head_dim)).astype(np.float32)
    (k_codes, k_norms), (v_codes, v_norms) = (reference.encode_float32(x, b) for x, b in ((k, k_bits), (v, v_bits)))
    k_hat, v_hat = (
        reference.decode(codes, norms, b).swapaxes(0, 1)
        for codes, norms, b in ((k_codes, k_norms, k_bits), (v_codes, v_norms, v_bits))
    )
    want = reference.unrotate(reference.attend(reference.rotate(q), k_hat, v_hat, scale=head_dim**-0.5))

    hp = tq_hb.HadamardQuantizeKvHbParams(
        head_dim=head_dim, num_kv_heads=1, write_pos=0, cache_capacity=3, codebook_bits=k_bits
    )
    k_packed, v_packed = (
        np.zeros((1, 3, head_dim if packing == "byte" else head_dim * b // 8), np.uint8) for b in (k_bits, v_bits)
    )
    kn, vn = np.zeros((2, *reference.norms_shape(head_dim, 1, 3)), np.float32)
    tq_hb.hadamard_quantize_kv_hb_dual(
        k, v, k_packed, v_packed, kn, vn, hp, v_bits=v_bits, packing=packing, device=device
    )
    p = tq_hb.FlashAttnVecTqHbParams(
        num_heads=2, num_kv_heads=1, head_dim=head_dim, kv_seq_len=3, kv_capacity=3, scale=head_dim**-0.5,
        codebook_bits=k_bits, fuse_fwht_pre=1,
    )  # fmt: skip
    by_op = tq_hb.flash_attn_vec_tq_hb_with_fused_undo(
        q, k_packed, kn, v_packed, vn, p, v_bits=v_bits, packing=packing, precision="strict", device=device
    )
    cache = tq_hb.KVCache(1, head_dim, k_bits=k_bits, v_bits=v_bits, packing=packing, precision="strict", device=device)
    cache.append(k, v)

    for rows, codes, cbits in ((k_packed, k_codes, k_bits), (v_packed, v_codes, v_bits)):
        assert np.array_equal(rows[0], codes[:, 0] if packing == "byte" else reference.pack_planes(codes[:, 0], cbits))
    assert tolerance.nmse(by_op, want) <= tolerance.ATTEND_NMSE
    assert tolerance.nmse(cache.attend(q), want) <= tolerance.ATTEND_NMSE


@pytest.mark.parametrize("appended", [9, 12, 17, 40], ids=lambda n: f"appended{n}")
@pytest.mark.parametrize("window", [None, 3, 8], ids=lambda w: f"window{w}")
def test_a_wrapped_ring_starts_at_its_oldest_slot(device, appended, window):
    """After wrapping by one, by half, and fully; the window separates oldest from newest."""
    capacity = 8
    x = np.random.default_rng(appended).standard_normal((appended, 1, 256)).astype(np.float32)
    codes, lengths = reference.encode_float32(x, 8)
    packed, norms = np.zeros((1, capacity, 256), np.uint8), np.zeros((1, capacity), np.float32)
    for t in range(appended):
        packed[0, t % capacity], norms[0, t % capacity] = codes[t, 0], lengths[t, 0]
    q = 3.0 * np.random.default_rng(1).standard_normal((1, 256)).astype(np.float32)
    p = tq_hb.FlashAttnVecTqHbParams(
        num_heads=1, num_kv_heads=1, head_dim=256, kv_seq_len=capacity, kv_capacity=capacity, scale=1 / 16,
        mask_type=2 if window else 0, sliding_window=window or 0, ring_start=appended % capacity,
    )  # fmt: skip

    got = tq_hb.flash_attn_vec_tq_hb(q, packed, norms, packed, norms, p, precision="strict", device=device)

    seen = reference.decode(codes, lengths, 8)[-(window or capacity) :].swapaxes(0, 1)
    assert tolerance.nmse(got, reference.attend(q, seen, seen, scale=1 / 16)) <= tolerance.ATTEND_NMSE


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_quantiser_sees_unit_variance(device, head_dim, codebook):
    """A second normalisation, or a missing one, would put everything in the outermost levels or the innermost."""
    x = 37.0 * np.random.default_rng(0).standard_normal((64, head_dim)).astype(np.float32)

    codes, _ = tq_hb.quantize(x, 8, codebook=codebook, device=device)

    seen = reference.levels(8, codebook)[codes]
    assert np.sqrt(np.mean(seen.astype(np.float64) ** 2)) == pytest.approx(1.0, abs=tolerance.QUANTISER_RMS_ATOL)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_dequantiser_and_the_attention_kernel_agree(device, head_dim):
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 256, (2, 1, head_dim)).astype(np.uint8)
    norms = rng.uniform(0.5, 30.0, reference.norms_shape(head_dim, 2, 1)).astype(np.float32)
    hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=head_dim, num_kv_heads=2, write_pos=0, cache_capacity=1)
    # With a single key the softmax weight is 1 and the output is the decoded value.
    p = tq_hb.FlashAttnVecTqHbParams(
        num_heads=2, num_kv_heads=2, head_dim=head_dim, kv_seq_len=1, kv_capacity=1, scale=1.0
    )
    q = rng.standard_normal((2, head_dim)).astype(np.float32)

    standalone = tq_hb.tq_dequantize_hb_kv(codes, norms, hp, pos=0, device=device)
    attention = tq_hb.flash_attn_vec_tq_hb(q, codes, norms, codes, norms, p, precision="strict", device=device)

    np.testing.assert_allclose(attention, standalone, rtol=2 * tolerance.DECODE_RTOL)


def test_the_two_blocks_of_512_have_their_own_norms(device):
    rng = np.random.default_rng(3)
    rotated = rng.standard_normal((8, 512))
    rotated[:, 256:] *= 1e-3
    x = reference.unrotate(rotated).astype(np.float32)

    codes, norms = tq_hb.quantize(x, 8, device=device)
    back = tq_hb.dequantize(codes, norms, 8, head_dim=512, rotated=True)

    want = reference.rotate(x)
    np.testing.assert_allclose(norms[:, 0] / norms[:, 1], 1000.0, rtol=0.2)
    limit = 1.2 * tolerance.FORMAT_ERROR["lloyd_max", 8]
    assert tolerance.nmse(back[:, :256], want[:, :256]) <= limit
    assert tolerance.nmse(back[:, 256:], want[:, 256:]) <= limit


@pytest.mark.parametrize("block", [0, 1])
def test_an_empty_block_of_512_leaves_the_other_norm_alone(device, block):
    """Each norm sums over its own block's lanes only."""
    rotated = np.zeros(512)
    rotated[256 * block :][:256] = np.where(np.arange(256) % 3, 1.0, -1.0)
    x = reference.unrotate(rotated).astype(np.float32)

    codes, norms = tq_hb.quantize(x, 8, device=device)

    assert norms[block] == pytest.approx(1.0, rel=1e-6)
    assert norms[1 - block] < 1e-6  # what the rounding of x to float32 leaves there
    filled = slice(256 * block, 256 * block + 256)
    assert np.array_equal(codes[filled] > 127, rotated[filled] > 0)


@pytest.mark.parametrize("cbits", WIDTHS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_structured_vectors_survive(device, head_dim, cbits):
    """Without the sign flips a constant rotates onto one coordinate and saturates."""
    i = np.arange(head_dim)
    hadamard_rows = [(-1.0) ** np.array([bin(j & r).count("1") for j in i]) for r in (0, 1, 3, head_dim - 1)]
    x = np.stack([*np.eye(head_dim)[:4], *hadamard_rows, np.ones(head_dim), i - head_dim / 2]).astype(np.float32)

    codes, norms = tq_hb.quantize(x, cbits, device=device)
    back = tq_hb.dequantize(codes, norms, cbits, head_dim=head_dim)

    for row, want in zip(back, x, strict=True):
        assert tolerance.nmse(row, want) <= 5 * tolerance.FORMAT_ERROR["lloyd_max", cbits]


def test_a_zero_vector_takes_the_code_below_the_middle_and_decodes_to_zero(device):
    for head_dim in HEAD_DIMS:
        for cbits in WIDTHS:
            codes, norms = tq_hb.quantize(np.zeros((2, head_dim), np.float32), cbits, device=device)
            back = tq_hb.dequantize(codes, norms, cbits, head_dim=head_dim)

            assert (codes == 2 ** (cbits - 1) - 1).all()
            assert not norms.any()
            assert not back.any()


def test_a_value_on_a_boundary_takes_the_lower_code(device):
    """Exact ties: the rotation of e0 has one magnitude everywhere, so it hits 0 only when cancelled by e1."""
    for head_dim in HEAD_DIMS:
        x = np.zeros(head_dim, np.float32)
        x[:2] = 1.0

        codes, _ = tq_hb.quantize(x, 8, device=device)

        rotated = reference.rotate(x)
        assert (rotated == 0.0).sum() == head_dim // 2
        assert (codes[rotated == 0.0] == 127).all()


def test_values_beyond_the_table_take_the_outermost_codes(device):
    rotated = np.zeros((2, 256))
    rotated[0, 5], rotated[1, 5] = 1.0, -1.0
    x = reference.unrotate(rotated).astype(np.float32)

    codes, _ = tq_hb.quantize(x, 8, device=device)

    assert codes[0, 5] == 255
    assert codes[1, 5] == 0


def test_every_backend_writes_the_bytes_of_the_reference(device):
    x = np.random.default_rng(4).standard_normal((5, 256)).astype(np.float32)

    codes, norms = tq_hb.quantize(x, 8, device=device)

    want_codes, want_norms = reference.encode_float32(x, 8)
    assert codes.tobytes() == want_codes.tobytes()
    assert norms.tobytes() == want_norms.tobytes()


def test_the_quantised_path_is_the_one_that_ran(device):
    rng = np.random.default_rng(5)
    k, v = rng.standard_normal((2, 50, 2, 256)).astype(np.float32)
    q = rng.standard_normal((4, 256)).astype(np.float32)
    cache = tq_hb.KVCache(2, 256, k_bits=5, v_bits=5, precision="strict", device=device)
    assert cache.last_plan is None
    cache.append(k, v)

    got = cache.attend(q)

    plan = cache.last_plan
    assert plan.backend == device.backend
    assert any(name.startswith("flash_attn_vec_tq_hb_dk256") for name in plan.kernels)
    assert plan.nsg in (1, 2, 4)
    assert 1 <= plan.nwg <= 32
    # Attention that silently ran on unquantised vectors would be far closer than 5 bits allow.
    dense = reference.attend(q, k.swapaxes(0, 1), v.swapaxes(0, 1), scale=1 / 16)
    assert 1e-4 < tolerance.nmse(got, dense) < 0.1


def test_softcap_is_applied(device):
    plain, capped = Case(), Case(softcap=2.0)
    problem = make_problem(capped)

    got = tq_hb.flash_attn_vec_tq_hb(*problem.buffers(), capped.params(), precision="strict", device=device)

    assert tolerance.nmse(got, expected(capped, problem, unrotated=False)) <= tolerance.ATTEND_NMSE
    assert tolerance.nmse(got, expected(plain, problem, unrotated=False)) > 1e-3


def test_a_query_beyond_float16_is_not_rounded(device):
    case = Case(kv_seq_len=40)
    problem = make_problem(case)
    params = case.params()
    params.scale = case.scale * 1e-5

    got = tq_hb.flash_attn_vec_tq_hb(
        problem.q * np.float32(1e5), *problem.buffers()[1:], params, precision="strict", device=device
    )

    assert tolerance.nmse(got, expected(case, problem, unrotated=False)) <= tolerance.ATTEND_NMSE
