"""Attention against the float64 reference on the same codes, on every backend and in every form."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import reference
import tolerance
import tq_hb
from cases import SINKS, Case, Problem, attend_cases, expected, expected_with_lse, make_problem
from tq_hb import _core
from tq_hb.policy import AttendKernel

CASES = attend_cases()
# What the group kernel shares a decode between: the heads of a KV head, of every query.
SHARED = [
    dataclasses.replace(case, nsg=1, nwg=None)
    for case in CASES
    if case.num_heads * (case.num_queries or 1) > case.num_kv_heads
]


def run(case: Case, problem: Problem, device: tq_hb.Device, *, unrotated: bool = False, **keywords):
    """The array form of the op: the output, or the output and the lse."""
    op = tq_hb.flash_attn_vec_tq_hb_with_fused_undo if unrotated else tq_hb.flash_attn_vec_tq_hb
    options = {**case.keywords(), "sinks": problem.sinks, **keywords}
    return op(*problem.buffers(), case.params(), **options, device=device)


def record(case: Case, problem: Problem, enc: tq_hb.CommandEncoder, device: tq_hb.Device, tmp=None, *, unrotated: bool):
    """The recorded form on buffers; returns those that it will write, in the form of :func:`run`."""
    op = enc.flash_attn_vec_tq_hb_with_fused_undo if unrotated else enc.flash_attn_vec_tq_hb
    q, *cache = (device.array(a) for a in problem.buffers())
    output, lse = device.empty(q.shape, np.float32), device.empty(q.shape[:-1], np.float32)
    written = {"lse": lse} if case.return_lse else {}
    sinks = None if problem.sinks is None else device.array(problem.sinks)
    op(q, *cache, output, tmp, case.params(), **case.keywords(), sinks=sinks, **written)
    return (output, lse) if case.return_lse else output


def assert_matches(case: Case, problem: Problem, got, *, unrotated: bool):
    """What the op returned against the reference."""
    out, lse = got if case.return_lse else (got, None)
    want, want_lse = expected_with_lse(case, problem, unrotated=unrotated)
    assert out.dtype == np.float32
    assert tolerance.nmse(out, want) <= tolerance.ATTEND_NMSE
    if lse is not None:
        assert lse.dtype == np.float32
        assert tolerance.lse_error(lse, want_lse) <= tolerance.LSE_ERROR


@pytest.mark.parametrize("case", CASES, ids=str)
def test_array_form_matches_reference(device, case):
    problem = make_problem(case)
    assert_matches(case, problem, run(case, problem, device), unrotated=False)


@pytest.mark.parametrize("isa", _core.cpu_isas())
@pytest.mark.parametrize("precision", ["default", "strict"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set_keeps_its_promise(forced_isa, case, precision, isa):
    forced_isa(isa)
    case = dataclasses.replace(case, precision=precision, return_lse=True)
    problem = make_problem(case)

    out, lse = run(case, problem, tq_hb.Device("cpu"), unrotated=True)

    want, want_lse = expected_with_lse(case, problem, unrotated=True)
    assert tolerance.nmse(out, want) ** 0.5 <= tolerance.PRECISION_L2[precision]
    assert tolerance.lse_error(lse, want_lse) <= tolerance.PRECISION_LSE[precision]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_undo_matches_reference(device, case):
    problem = make_problem(case)
    assert_matches(case, problem, run(case, problem, device, unrotated=True), unrotated=True)


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_group_kernel_matches_reference(environment, device, case):
    if not device._core.offers(AttendKernel.GROUP, case.head_dim, case.packing, case.k_bits, case.v_bits):
        pytest.skip(f"backend {device.backend!r} has no group kernel for this head size and packing")
    environment(TQ_HB_GQA="on")
    problem = make_problem(case)
    enc = device.encoder()
    written = record(case, problem, enc, device, unrotated=True)
    enc.commit_and_wait()

    assert "gqa" in enc.kernels[0]
    got = tuple(b.numpy() for b in written) if case.return_lse else written.numpy()
    assert_matches(case, problem, got, unrotated=True)


@pytest.mark.parametrize("own_tmp", [True, False], ids=["own-tmp", "encoder-tmp"])
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_recorded_chain_matches_reference(device, case, own_tmp):
    problem = make_problem(case)
    tmp = None
    if own_tmp:
        size = tq_hb.tmp_buffer_bytes(case.num_heads, case.head_dim, num_queries=case.num_queries or 1)
        tmp = device.empty((size // 4,), np.float32)

    enc = device.encoder()
    written = record(case, problem, enc, device, tmp, unrotated=False)
    enc.memory_barrier()
    enc.fwht_sign_undo_f32(written[0] if case.return_lse else written)
    enc.commit_and_wait()

    got = tuple(b.numpy() for b in written) if case.return_lse else written.numpy()
    assert_matches(case, problem, got, unrotated=True)


@pytest.mark.parametrize("case", CASES[1::6], ids=str)
def test_recorded_fused_undo_matches_reference(device, case):
    problem = make_problem(case)

    enc = device.encoder()
    written = record(case, problem, enc, device, unrotated=True)
    enc.commit_and_wait()

    got = tuple(b.numpy() for b in written) if case.return_lse else written.numpy()
    assert_matches(case, problem, got, unrotated=True)


@pytest.mark.parametrize("case", [case for case in CASES if case.packing == "plane"], ids=str)
def test_planes_give_the_bits_of_bytes(device, case):
    problem = make_problem(case)
    in_bytes = dataclasses.replace(case, packing="byte")

    planes, codes = run(case, problem, device), run(in_bytes, make_problem(in_bytes), device)

    for a, b in zip(*((x if case.return_lse else (x,)) for x in (planes, codes)), strict=True):
        assert np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("case", [case for case in CASES if case.num_queries and case.ring_start == 0][::2], ids=str)
def test_several_queries_equal_one_after_the_other(device, case):
    """Query i of N is the newest token of a cache that ends there."""
    problem = make_problem(case)
    together, together_lse = run(case, problem, device, return_lse=True)

    for i, (_, end) in enumerate(case.visible.ages()):
        alone = dataclasses.replace(case, num_queries=None, kv_seq_len=end)
        one = dataclasses.replace(problem, q=problem.q[i])
        out, lse = run(alone, one, device, return_lse=True)
        assert tolerance.nmse(together[i], out) <= tolerance.SPLIT_NMSE
        assert tolerance.lse_error(together_lse[i], lse) <= tolerance.LSE_ERROR


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("kv_seq_len", [64, 65, 96], ids=lambda n: f"len{n}")
def test_a_key_reaches_only_the_queries_that_see_it(environment, device, kv_seq_len, window, which, mode):
    """The norms of one key are NaN: the newest, or the oldest that the first query sees."""
    environment(TQ_HB_GQA=mode)
    case = Case(num_queries=3, kv_seq_len=kv_seq_len, kv_capacity=kv_seq_len, ring_start=37, window=window, nwg=None)
    clean = make_problem(case)
    want = expected(case, clean, unrotated=False)
    places = {"newest": (kv_seq_len - 1, [2])}
    if window:
        places["oldest"] = (kv_seq_len - 2 - window, [0])
    for age, touched in places.values():
        norms = {"k": clean.k_norms.copy(), "v": clean.v_norms.copy()}
        norms[which][:, (case.ring_start + age) % case.kv_capacity] = np.nan
        problem = dataclasses.replace(clean, k_norms=norms["k"], v_norms=norms["v"])

        got = run(case, problem, device)

        for query in range(3):
            if query in touched:
                assert np.isnan(got[query]).all()
            else:
                assert tolerance.nmse(got[query], want[query]) <= tolerance.ATTEND_NMSE


@pytest.mark.parametrize("num_queries", [16, 33, 70])
def test_any_number_of_queries(device, num_queries):
    """A query for every token of a whole prompt, the first of which sees itself alone."""
    case = Case(num_queries=num_queries, kv_seq_len=70, kv_capacity=71, window=50, nwg=None, return_lse=True)
    problem = make_problem(case)
    assert_matches(case, problem, run(case, problem, device), unrotated=False)


@pytest.mark.parametrize("num_queries", [None, 9])
def test_the_number_of_threads_changes_no_bit(device, num_queries):
    case = Case(num_queries=num_queries, num_heads=6, kv_seq_len=513, kv_capacity=513, sinks="some", nwg=None)
    problem = make_problem(case)
    before, results = tq_hb.num_threads(), []
    try:
        for threads in (1, 2, 3):
            tq_hb.set_num_threads(threads)
            results.append(run(case, problem, device, return_lse=True))
    finally:
        tq_hb.set_num_threads(before)
    assert all(np.array_equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_sinks_of_minus_infinity_are_no_sinks(device):
    plain, off = Case(return_lse=True), Case(return_lse=True, sinks="off")
    problem = make_problem(off)

    got = run(off, problem, device)

    want = run(plain, dataclasses.replace(problem, sinks=None), device)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("nwg", [1, 7, None])
def test_a_sink_is_one_more_logit_that_is_neither_scaled_nor_capped(device, nwg):
    """lse with a sink s is log(exp(lse) + exp(s)), and the output shrinks by exp(lse without - lse with)."""
    case = Case(return_lse=True, sinks="finite", softcap=1.5, nwg=nwg)
    problem = make_problem(case)
    out, lse = run(case, problem, device)
    plain, plain_lse = run(case, dataclasses.replace(problem, sinks=None), device)

    want_lse = np.logaddexp(plain_lse.astype(np.float64), problem.sinks)
    assert tolerance.lse_error(lse, want_lse) <= tolerance.LSE_ERROR
    assert tolerance.nmse(out, plain * np.exp(plain_lse - want_lse)[:, None]) <= tolerance.ATTEND_NMSE


@pytest.mark.parametrize("sinks", ["none", *SINKS])
def test_lse_alone_changes_no_bit_of_the_output(device, sinks):
    case = Case(sinks=sinks, num_queries=3, kv_seq_len=65, nwg=7)
    problem = make_problem(case)
    assert np.array_equal(run(case, problem, device, return_lse=True)[0], run(case, problem, device))


@pytest.mark.parametrize("precision", ["default", "strict"])
def test_both_classes_of_precision_keep_their_promise(device, precision):
    case = Case(kv_seq_len=513, kv_capacity=513, num_queries=2, return_lse=True, nwg=None)
    problem = make_problem(case)

    out, lse = run(case, problem, device, precision=precision)

    want, want_lse = expected_with_lse(case, problem, unrotated=False)
    assert tolerance.nmse(out, want) ** 0.5 <= tolerance.PRECISION_L2[precision]
    assert tolerance.lse_error(lse, want_lse) <= tolerance.PRECISION_LSE[precision]


@pytest.mark.parametrize("head_dim", tq_hb.supported_head_dims())
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
        problem.q,
        problem.k_packed,
        k_norms,
        problem.v_packed,
        v_norms,
        case.params(),
        nwg=1,
        precision="strict",
        device=device,
    )

    assert tolerance.nmse(got, expected(case, problem, unrotated=False)) <= tolerance.ATTEND_NMSE


def test_scores_that_overflow_exp_are_handled_by_the_running_maximum(device):
    case = Case(kv_seq_len=64, kv_capacity=64, nwg=16, return_lse=True)
    problem = make_problem(case)
    params = case.params()
    # Scores in the thousands: the softmax becomes the row of the best key.
    params.scale = 1000.0
    k, v = (
        reference.decode(packed, norms, 8)
        for packed, norms in ((problem.k_packed, problem.k_norms), (problem.v_packed, problem.v_norms))
    )

    out, lse = tq_hb.flash_attn_vec_tq_hb(
        *problem.buffers(), params, **{**case.keywords(), "return_lse": True}, device=device
    )

    want, want_lse = reference.attend(problem.q, k, v, scale=1000.0, return_lse=True)
    assert tolerance.nmse(out, want) <= tolerance.ATTEND_NMSE
    assert tolerance.lse_error(lse, want_lse) <= tolerance.LSE_ERROR


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
            got = tq_hb.flash_attn_vec_tq_hb(*problem.buffers(), params, nwg=nwg, precision="strict", device=device)
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
