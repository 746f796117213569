"""Other formats that KV caches are stored in, as their public definitions have them.

Each class encodes float32 rows into every array that has to be kept, so that its size is a count of real bytes, and
decodes them again. All arithmetic is float32, as in the originals. The definitions:

- ggml's block formats of 32 values, ``quantize_row_q8_0_ref`` and its siblings:
  https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c, layouts in ggml-common.h there
- MLX's affine groups, ``quantize`` with ``mode="affine"``:
  https://github.com/ml-explore/mlx/blob/main/mlx/backend/cpu/quantized.cpp
- FP8 E4M3 without infinities, from "FP8 Formats for Deep Learning": https://arxiv.org/abs/2209.05433
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]

BLOCK = 32  # values of a ggml block
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
class Q8:
    """ggml's q8_0: signed codes times a scale, whose 127 is the largest magnitude."""

    family: ClassVar[str] = "llama.cpp q8_0, q5_0, q4_0"
    name: ClassVar[str] = "q8_0"
    layout: ClassVar[np.dtype[Any]] = np.dtype([("d", "<f2"), ("qs", "i1", BLOCK)])

    def encode(self, x: Floats) -> tuple[Array, ...]:
        """Return one block per 32 values."""
        values = _groups(x, BLOCK)
        d = np.abs(values).max(axis=-1) / np.float32(127)
        scaled = values * _inverse(d)[..., None]
        codes = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled)  # C's roundf: halves away from zero
        return (_blocks(self.layout, d=d, qs=codes),)

    def decode(self, *stored: Array) -> Floats:
        """Return code times scale."""
        (blocks,) = stored
        return _rows(blocks["qs"] * blocks["d"].astype(np.float32)[..., None])


