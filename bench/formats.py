"""Other formats that KV caches are stored in, by the libraries that define them.

Each class encodes float32 rows into every array that has to be kept, so that its size is a count of real bytes, and
decodes them again in float32: ggml's blocks by the gguf package, MLX's affine groups by MLX on its CPU device, FP8 by
ml_dtypes. ``pip install '.[formats]'`` brings them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]

GROUP = 64  # values of an affine group
FP8_MAX = 448


class Format(Protocol):
    """A way to store vectors of shape (..., D)."""

    @property
    def family(self) -> str:
        """What its widths have in common: the name of a line in the plot."""

    @property
    def name(self) -> str:
        """How tables name it."""

    def encode(self, x: Floats) -> tuple[Array, ...]:
        """Return every array that has to be kept."""

    def decode(self, *stored: Array) -> Floats:
        """Return what the arrays of `encode` stand for, in the shape of its argument."""


@dataclass(frozen=True)
class Blocks:
    """ggml's blocks of 32 values with float16 scales."""

    name: str
    family: str = "llama.cpp q8_0, q5_0, q4_0"

    def encode(self, x: Floats) -> tuple[Array, ...]:
        """Return the blocks of each row, as bytes."""
        from gguf import quants

        return (quants.quantize(x, self._type()),)

    def decode(self, *stored: Array) -> Floats:
        """Return the values of the blocks."""
        from gguf import quants

        (blocks,) = stored
        values: Floats = quants.dequantize(blocks, self._type())
        return values

    def _type(self) -> Any:
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType[self.name.upper()]


@dataclass(frozen=True)
class Affine:
    """MLX's affine groups of 64, float16 scale and bias."""

    bits: int
    family: ClassVar[str] = "MLX affine, groups of 64"

    @property
    def name(self) -> str:
        """As mlx-lm's ``--kv-bits`` and ``--kv-group-size`` have it."""
        return f"affine {self.bits}, group {GROUP}"

    def encode(self, x: Floats) -> tuple[Array, ...]:
        """Return codes, scales and biases; the codes are those that go with scale and bias in float32."""
        import mlx.core as mx

        codes, scales, biases = mx.quantize(mx.array(x), group_size=GROUP, bits=self.bits, stream=mx.cpu)
        return np.array(codes), np.array(scales).astype(np.float16), np.array(biases).astype(np.float16)

    def decode(self, *stored: Array) -> Floats:
        """Return code times scale plus bias."""
        import mlx.core as mx

        codes, scales, biases = map(mx.array, stored)
        steps = scales.astype(mx.float32), biases.astype(mx.float32)
        return np.array(mx.dequantize(codes, *steps, group_size=GROUP, bits=self.bits, stream=mx.cpu))


@dataclass(frozen=True)
class Fp8:
    """FP8 E4M3, with one float32 scale per tensor that takes the largest value to 448."""

    family: ClassVar[str] = "FP8 E4M3"
    name: ClassVar[str] = "FP8 E4M3"

    def encode(self, x: Floats) -> tuple[Array, ...]:
        """Return codes and the scale."""
        import ml_dtypes

        largest = np.abs(x).max()
        scale = np.float32(largest / FP8_MAX if largest > 0 else 1)
        # A scale that is not exact could take the largest value beyond, to a NaN.
        return np.clip(x / scale, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn), np.array([scale])

    def decode(self, *stored: Array) -> Floats:
        """Return value times scale."""
        codes, scale = stored
        values: Floats = codes.astype(np.float32) * scale
        return values


RIVALS: tuple[Format, ...] = (
    Fp8(),
    Blocks("q8_0"),
    Blocks("q5_1", family="llama.cpp q5_1"),
    Blocks("q5_0"),
    Blocks("q4_0"),
    *(Affine(bits) for bits in (8, 6, 5, 4)),
)
