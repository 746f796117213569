"""How many bits a value takes in each format, and how much of the vector is lost.

Every width, packing and codebook of tq_hb beside the formats of ``bench/formats.py``, on synthetic vectors with fixed
seeds. Writes ``bench/results/rate_distortion.json`` and ``.png``. Nothing here depends on the machine, but for the last
bits of an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import tq_hb
from bench import codec_tables, harness, plots
from bench.formats import RIVALS, Array, Floats, Format

CODEBOOKS = ("lloyd_max", "mlx_native")
PACKINGS = ("byte", "plane")
VALUES = 2**20  # of each data set, as rows of D
DEGREES_OF_FREEDOM = 5
OUTLIERS_OF = 32  # one channel of so many
OUTLIER_FACTORS = (10, 50)  # from the least to the largest, evenly spaced in their logarithm


@dataclass(frozen=True)
class TqHb:
    """tq_hb's own format."""

    head_dim: int
    bits: int
    packing: str
    codebook: str

    @property
    def family(self) -> str:
        """The packing and the codebook."""
        return f"tq_hb, {self.codebook}, {self.packing}"

    @property
    def name(self) -> str:
        """Width, packing and codebook."""
        return f"tq_hb {self.bits}, `{self.codebook}`, {self.packing}"

    def encode(self, x: Floats) -> tuple[Array, ...]:
        """Return codes and norms."""
        return tq_hb.quantize(x, self.bits, codebook=self.codebook, packing=self.packing)

    def decode(self, *stored: Array) -> Floats:
        """Return the vectors, rotated back."""
        codes, norms = stored
        decoded: Floats = tq_hb.dequantize(
            codes, norms, self.bits, head_dim=self.head_dim, codebook=self.codebook, packing=self.packing
        )
        return decoded


def formats(head_dim: int) -> list[Format]:
    """Return all that are compared at one head size."""
    own = itertools.product(CODEBOOKS, PACKINGS, tq_hb.supported_bits())
    return [*(TqHb(head_dim, bits, packing, codebook) for codebook, packing, bits in own), *RIVALS]


def normal(rng: np.random.Generator, head_dim: int) -> Floats:
    """Return independent standard normal values: what theory is about, and much like any vector after a rotation."""
    return rng.standard_normal((VALUES // head_dim, head_dim), dtype=np.float32)


def student_t(rng: np.random.Generator, head_dim: int) -> Floats:
    """Return independent values with heavier tails, as V has."""
    return rng.standard_t(DEGREES_OF_FREEDOM, (VALUES // head_dim, head_dim)).astype(np.float32)


def outliers(rng: np.random.Generator, head_dim: int) -> Floats:
    """Return the same with a few channels, the same ones in every row, many times as large: as K has."""
    chosen = rng.choice(head_dim, head_dim // OUTLIERS_OF, replace=False)
    factors = np.ones(head_dim, np.float32)
    factors[chosen] = np.geomspace(*OUTLIER_FACTORS, len(chosen))
    return student_t(rng, head_dim) * factors


DATA: tuple[Callable[[np.random.Generator, int], Floats], ...] = (normal, student_t, outliers)


def measure(form: Format, x: Floats) -> tuple[float, float]:
    """Return bits per value, all that has to be kept counted, and the squared error relative to the data's square."""
    stored = form.encode(x)
    error = form.decode(*stored).astype(float) - x
    return 8 * sum(part.nbytes for part in stored) / x.size, float(np.sum(error**2) / np.sum(x.astype(float) ** 2))


def compare(head_dim: int) -> list[dict[str, Any]]:
    """Return every format's figures at one head size."""
    data = {make.__name__: make(np.random.default_rng(head_dim), head_dim) for make in DATA}
    # What the others get if they rotate as well, as llama.cpp does before it stores a quantised cache.
    rotated = {"outliers_rotated": tq_hb.rotate(data["outliers"])}
    results = []
    for form in formats(head_dim):
        seen = data if isinstance(form, TqHb) else data | rotated
        figures = {name: measure(form, x) for name, x in seen.items()}
        (bits_per_value,) = {bits for bits, _ in figures.values()}
        nmse = {name: error for name, (_, error) in figures.items()}
        results.append(
            {"head_dim": head_dim, "format": form.name, "family": form.family}
            | {"bits_per_value": bits_per_value, "nmse": nmse}
        )
    return results


def main() -> None:
    """Compare at every head size."""
    args = harness.parse(harness.measuring_parser("bench.rate_distortion", __doc__))
    results = []
    for head_dim in harness.track(tq_hb.supported_head_dims(), "D = {}".format):
        results += compare(head_dim)
    harness.finish("rate_distortion", results, args.out, codec_tables.rate_distortion, plot=plots.rate_distortion)


if __name__ == "__main__":
    harness.run("bench.rate_distortion", main)
