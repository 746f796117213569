"""Finite scales, queries and norms whose scores or sums of values go beyond float32, where the answer does not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import reference
import tolerance
import tq_hb
from cases import Case, Problem, make_problem

LARGEST = np.float32(3e38)
# The ways a row can take: without a merge, over several splits, and with others that share its keys.
FORMS = {
    "direct": {"nwg": 1},
    "splits": {"nwg": 7, "nsg": 2, "return_lse": True},
    "group": {"nwg": None, "return_lse": True},
}


@pytest.fixture(params=FORMS)
def form(request, environment, device) -> dict:
    if device.backend == "cuda":
        pytest.skip("backend 'cuda' takes scores beyond 1e38 for equal in its group kernel and gives sums no headroom")
    environment(TQ_HB_GQA="on" if request.param == "group" else "off")
    return FORMS[request.param]


def assert_matches(case: Case, problem: Problem, device: tq_hb.Device, scale: float) -> None:
    """The op against the reference with another scale than the case's."""
    params = case.params()
    params.scale = scale
    k, v = (
        reference.decode(packed[:, : case.kv_seq_len], norms[:, : case.kv_seq_len], 8)
        for packed, norms in ((problem.k_packed, problem.k_norms), (problem.v_packed, problem.v_norms))
    )
    with np.errstate(over="ignore"):
        want, want_lse = reference.attend(
            reference.rotate(problem.q) if case.fuse_fwht_pre else problem.q,
            k,
            v,
            scale=params.scale,
            softcap=case.softcap,
            sinks=problem.sinks,
            ranges=case.visible.ranges(),
            return_lse=True,
        )
        want_lse = want_lse.astype(np.float32)  # infinite where float32 ends

    got = tq_hb.flash_attn_vec_tq_hb(*problem.buffers(), params, **case.keywords(), sinks=problem.sinks, device=device)

    out, lse = got if case.return_lse else (got, want_lse)
    assert tolerance.nmse(out, want) <= tolerance.ATTEND_NMSE
    assert tolerance.lse_error(lse, want_lse) <= tolerance.LSE_ERROR


def enlarged(norms: np.ndarray, kv_seq_len: int, largest: float) -> np.ndarray:
    """Norms in the same proportions, of which the largest that counts is this."""
    return (norms / norms[:, :kv_seq_len].max() * np.float32(largest)).astype(np.float32)


@pytest.mark.parametrize("fuse_fwht_pre", [0, 1])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize(("scale", "q", "k"), [(3e38, 1, 20), (-3e38, 1, 20), (1, 1e37, 1e19), (1e30, 2.5e37, 3e38)])
@pytest.mark.parametrize("head_dim", [64, 256, 512])
def test_of_scores_beyond_float32_the_largest_wins(form, device, head_dim, scale, q, k, softcap, fuse_fwht_pre):
    shape = {"head_dim": head_dim, "num_queries": 2, "kv_seq_len": 300, "kv_capacity": 300}
    case = Case(**shape, softcap=softcap, fuse_fwht_pre=fuse_fwht_pre, **form)
    problem = make_problem(case)
    problem = dataclasses.replace(
        problem, q=problem.q * np.float32(q), k_norms=enlarged(problem.k_norms, case.kv_seq_len, k)
    )
    assert_matches(case, problem, device, scale)


@pytest.mark.parametrize("scale", [LARGEST, -LARGEST, 1e30, -1e30])
def test_a_sink_and_scores_beyond_float32(form, device, scale):
    """One key each, whose score is positive for some heads and negative for others."""
    case = Case(num_heads=16, kv_seq_len=1, kv_capacity=1, **form)
    sinks = np.resize(np.float32([LARGEST, -LARGEST, 0, -np.inf]), 16)
    assert_matches(case, dataclasses.replace(make_problem(case), sinks=sinks), device, scale)


@pytest.mark.parametrize("sink", [-LARGEST, 0, LARGEST, None], ids=str)
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_mean_key_that_takes_scores_to_the_end_of_float32(device, sign, sink):
    """The mean key adds 2.6e38 to every score, or takes it away, and the rest of the key 4.1e38 of the other sign."""
    rng = np.random.default_rng(0)
    mean = np.full((1, 256), 10, np.float32)
    k, v = rng.standard_normal((2, 40, 1, 256)).astype(np.float32)
    q = np.full((2, 256), sign, np.float32)
    sinks = None if sink is None else np.full(2, sink, np.float32)
    cache = tq_hb.KVCache(1, 256, k_mean=mean, precision="strict", device=device)
    cache.append(mean - 16 + k, v)
    plain = tq_hb.KVCache(1, 256, device=device)
    plain.append((mean - 16 + k) - mean, v)
    k_hat, v_hat = (x.swapaxes(0, 1).astype(np.float64) for x in plain.dequantize())

    got, lse = cache.attend(q, scale=1e35, sinks=sinks, return_lse=True)

    bias = np.full(2, sign * 2560 * np.float64(np.float32(1e35)))
    want, want_lse = reference.attend(q, k_hat, v_hat, scale=np.float32(1e35), bias=bias, sinks=sinks, return_lse=True)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert tolerance.lse_error(lse, want_lse.astype(np.float32)) <= tolerance.LSE_ERROR


@pytest.mark.parametrize(("head_dim", "largest"), [(64, 3e38), (512, 6e37)])
def test_sums_of_values_beyond_float32(form, device, head_dim, largest):
    case = Case(head_dim=head_dim, kv_seq_len=1025, kv_capacity=1025, **form)
    problem = make_problem(case)
    problem = dataclasses.replace(problem, v_norms=enlarged(problem.v_norms, case.kv_seq_len, largest))
    # The same codes everywhere: no two values cancel.
    problem.v_packed.setflags(write=True)
    problem.v_packed[:] = problem.v_packed[:, :1]
    assert_matches(case, problem, device, 0.0)
