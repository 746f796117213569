"""The kernel that decodes a row once for a tile of query heads: right for any group, and chosen by the policy."""

from __future__ import annotations

import numpy as np
import pytest

import tolerance
import tq_hb
from cases import Case, expected, make_problem
from simulator import needs_metal

pytestmark = needs_metal

GROUPS = [
    Case(num_heads=kv_heads * group, num_kv_heads=kv_heads, head_dim=head_dim, kv_seq_len=130, kv_capacity=130,
         ring_start=77, window=101, k_bits=k_bits, v_bits=v_bits, fuse_fwht_pre=1, nwg=None, seed=group, **more)
    for group in (2, 3, 4, 5, 7, 8, 9, 12, 16, 17)
    for kv_heads, head_dim, k_bits, v_bits, more in (
        (1, 256, 8, 6, {}),
        (3, 512, 5, 8, {}),
        (2, 64, 6, 5, {"packing": "plane", "num_queries": 2}),
    )
]  # fmt: skip


@pytest.mark.parametrize("unrotated", [False, True], ids=["rotated", "unrotated"])
@pytest.mark.parametrize("case", GROUPS, ids=str)
def test_matches_reference(environment, case, unrotated):
    environment(TQ_HB_GQA="on")
    dev = tq_hb.Device("metal")
    problem = make_problem(case)
    output, enc = dev.empty(problem.q.shape), dev.encoder()
    record = enc.flash_attn_vec_tq_hb_with_fused_undo if unrotated else enc.flash_attn_vec_tq_hb

    record(*problem.buffers(), output, None, case.params(), **case.keywords())
    enc.commit_and_wait()

    rows = case.num_heads // case.num_kv_heads * (case.num_queries or 1)
    tile = next((t for t in (2, 4, 8) if t >= rows), 8)
    assert enc.kernels[0] == f"flash_attn_vec_tq_hb_gqa{tile}_dk{case.head_dim}"
    assert tolerance.nmse(output.numpy(), expected(case, problem, unrotated=unrotated)) <= tolerance.ATTEND_NMSE


def test_serves_long_caches_with_shared_heads_and_says_so():
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 700, 2, 256)).astype(np.float32)
    cache = tq_hb.KVCache(2, 256, device="metal")
    cache.append(k, v)

    cache.attend(rng.standard_normal((8, 256)).astype(np.float32))

    plan = cache.last_plan
    assert plan.kernels == ("flash_attn_vec_tq_hb_gqa4_dk256", "flash_attn_vec_merge_tq_hb_undo_dk256")
    assert plan.nwg > 1
    assert 0 < plan.threadgroup_bytes <= 32768


def test_short_caches_and_single_heads_keep_the_kernel_for_one_head():
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 700, 2, 256)).astype(np.float32)
    for length, heads in ((100, 8), (700, 2)):
        cache = tq_hb.KVCache(2, 256, device="metal")
        cache.append(k[:length], v[:length])

        cache.attend(rng.standard_normal((heads, 256)).astype(np.float32))

        assert cache.last_plan.kernels[0] == "flash_attn_vec_tq_hb_dk256"


def test_splits_beyond_the_reference_systems_limit_agree(environment):
    """One KV head and a long cache: more splits than one simdgroup has lanes."""
    environment(TQ_HB_GQA="on")
    case = Case(num_heads=8, num_kv_heads=1, kv_seq_len=4100, kv_capacity=4100, ring_start=4001, fuse_fwht_pre=1)
    problem = make_problem(case)
    dev = tq_hb.Device("metal")
    output, enc = dev.empty(problem.q.shape), dev.encoder()

    enc.flash_attn_vec_tq_hb_with_fused_undo(*problem.buffers(), output, None, case.params())
    enc.commit_and_wait()

    assert enc.nodes[0].threadgroups[2] > 32
    assert tolerance.nmse(output.numpy(), expected(case, problem, unrotated=True)) <= tolerance.ATTEND_NMSE


def test_a_bad_query_is_named_and_leaves_its_row(environment):
    environment(TQ_HB_GQA="on")
    case = Case(num_heads=8, num_kv_heads=2, kv_seq_len=65, kv_capacity=65, fuse_fwht_pre=1)
    problem = make_problem(case)
    q = problem.q.copy()
    q[5, 17] = np.inf
    q[6, 0] = np.nan
    dev = tq_hb.Device("metal")
    output, enc = dev.array(np.full_like(q, 42.0)), dev.encoder()
    enc.flash_attn_vec_tq_hb_with_fused_undo(dev.array(q), *problem.buffers()[1:], output, None, case.params())

    with pytest.raises(tq_hb.InvalidArgument, match="q .* token 0, head 5"):
        enc.commit_and_wait()

    got = output.numpy()
    assert (got[5:7] == 42.0).all()
    good = [h for h in range(8) if h not in (5, 6)]
    assert tolerance.nmse(got[good], expected(case, problem, unrotated=True)[good]) <= tolerance.ATTEND_NMSE
