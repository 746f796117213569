"""A cache so long that the cpu cuts it into longer ranges rather than more of them."""

from __future__ import annotations

import numpy as np

import tq_hb

HEAD_DIM = 64


def test_a_million_keys():
    num_keys, scale = 2**20 + 1, 0.125
    rng = np.random.default_rng(0)
    k_codes, v_codes = rng.integers(0, 256, (2, 1, num_keys, HEAD_DIM), np.uint8)
    k_norms, v_norms = rng.uniform(4, 12, (2, 1, num_keys)).astype(np.float32)
    q = rng.standard_normal((2, HEAD_DIM), np.float32)
    p = tq_hb.FlashAttnVecTqHbParams(
        num_heads=2, num_kv_heads=1, head_dim=HEAD_DIM, kv_seq_len=num_keys, kv_capacity=num_keys, scale=scale
    )
    got, lse = tq_hb.flash_attn_vec_tq_hb(
        q, k_codes, k_norms, v_codes, v_norms, p, precision="strict", return_lse=True, device="cpu"
    )

    # A row is levels * norm / sqrt(head_dim). Block by block: all rows in float64 are a gigabyte.
    levels = tq_hb.codebook(8).astype(np.float64) / HEAD_DIM**0.5
    blocks = [slice(first, first + 4096) for first in range(0, num_keys, 4096)]
    dots = np.concatenate([levels[k_codes[0, block]] @ q.T.astype(np.float64) for block in blocks])
    scores = scale * k_norms[0, :, None] * dots
    weights = np.exp(scores - scores.max(axis=0))
    shares = weights / weights.sum(axis=0) * v_norms[0, :, None]
    want = sum(shares[block].T @ levels[v_codes[0, block]] for block in blocks)
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
    assert np.allclose(lse, scores.max(axis=0) + np.log(weights.sum(axis=0)), rtol=1e-5)
