"""Attention against the float64 reference on the same codes, on every backend and in every form."""

from __future__ import annotations

import numpy as np
import pytest

import reference
import tolerance
import tq_hb
from cases import Case, attend_cases, expected, make_problem

CASES = attend_cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_array_form_matches_reference(device, case):
    problem = make_problem(case)

    got = tq_hb.flash_attn_vec_tq_hb(*problem.buffers(), case.params(), **case.keywords(), device=device)

    assert got.dtype == np.float32
    assert tolerance.nmse(got, expected(case, problem, unrotated=False)) <= tolerance.ATTEND_NMSE


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_undo_matches_reference(device, case):
    problem = make_problem(case)

    got = tq_hb.flash_attn_vec_tq_hb_with_fused_undo(
        *problem.buffers(), case.params(), **case.keywords(), device=device
    )

    assert tolerance.nmse(got, expected(case, problem, unrotated=True)) <= tolerance.ATTEND_NMSE


@pytest.mark.parametrize("own_tmp", [True, False], ids=["own-tmp", "encoder-tmp"])
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_recorded_chain_matches_reference(device, case, own_tmp):
    problem = make_problem(case)
    q, *cache = (device.array(a) for a in problem.buffers())
    output = device.empty(q.shape, np.float32)
    tmp = None
    if own_tmp:
        tmp = device.empty((tq_hb.tmp_buffer_bytes(case.num_heads, case.head_dim) // 4,), np.float32)

    enc = device.encoder()
    enc.flash_attn_vec_tq_hb(q, *cache, output, tmp, case.params(), **case.keywords())
    enc.memory_barrier()
    enc.fwht_sign_undo_f32(output)
    enc.commit_and_wait()

    assert tolerance.nmse(output.numpy(), expected(case, problem, unrotated=True)) <= tolerance.ATTEND_NMSE


@pytest.mark.parametrize("case", CASES[1::6], ids=str)
def test_recorded_fused_undo_matches_reference(device, case):
    problem = make_problem(case)
    q, *cache = (device.array(a) for a in problem.buffers())
    output = device.empty(q.shape, np.float32)

    enc = device.encoder()
    enc.flash_attn_vec_tq_hb_with_fused_undo(q, *cache, output, None, case.params(), **case.keywords())
    enc.commit_and_wait()

    assert tolerance.nmse(output.numpy(), expected(case, problem, unrotated=True)) <= tolerance.ATTEND_NMSE


@pytest.mark.parametrize("head_dim", [256, 512])
def test_recorded_premult_equals_fuse_fwht_pre(device, head_dim):
    fused = Case(head_dim=head_dim, fuse_fwht_pre=1, kv_seq_len=70, nwg=7, nsg=2)
    apart = Case(head_dim=head_dim, fuse_fwht_pre=0, kv_seq_len=70, nwg=7, nsg=2)
    problem = make_problem(fused)
    q, *cache = (device.array(a) for a in problem.buffers())
    together = tq_hb.flash_attn_vec_tq_hb(*problem.buffers(), fused.params(), **fused.keywords(), device=device)
    output = device.empty(q.shape, np.float32)

    enc = device.encoder()
    enc.fwht_sign_premult_f32(q)
    enc.memory_barrier()
    enc.flash_attn_vec_tq_hb(q, *cache, output, None, apart.params(), **apart.keywords())
    enc.commit_and_wait()

    assert np.array_equal(output.numpy(), together)


@pytest.mark.parametrize("scale", [0.0, -0.25, 1.0, 40.0])
def test_any_finite_scale(device, scale):
    case = Case(kv_seq_len=65)
    problem = make_problem(case)
    params = case.params()
    params.scale = scale
    k, v = (
        reference.decode(packed[:, : case.kv_seq_len], norms[:, : case.kv_seq_len], 8)
        for packed, norms in ((problem.k_packed, problem.k_norms), (problem.v_packed, problem.v_norms))
    )

    got = tq_hb.flash_attn_vec_tq_hb(*problem.buffers(), params, **case.keywords(), device=device)

    # The scale multiplies the rounding of the scores too, and exp turns it into relative error.
    limit = tolerance.ATTEND_NMSE * max(1.0, (scale / case.scale) ** 2)
    assert tolerance.nmse(got, reference.attend(problem.q, k, v, scale=scale)) <= limit


@pytest.mark.parametrize("mask_type", [0, 1])
def test_mask_types_0_and_1_ignore_the_window(device, mask_type):
    case = Case(kv_seq_len=70)
    problem = make_problem(case)
    params = case.params()
    params.mask_type, params.sliding_window = mask_type, 3

    got = tq_hb.flash_attn_vec_tq_hb(*problem.buffers(), params, **case.keywords(), device=device)

    assert tolerance.nmse(got, expected(case, problem, unrotated=False)) <= tolerance.ATTEND_NMSE


def test_a_key_outside_the_window_has_weight_zero_however_large_its_score(device):
    case = Case(kv_seq_len=64, kv_capacity=64, window=10)
    problem = make_problem(case)
    k_norms, v_norms = problem.k_norms.copy(), problem.v_norms.copy()
    # Finite this time, but far beyond any additive mask a float16 kernel would use.
    k_norms[:, :54] = 1e9
    v_norms[:, :54] = 1e9

    got = tq_hb.flash_attn_vec_tq_hb(
        problem.q, problem.k_packed, k_norms, problem.v_packed, v_norms, case.params(), nwg=1, device=device
    )

    assert tolerance.nmse(got, expected(case, problem, unrotated=False)) <= tolerance.ATTEND_NMSE


def test_scores_that_overflow_exp_are_handled_by_the_running_maximum(device):
    case = Case(kv_seq_len=64, kv_capacity=64, nwg=16)
    problem = make_problem(case)
    params = case.params()
    # Scores in the thousands: the softmax becomes the row of the best key.
    params.scale = 1000.0
    k, v = (
        reference.decode(packed, norms, 8)
        for packed, norms in ((problem.k_packed, problem.k_norms), (problem.v_packed, problem.v_norms))
    )

    got = tq_hb.flash_attn_vec_tq_hb(*problem.buffers(), params, **case.keywords(), device=device)

    assert tolerance.nmse(got, reference.attend(problem.q, k, v, scale=1000.0)) <= tolerance.ATTEND_NMSE


@pytest.mark.parametrize("cbits", [5, 6])
def test_bits_above_the_width_of_a_code_are_ignored(device, cbits):
    case = Case(k_bits=cbits, v_bits=cbits)
    problem = make_problem(case)
    high = np.random.default_rng(1).integers(0, 2 ** (8 - cbits), problem.k_packed.shape).astype(np.uint8) << cbits

    got = tq_hb.flash_attn_vec_tq_hb(
        problem.q,
        problem.k_packed | high,
        problem.k_norms,
        problem.v_packed | high[::-1],
        problem.v_norms,
        case.params(),
        **case.keywords(),
        device=device,
    )

    assert tolerance.nmse(got, expected(case, problem, unrotated=False)) <= tolerance.ATTEND_NMSE


def test_every_split_gives_the_same_result_to_rounding(device):
    case = Case(kv_seq_len=1025, kv_capacity=1025, ring_start=17, num_heads=3, num_kv_heads=1)
    problem = make_problem(case)
    want = expected(case, problem, unrotated=False)
    for nsg in (1, 2, 4):
        for nwg in (*range(1, 9), 15, 16, 24, 31, 32):
            params = case.params()
            params.nsg = nsg
            got = tq_hb.flash_attn_vec_tq_hb(*problem.buffers(), params, nwg=nwg, device=device)
            assert tolerance.nmse(got, want) <= tolerance.ATTEND_NMSE, f"nsg={nsg} nwg={nwg}"


def test_out_receives_the_result_and_is_returned(device):
    case = Case()
    problem = make_problem(case)
    out = np.full_like(problem.q, np.nan)

    got = tq_hb.flash_attn_vec_tq_hb(*problem.buffers(), case.params(), **case.keywords(), out=out, device=device)

    assert got is out
    assert tolerance.nmse(out, expected(case, problem, unrotated=False)) <= tolerance.ATTEND_NMSE


def test_a_leading_query_axis_of_one_is_kept(device):
    case = Case()
    problem = make_problem(case)
    q, *cache = problem.buffers()

    got = tq_hb.flash_attn_vec_tq_hb(q[None], *cache, case.params(), **case.keywords(), device=device)

    assert got.shape == (1, *q.shape)
    assert tolerance.nmse(got[0], expected(case, problem, unrotated=False)) <= tolerance.ATTEND_NMSE


def test_codes_from_the_op_itself_attend_like_unquantised_vectors(device):
    """The whole chain on real vectors: what comes out is attention, up to the format's own error."""
    rng = np.random.default_rng(3)
    k, v = rng.standard_normal((2, 200, 2, 256)).astype(np.float32)
    q = rng.standard_normal((4, 256)).astype(np.float32)
    cache = tq_hb.KVCache(2, 256, device=device)
    cache.append(k, v)

    got = cache.attend(q)

    want = reference.attend(q, k.transpose(1, 0, 2), v.transpose(1, 0, 2), scale=1 / 16)
    # Scores err by about sqrt(2) times the relative error of K, values by that of V.
    assert tolerance.nmse(got, want) <= 10 * tolerance.FORMAT_ERROR["lloyd_max", 8]
