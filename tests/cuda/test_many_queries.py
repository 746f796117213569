"""More query tokens in a call than a grid has room for in any direction but one."""

from __future__ import annotations

import numpy as np

import tq_hb


def test_more_than_65535_tiles(cuda):
    num_queries, heads, head_dim = 65_537, 8, 128
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, num_queries, 1, head_dim), np.float32)
    q = rng.standard_normal((num_queries, heads, head_dim), np.float32)
    on_gpu = tq_hb.KVCache(1, head_dim, device=cuda)
    on_cpu = tq_hb.KVCache(1, head_dim, precision="strict", device="cpu")
    for cache in (on_gpu, on_cpu):
        cache.append(k, v)
    out = on_gpu.attend(q)
    assert any("_gqa8_" in kernel for kernel in on_gpu.last_plan.kernels)
    for last in (8, 40_000, num_queries):
        want = on_cpu.attend(q[last - 8 : last], q_offset=last - 1)
        assert np.linalg.norm(out[last - 8 : last] - want) <= 5e-4 * np.linalg.norm(want)