@dataclass(frozen=True)
class Q0:
    """ggml's q4_0 and q5_0: codes around the middle one; the lowest is the value of largest magnitude."""

    bits: int
    family: ClassVar[str] = Q8.family

    @property
    def name(self) -> str:
        """As ggml has it."""
        return f"q{self.bits}_0"

    def encode(self, x: Floats) -> tuple[Array, ...]:
        """Return one block per 32 values."""
        values, middle = _groups(x, BLOCK), 2 ** (self.bits - 1)
        extreme = np.take_along_axis(values, np.abs(values).argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
        d = extreme / np.float32(-middle)
        codes = values * _inverse(d)[..., None] + np.float32(middle + 0.5)
        codes = np.minimum(codes, 2 * middle - 1).astype(np.uint8)
        return (_blocks(_layout(self.bits, "d"), d=d, **_planes(codes, self.bits)),)

    def decode(self, *stored: Array) -> Floats:
        """Return the code's distance from the middle times scale."""
        (blocks,) = stored
        codes = _codes(blocks).astype(np.float32) - 2 ** (self.bits - 1)
        return _rows(codes * blocks["d"].astype(np.float32)[..., None])


@dataclass(frozen=True)
class Q5WithMinimum:
    """ggml's q5_1: codes between the least and the largest value."""

    family: ClassVar[str] = "llama.cpp q5_1"
    name: ClassVar[str] = "q5_1"

    def encode(self, x: Floats) -> tuple[Array, ...]:
        """Return one block per 32 values."""
        values = _groups(x, BLOCK)
        m = values.min(axis=-1)
        d = (values.max(axis=-1) - m) / np.float32(31)
        codes = ((values - m[..., None]) * _inverse(d)[..., None] + np.float32(0.5)).astype(np.uint8)
        return (_blocks(_layout(5, "d", "m"), d=d, m=m, **_planes(codes, 5)),)

    def decode(self, *stored: Array) -> Floats:
        """Return code times scale plus minimum."""
        (blocks,) = stored
        d, m = (blocks[name].astype(np.float32)[..., None] for name in ("d", "m"))
        return _rows(_codes(blocks) * d + m)


@dataclass(frozen=True)
class Affine:
    """MLX's affine groups of 64, float16 scale and bias: the end further from 0 has a code, and so has 0."""

    bits: int
    family: ClassVar[str] = "MLX affine, groups of 64"

    @property
    def name(self) -> str:
        """As mlx-lm's ``--kv-bits`` and ``--kv-group-size`` have it."""
        return f"affine {self.bits}, group {GROUP}"

    def encode(self, x: Floats) -> tuple[Array, ...]:
        """Return codes, as bits from the low end of the first byte on, scales and biases."""
        values, most = _groups(x, GROUP), 2**self.bits - 1
        low, high = values.min(axis=-1), values.max(axis=-1)
        step = np.maximum((high - low) / np.float32(most), np.float32(1e-7))
        below = np.abs(low) > np.abs(high)
        scale, edge = np.where(below, step, -step), np.where(below, low, high)
        steps = np.rint(edge / scale)
        near_zero = steps == 0
        scale = np.where(near_zero, scale, edge / np.where(near_zero, 1, steps).astype(np.float32))
        bias = np.where(near_zero, np.float32(0), edge)
        codes = np.clip(np.rint((values - bias[..., None]) / scale[..., None]), 0, most).astype(np.uint8)
        bits = np.unpackbits(codes[..., None], axis=-1, count=self.bits, bitorder="little")
        packed = np.packbits(bits.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
        return packed, scale.astype(np.float16), bias.astype(np.float16)

    def decode(self, *stored: Array) -> Floats:
        """Return code times scale plus bias."""
        packed, scale, bias = stored
        bits = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*packed.shape[:-1], GROUP, self.bits)
        codes = np.packbits(bits, axis=-1, bitorder="little")[..., 0]
        return _rows(codes * scale.astype(np.float32)[..., None] + bias.astype(np.float32)[..., None])


@dataclass(frozen=True)
class Fp8:
    """FP8 E4M3 to the nearest, ties to even, with one float32 scale per tensor that takes the largest value to 448."""

    family: ClassVar[str] = "FP8 E4M3"
    name: ClassVar[str] = "FP8 E4M3"

    def encode(self, x: Floats) -> tuple[Array, ...]:
        """Return codes and the scale."""
        largest = np.abs(x).max()
        scale = np.float32(largest / FP8_MAX if largest > 0 else 1)
        return fp8_encode(x / scale), np.array([scale])

    def decode(self, *stored: Array) -> Floats:
        """Return value times scale."""
        codes, scale = stored
        return fp8_values()[codes] * scale


def fp8_values() -> Floats:
    """Return what each of the 256 codes stands for: sign, 4 bits of exponent with bias 7, 3 bits of mantissa."""
    code = np.arange(256)
    sign, exponent, mantissa = np.where(code & 0x80, -1.0, 1.0), code >> 3 & 15, code & 7
    magnitude = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    magnitude[code & 0x7F == 0x7F] = np.nan
    return (sign * magnitude).astype(np.float32)


def fp8_encode(x: Floats) -> NDArray[np.uint8]:
    """Return the code nearest to each finite value; beyond 448 it is that of 448."""
    magnitudes = fp8_values()[:0x7F]
    midpoints = (magnitudes[:-1] + magnitudes[1:]) / 2  # exact in float32
    size = np.abs(x)
    codes = np.searchsorted(midpoints, size).astype(np.uint8)
    tie = size == midpoints[np.minimum(codes, len(midpoints) - 1)]
    codes += tie & (codes % 2 == 1)  # the search takes ties down
    codes |= np.where(np.signbit(x), np.uint8(0x80), np.uint8(0))
    return codes


RIVALS: tuple[Format, ...] = (
    Fp8(),
    Q8(),
    Q5WithMinimum(),
    Q0(5),
    Q0(4),
    *(Affine(bits) for bits in (8, 6, 5, 4)),
)


def _groups(x: Floats, size: int) -> Floats:
    return x.reshape(*x.shape[:-1], -1, size)


def _rows(groups: Array) -> Floats:
    rows: Floats = groups.reshape(*groups.shape[:-2], -1)
    return rows


def _inverse(d: Floats) -> Floats:
    zero = d == 0
    return np.where(zero, np.float32(0), np.float32(1) / np.where(zero, np.float32(1), d))


def _layout(bits: int, *scales: str) -> np.dtype[Any]:
    """Return a ggml block: float16 scales, the fifth bits if there are any, nibbles."""
    fifth = [("qh", "u1", BLOCK // 8)] if bits == 5 else []
    return np.dtype([*((name, "<f2") for name in scales), *fifth, ("qs", "u1", BLOCK // 2)])


def _planes(codes: NDArray[np.uint8], bits: int) -> dict[str, Array]:
    """Return value j of a block in the low nibble of byte j, value j + 16 in the high one; fifth bits apart."""
    low, high = np.split(codes & 15, 2, axis=-1)
    fifth = {"qh": np.packbits(codes >> 4, axis=-1, bitorder="little")} if bits == 5 else {}
    return {**fifth, "qs": low | high << 4}


def _codes(blocks: Array) -> NDArray[np.uint8]:
    qs = blocks["qs"]
    codes: NDArray[np.uint8] = np.concatenate([qs & 15, qs >> 4], axis=-1)
    if "qh" in (blocks.dtype.names or ()):
        codes |= np.unpackbits(blocks["qh"], axis=-1, bitorder="little") << 4
    return codes


def _blocks(layout: np.dtype[Any], **fields: Array) -> Array:
    blocks = np.empty(fields["d"].shape, layout)
    for name, values in fields.items():
        blocks[name] = values
    return blocks
