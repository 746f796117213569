"""The package against the reference on whatever hypothesis comes up with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import reference
import tolerance
import tq_hb
from cases import SINKS, Case, expected_with_lse, make_problem

WIDTHS = st.sampled_from([5, 6, 8])


@st.composite
def attend_cases(draw: st.DrawFn) -> Case:
    """Any valid call of the attention op on a small cache."""
    kv_seq_len = draw(st.integers(1, 200) | st.integers(201, 400))
    num_queries = draw(st.none() | st.integers(1, min(kv_seq_len, 11)))
    num_kv_heads = draw(st.integers(1, 4))
    is_full = draw(st.booleans())
    return Case(
        head_dim=draw(st.sampled_from(tq_hb.supported_head_dims())),
        num_heads=num_kv_heads * draw(st.integers(1, 6)),
        num_kv_heads=num_kv_heads,
        kv_seq_len=kv_seq_len,
        kv_capacity=kv_seq_len + (0 if is_full else draw(st.integers(1, 40))),
        ring_start=draw(st.integers(0, kv_seq_len - 1)) if is_full else 0,
        window=draw(st.integers(0, 420)),
        softcap=draw(st.sampled_from([0.0, 0.5, 50.0])),
        k_bits=draw(WIDTHS),
        v_bits=draw(WIDTHS),
        codebook=draw(st.sampled_from(["lloyd_max", "mlx_native"])),
        packing=draw(st.sampled_from(["byte", "plane"])),
        num_queries=num_queries,
        sinks=draw(st.sampled_from(["none", *SINKS])),
        return_lse=draw(st.booleans()),
        scale_factor_d512=draw(st.sampled_from([1.0, 0.7, 16.0])),
        fuse_fwht_pre=draw(st.integers(0, 1)),
        nsg=draw(st.sampled_from([1, 2, 4])),
        nwg=draw(st.integers(1, 32)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def attend(device, case, fused_undo, **changed):
    op = tq_hb.flash_attn_vec_tq_hb_with_fused_undo if fused_undo else tq_hb.flash_attn_vec_tq_hb
    problem = make_problem(case)
    keywords = {**case.keywords(), "sinks": problem.sinks, **changed}
    return problem, op(*problem.buffers(), case.params(), device=device, **keywords)


def assert_matches(case, problem, got, *, unrotated):
    out, lse = got if case.return_lse else (got, None)
    want, want_lse = expected_with_lse(case, problem, unrotated=unrotated)
    assert tolerance.nmse(out, want) <= tolerance.ATTEND_NMSE
    assert lse is None or tolerance.lse_error(lse, want_lse) <= tolerance.LSE_ERROR


@settings(max_examples=60, deadline=None)
@given(case=attend_cases(), fused_undo=st.booleans())
def test_attention_on_any_valid_call(device, case, fused_undo):
    problem, got = attend(device, case, fused_undo)

    assert_matches(case, problem, got, unrotated=fused_undo)


@pytest.fixture(scope="module")
def _groups_always():
    """Lets the kernel that serves a group of query heads take every call that it can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQ_HB_GQA", "on")
        tq_hb.policy.reload()
        yield
    tq_hb.policy.reload()


@pytest.mark.usefixtures("_groups_always")
@settings(max_examples=60, deadline=None)
@given(case=attend_cases(), fused_undo=st.booleans())
def test_attention_of_groups_on_any_valid_call(device, case, fused_undo):
    problem, got = attend(device, case, fused_undo, nwg=None)

    assert_matches(case, problem, got, unrotated=fused_undo)


@settings(max_examples=30, deadline=None)
@given(case=attend_cases(), nwg_is_given=st.booleans())
def test_slots_that_a_query_does_not_see_never_matter(device, case, nwg_is_given):
    problem = make_problem(case)
    unseen = np.ones(case.kv_capacity, bool)
    unseen[case.visible.slots()] = False
    other = dict(zip(("q", "k_packed", "k_norms", "v_packed", "v_norms"), map(np.copy, problem.buffers()), strict=True))
    for name in ("k_packed", "v_packed"):
        other[name][:, unseen] ^= 0x55
    for name in ("k_norms", "v_norms"):
        other[name][:, unseen] = np.inf

    keywords = {**case.keywords(), "sinks": problem.sinks, "return_lse": False}
    if not nwg_is_given:
        keywords["nwg"] = None
    got, again = (
        tq_hb.flash_attn_vec_tq_hb(*buffers, case.params(), device=device, **keywords)
        for buffers in (problem.buffers(), other.values())
    )

    assert got.tobytes() == again.tobytes()


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = st.one_of(
    *(arrays.arrays(np.float32, (2, d), elements=FLOATS, fill=FLOATS) for d in tq_hb.supported_head_dims())
)


@settings(max_examples=150, deadline=None)
@given(x=ROWS, cbits=WIDTHS, codebook=st.sampled_from(["lloyd_max", "mlx_native"]))
def test_encoding_of_any_finite_rows(device, x, cbits, codebook):
    with np.errstate(all="ignore"):
        want_codes, want_norms = reference.encode_float32(x, cbits, codebook)
    if not np.isfinite(want_norms).all():
        with pytest.raises(tq_hb.InvalidArgument, match="quantize: x"):
            tq_hb.quantize(x, cbits, codebook=codebook, device=device)
        return

    codes, norms = tq_hb.quantize(x, cbits, codebook=codebook, device=device)

    assert norms.tobytes() == want_norms.tobytes()
    assert codes.tobytes() == want_codes.tobytes()
