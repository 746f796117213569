"""The formats that the rate-distortion table compares have their sizes and errors, and so has the table."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import tq_hb

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import formats, harness, rate_distortion

BLOCK = 32  # values of a ggml block
HALF_STEP = 0.5 + 2**-4  # and what rounding the scale to float16 can add to the largest code


@pytest.fixture
def libraries():
    """What the other formats are made by."""
    for name in ("gguf", "ml_dtypes", "mlx.core"):
        pytest.importorskip(name)


def heavy_tailed(rows: int = 64, head_dim: int = 256) -> np.ndarray:
    """Rows of very different sizes, one of them 0."""
    rng = np.random.default_rng(1)
    x = rng.standard_t(4, (rows, head_dim)) * np.exp(rng.standard_normal((rows, 1)))
    x[3] = 0
    return x.astype(np.float32)


@pytest.mark.usefixtures("libraries")
def test_fp8_scale_takes_the_largest_value_to_448():
    x = heavy_tailed()
    codes, scale = formats.Fp8().encode(x)

    assert scale.dtype == np.float32
    assert scale * 448 == pytest.approx(np.abs(x).max())
    assert np.abs(codes.astype(np.float32)).max() == 448
    assert not np.any(formats.Fp8().decode(*formats.Fp8().encode(np.zeros((2, 64), np.float32))))


@pytest.mark.usefixtures("libraries")
def test_fp8_values_beyond_448_become_448():
    least = np.finfo(np.float32).smallest_subnormal
    codes, scale = formats.Fp8().encode(np.array([[640 * least, -640 * least, 0]]))

    assert scale == least  # rounded from 640 / 448
    assert codes.astype(np.float32).tolist() == [[448, -448, 0]]


def steps(form: formats.Format, x: np.ndarray) -> np.ndarray:
    """The distance between neighbouring levels around each value, from the definition of the format."""
    size = formats.GROUP if isinstance(form, formats.Affine) else BLOCK
    groups = x.reshape(len(x), -1, size)
    largest, spread = np.abs(groups).max(-1), np.ptp(groups, axis=-1)
    if isinstance(form, formats.Affine):
        # Whole steps from the edge to 0, so a step is the spread's share or up to 1 part in twice the steps off it.
        step = spread / (2**form.bits - 1)
        step = largest / np.maximum(np.rint(largest / np.where(step > 0, step, 1)), 1)
    else:
        step = {"q8_0": largest / 127, "q5_1": spread / 31, "q5_0": largest / 16, "q4_0": largest / 8}[form.name]
    return np.repeat(step, size, axis=-1).reshape(x.shape)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("form", formats.RIVALS[1:], ids=lambda form: form.name)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_round_trip_is_within_half_a_step(form, head_dim):
    x = heavy_tailed(head_dim=head_dim)

    decoded = form.decode(*form.encode(x))

    assert decoded.shape == x.shape
    assert decoded.dtype == np.float32
    assert not np.any(decoded[3])
    error, step = np.abs(decoded - x), steps(form, x)
    inside = error <= HALF_STEP * step
    # The end of the codes opposite to the value that sets the scale: half a step more without a code of its own.
    assert np.all(inside | (error <= (1 + 2**-4) * step))
    if form.name in ("q8_0", "q5_1"):
        assert inside.all()
    else:
        assert inside.mean() > 0.95
    assert np.any(error > 0.4 * step), "too good to be this format"


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_bits_per_value_of_the_others(head_dim):
    x = heavy_tailed(rows=32, head_dim=head_dim)
    affine = {f"affine {bits}, group 64": bits + 0.5 for bits in (8, 6, 5, 4)}

    counted = {form.name: rate_distortion.measure(form, x)[0] for form in formats.RIVALS}

    fp8 = counted.pop("FP8 E4M3")
    assert fp8 == 8 + 32 / x.size
    assert counted == {"q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_0": 4.5, **affine}


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("head_dim", tq_hb.supported_head_dims())
def test_comparison(monkeypatch, head_dim):
    monkeypatch.setattr(rate_distortion, "VALUES", 2**14)

    results = rate_distortion.compare(head_dim)

    rows = {row["format"]: row for row in results}
    assert len(rows) == len(results) == 12 + len(formats.RIVALS)
    norm_bits = 32 / min(head_dim, 256)
    for bits in tq_hb.supported_bits():
        for codebook in ("lloyd_max", "mlx_native"):
            byte, plane = (rows[f"tq_hb {bits}, `{codebook}`, {packing}"] for packing in ("byte", "plane"))
            assert byte["bits_per_value"] == 8 + norm_bits
            assert plane["bits_per_value"] == bits + norm_bits
            assert byte["nmse"] == plane["nmse"]
    for row in results:
        assert row["nmse"]["normal"] > 4 ** -row["bits_per_value"], "beyond what is possible"
        assert ("outliers_rotated" in row["nmse"]) == (not row["format"].startswith("tq_hb"))
    # A rotation undoes what outliers do to a block's scale.
    assert rows["q8_0"]["nmse"]["outliers_rotated"] < rows["q8_0"]["nmse"]["outliers"] / 2


def test_relative_error_is_that_of_the_arrays_that_are_kept():
    x = np.full((1, 64), 2.0, np.float32)

    class Halves:
        family = name = "halves"

        def encode(self, x):
            return x.astype(np.float16), np.zeros(2, np.float32)

        def decode(self, *stored):
            return stored[0].astype(np.float32) / 2

    assert rate_distortion.measure(Halves(), x) == (16 + 1, 0.25)


@pytest.mark.parametrize("head_dim", tq_hb.supported_head_dims())
def test_outliers_are_a_few_channels(head_dim):
    x = rate_distortion.outliers(np.random.default_rng(0), head_dim)
    size = np.median(np.abs(x), axis=0)

    large = size > 5 * np.median(size)
    assert large.sum() == head_dim // 32
    assert size[large].max() / np.median(size) == pytest.approx(50, rel=0.1)


def test_results_cover_what_is_supported():
    results = harness.read("rate_distortion")["results"]

    rows = [(row["head_dim"], row["format"]) for row in results]
    want = [(d, form.name) for d in tq_hb.supported_head_dims() for form in rate_distortion.formats(d)]
    assert rows == want


def above_bound(data: str, head_dim: int, name: str) -> float:
    """How many bits per value more than the bound for normal values, from the results."""
    for row in harness.read("rate_distortion")["results"]:
        if row["head_dim"] == head_dim and row["format"] == name:
            return row["bits_per_value"] + np.log2(row["nmse"].get(data, row["nmse"]["outliers"])) / 2
    raise LookupError(name)


# docs/measurements.md says who wins where.
@pytest.mark.parametrize(
    ("data", "head_dim", "least", "most"),
    [
        ("normal", 64, -0.26, -0.16),
        ("normal", 128, -0.05, 0.05),
        ("normal", 256, 0.1, 0.2),
        ("normal", 512, 0.1, 0.2),
        ("outliers", 64, 0.4, 1.2),
        ("outliers", 512, 0.8, 1.5),
        ("outliers_rotated", 64, -1.0, -0.7),
        ("outliers_rotated", 128, -0.45, -0.25),
        ("outliers_rotated", 256, -0.1, 0),
        ("outliers_rotated", 512, 0, 0.1),
    ],
    ids=str,
)
def test_document_tells_who_wins(data, head_dim, least, most):
    for bits, name in ((5, "q5_0"), (8, "q8_0")):
        ours = above_bound(data, head_dim, f"tq_hb {bits}, `lloyd_max`, plane")
        assert least <= above_bound(data, head_dim, name) - ours <= most


def test_document_tells_how_fp8_compares():
    rows = {(row["head_dim"], row["format"]): row["nmse"] for row in harness.read("rate_distortion")["results"]}
    for head_dim in tq_hb.supported_head_dims():
        fp8, ours = rows[head_dim, "FP8 E4M3"], rows[head_dim, "tq_hb 6, `lloyd_max`, plane"]
        assert all(fp8[data] > ours[data] for data in ours)
