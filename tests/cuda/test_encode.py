"""Encoding on the GPU gives the bytes of the cpu, whatever the values."""

from __future__ import annotations

import numpy as np
import pytest

import tq_hb

# Of every head size and width some, 12 million in all.
VALUES = 1_000_000


def rows_of(head_dim, seed):
    """Ordinary rows, and such with outliers, of all sizes, near the codebook's boundaries, and with zeros."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((VALUES // head_dim, head_dim), np.float32)
    quarter = len(rows) // 4
    rows[:quarter] *= np.exp(rng.standard_normal((quarter, head_dim), np.float32) * 2)
    rows[quarter : 2 * quarter] *= np.float32(2.0) ** rng.integers(-60, 50, (quarter, 1)).astype(np.float32)
    rows[2 * quarter : 3 * quarter] = np.round(rows[2 * quarter : 3 * quarter] * 4) / 4
    rows[:: len(rows) // 50] = 0
    rows[1 :: len(rows) // 50, 1:] = 0
    return rows


@pytest.mark.parametrize("codebook", ["lloyd_max", "mlx_native"])
@pytest.mark.parametrize("bits", tq_hb.supported_bits())
@pytest.mark.parametrize("head_dim", tq_hb.supported_head_dims())
def test_codes_and_norms_are_those_of_the_cpu(cuda, head_dim, bits, codebook):
    rows = rows_of(head_dim, seed=head_dim + bits)
    codes, norms = tq_hb.quantize(rows, bits, codebook=codebook, packing="plane", device=cuda)
    want_codes, want_norms = tq_hb.quantize(rows, bits, codebook=codebook, packing="plane", device="cpu")
    assert np.array_equal(norms.view(np.uint32), want_norms.view(np.uint32))
    assert np.array_equal(codes, want_codes)


@pytest.mark.parametrize("codebook", ["lloyd_max", "mlx_native"])
@pytest.mark.parametrize("bits", tq_hb.supported_bits())
def test_values_beside_every_boundary(cuda, bits, codebook):
    """Rows whose rotation is a boundary of the codebook, or a neighbour of it, in most coordinates."""
    head_dim = 256
    boundaries = tq_hb.boundaries(bits, codebook)
    rng = np.random.default_rng(bits)
    targets = rng.choice(boundaries, (2000, head_dim)) * np.float32(1 + 1e-7) ** rng.integers(-2, 3, (2000, head_dim))
    # A row keeps its norm if one coordinate makes up for the others.
    targets[:, 0] = np.sqrt(np.maximum(head_dim - (targets[:, 1:] ** 2).sum(axis=1), 0))
    rows = tq_hb.unrotate(targets.astype(np.float32))
    got = tq_hb.quantize(rows, bits, codebook=codebook, device=cuda)
    want = tq_hb.quantize(rows, bits, codebook=codebook, device="cpu")
    assert np.array_equal(got[0], want[0])
    assert np.array_equal(got[1], want[1])
