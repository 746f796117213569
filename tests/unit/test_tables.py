"""The tables that everything rests on: levels, boundaries, signs, and the golden vectors made with them."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import reference
import tolerance
import tq_hb

WIDTHS = (5, 6, 8)
CODEBOOKS = ("lloyd_max", "mlx_native")
GENERATOR = Path(__file__).resolve().parents[2] / "csrc" / "core" / "codebooks" / "generate.py"

# Mean squared error on N(0,1): what tells a converged table from one that only stopped moving.
GAUSSIAN_ERROR = {
    ("lloyd_max", 5): 2.504668356e-3,
    ("lloyd_max", 6): 6.442397e-4,
    ("lloyd_max", 8): 4.118508e-5,
    ("mlx_native", 5): 2.504668375e-3,
    ("mlx_native", 6): 6.486489e-4,
    ("mlx_native", 8): 6.274277e-5,
}

SIGN_SHA256 = {
    256: "3ef1038e6c232e9519101daa2d6efd637d4c6bfdb29f4ee7101625c39d0ddc89",
    512: "44f13ce9f6db1edac62f558ee054f9de29cd474fd051362cadcaa98a55745f17",
}


def test_supported_sizes():
    assert tq_hb.supported_bits() == WIDTHS
    assert tq_hb.supported_head_dims() == (64, 128, 256, 512)


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("cbits", WIDTHS)
def test_codebook_and_boundaries_are_the_published_data(cbits, name):
    levels, boundaries = tq_hb.codebook(cbits, name), tq_hb.boundaries(cbits, name)

    assert levels.dtype == boundaries.dtype == np.float32
    assert levels.shape == (2**cbits,)
    assert boundaries.shape == (2**cbits - 1,)
    assert np.array_equal(levels, reference.levels(cbits, name))
    assert np.array_equal(boundaries, reference.boundaries(cbits, name))


@pytest.mark.parametrize("cbits", WIDTHS)
def test_lloyd_max_is_the_default(cbits):
    assert np.array_equal(tq_hb.codebook(cbits), tq_hb.codebook(cbits, "lloyd_max"))
    assert np.array_equal(tq_hb.boundaries(cbits), tq_hb.boundaries(cbits, "lloyd_max"))


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("cbits", WIDTHS)
def test_tables_ascend_interleave_and_are_odd(cbits, name):
    levels, boundaries = tq_hb.codebook(cbits, name), tq_hb.boundaries(cbits, name)

    assert (levels[:-1] < boundaries).all()
    assert (boundaries < levels[1:]).all()
    assert np.array_equal(levels, -levels[::-1])
    assert np.array_equal(boundaries, -boundaries[::-1])


@pytest.mark.parametrize(("name", "cbits"), list(GAUSSIAN_ERROR), ids=str)
def test_gaussian_error_of_the_table(name, cbits):
    levels = tq_hb.codebook(cbits, name).astype(float)
    edges = [-math.inf, *tq_hb.boundaries(cbits, name).astype(float), math.inf]
    density = [math.exp(-0.5 * e * e) / math.sqrt(2 * math.pi) for e in edges]
    below = [0.5 * math.erfc(-e / math.sqrt(2)) for e in edges]

    error = 1.0
    for i, level in enumerate(levels):
        first_moment, mass = density[i] - density[i + 1], below[i + 1] - below[i]
        error += level * level * mass - 2 * level * first_moment

    assert error == pytest.approx(GAUSSIAN_ERROR[name, cbits], rel=1e-6)


@pytest.mark.parametrize("cbits", WIDTHS)
def test_every_lloyd_max_level_is_the_mean_of_its_cell(cbits):
    levels = tq_hb.codebook(cbits).astype(float)
    half = levels[len(levels) // 2 :]
    edges = [0.0, *(0.5 * (half[1:] + half[:-1])), math.inf]
    for level, low, high in zip(half, edges[:-1], edges[1:], strict=True):
        mass = 0.5 * (math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2)))
        mean = (math.exp(-0.5 * low * low) - math.exp(-0.5 * high * high)) / math.sqrt(2 * math.pi) / mass
        # Half a unit in the last place of a float32 near 4.6, for the level and its two edges.
        assert level == pytest.approx(mean, abs=1e-6)


@pytest.mark.skipif(not GENERATOR.exists(), reason="the sources of the package are not beside the tests")
def test_checked_in_tables_are_what_the_generator_makes():
    run = subprocess.run([sys.executable, GENERATOR, "--check"], capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("head_dim", SIGN_SHA256)
def test_signs_are_the_published_table(head_dim):
    signs = tq_hb.signs(head_dim)

    packed = np.packbits(signs < 0, bitorder="little").tobytes()
    assert signs.dtype == np.float32
    assert set(signs) == {1.0, -1.0}
    assert hashlib.sha256(packed).hexdigest() == SIGN_SHA256[head_dim]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_signs_of_a_smaller_head_are_the_first_of_512(head_dim):
    assert np.array_equal(tq_hb.signs(512)[:head_dim], tq_hb.signs(head_dim))


def test_changing_a_returned_table_changes_nothing():
    for table in (lambda: tq_hb.codebook(8), lambda: tq_hb.boundaries(8), lambda: tq_hb.signs(256)):
        first = table()
        if first.flags.writeable:
            first[:] = 0.0
        assert (table() != 0.0).sum() >= 254


GOLDEN_INPUTS = {
    "e0": lambda i: (i == 0) * 1.0,
    "ones": lambda i: i * 0 + 1.0,
    "lcg": lambda i: (i * 73 + 19) % 257 - 128.0,
    "quad": lambda i: (i * i * 31 + i * 17 + 5) % 509 - 254.0,
    "zeros": lambda i: i * 0.0,
}


def golden_cases() -> list:
    cases = []
    for name in CODEBOOKS:
        document = json.loads((reference.DATA / f"golden_encode_{name}.json").read_text())
        for case in document["cases"]:
            if case["dim"] in tq_hb.supported_head_dims():
                label = f"{name}-{case['input']}-{case['dim']}-{case['bits']}bit"
                cases.append(pytest.param(name, case, id=label))
    return cases


@pytest.mark.parametrize(("name", "case"), golden_cases())
def test_golden_encode_vectors(device, name, case):
    x = GOLDEN_INPUTS[case["input"]](np.arange(case["dim"])).astype(np.float32)

    codes, norms = tq_hb.quantize(x, case["bits"], codebook=name, device=device)

    np.testing.assert_allclose(np.atleast_1d(norms), case["norms"], rtol=tolerance.NORM_RTOL)
    assert codes[:8].tolist() == case["first8"]
    # A margin of 0 (or none at all) means a value that is exactly 0 in float32 as well.
    margin = case["min_boundary_margin"]
    if not margin or margin > tolerance.BOUNDARY_MARGIN:
        assert hashlib.sha256(codes.tobytes()).hexdigest() == case["sha256"]
        return
    v, _ = reference.normalised(x)
    want, _ = reference.encode(x, case["bits"], name)
    assert hashlib.sha256(want.tobytes()).hexdigest() == case["sha256"]
    for j in np.flatnonzero(codes != want):
        assert np.abs(reference.boundaries(case["bits"], name) - v[j]).min() <= tolerance.BOUNDARY_MARGIN
        assert abs(int(codes[j]) - int(want[j])) == 1
