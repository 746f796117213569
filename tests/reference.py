"""The codec and the attention straight from their formulas, in float64.

Slow and plain on purpose, and independent: numpy only, its own tables under ``data/``, nothing of
the package. ``encode_float32`` is the one exception to float64: it fixes the rounding of every
step, because the package promises the very same bytes.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parent / "data"
BLOCK = 256  # coordinates under one norm
TINY_NORM = 1e-10  # at or below it a vector is coded as zero


@functools.cache
def _table(file: str, key: str) -> np.ndarray:
    table = np.asarray(json.loads((DATA / file).read_text())[key], dtype=np.float32)
    table.setflags(write=False)
    return table


def levels(cbits: int, codebook: str) -> np.ndarray:
    """Codebook entries, float32, ascending."""
    return _table(f"levels_{codebook}.json", str(cbits))


def boundaries(cbits: int, codebook: str) -> np.ndarray:
    """Decision boundaries, float32, ascending."""
    return _table(f"boundaries_{codebook}.json", str(cbits))


@functools.cache
def signs(head_dim: int) -> np.ndarray:
    """+1/-1 per coordinate: bit j mod 8 of byte j // 8, a set bit being -1."""
    packed = _table("signs.json", str(head_dim)).astype(np.uint8)
    return 1.0 - 2.0 * np.unpackbits(packed, bitorder="little")


@functools.cache
def rotation(head_dim: int) -> np.ndarray:
    """The matrix of R: signs first, then the orthonormal Hadamard matrix in natural order."""
    stages = head_dim.bit_length() - 1
    hadamard = functools.reduce(np.kron, [np.array([[1.0, 1.0], [1.0, -1.0]])] * stages)
    return hadamard * signs(head_dim) / np.sqrt(head_dim)


def rotate(x: np.ndarray) -> np.ndarray:
    """R along the last axis."""
    return _times(x, rotation(x.shape[-1]).T)


def unrotate(y: np.ndarray) -> np.ndarray:
    """The inverse of R; R is orthogonal."""
    return _times(y, rotation(y.shape[-1]))


def _times(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """``rows @ matrix`` along the last axis, as one product: numpy would make one for each leading index."""
    return (np.asarray(rows, np.float64).reshape(-1, len(matrix)) @ matrix).reshape(rows.shape)


def normalised(x: np.ndarray, scale_factor_d512: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """What the quantiser sees (unit RMS), and the norms: ``(..., D)`` and ``(...)`` or ``(..., 2)``."""
    y = rotate(x)
    blocks = y.reshape(*y.shape[:-1], -1, BLOCK)
    length = np.sqrt((blocks**2).sum(-1))
    unit = np.divide(1.0, length, out=np.zeros_like(length), where=length > TINY_NORM)
    v = blocks * (16.0 * unit)[..., None]
    if y.shape[-1] == BLOCK:
        return v.reshape(y.shape), length[..., 0]
    # Two blocks keep an RMS each, not a length.
    return v.reshape(y.shape) * scale_factor_d512, length / 16.0


def encode(
    x: np.ndarray, cbits: int, codebook: str = "lloyd_max", scale_factor_d512: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and norms in float64."""
    v, norms = normalised(x, scale_factor_d512)
    return np.searchsorted(boundaries(cbits, codebook), v, side="left").astype(np.uint8), norms


def decode(
    codes: np.ndarray,
    norms: np.ndarray,
    cbits: int,
    codebook: str = "lloyd_max",
    scale_factor_d512: float = 1.0,
) -> np.ndarray:
    """The vectors that codes and norms stand for, still rotated."""
    values = levels(cbits, codebook).astype(np.float64)[codes & (2**cbits - 1)]
    norms = np.asarray(norms, np.float64)
    if codes.shape[-1] == BLOCK:
        return values * (norms / 16.0)[..., None]
    return values * np.repeat(norms / scale_factor_d512, BLOCK, axis=-1)


def encode_float32(
    x: np.ndarray, cbits: int, codebook: str = "lloyd_max", scale_factor_d512: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and norms with every float32 rounding where the format puts it.

    Serial butterfly; magnitudes below 2^-60 become 0; the sum of squares runs serially over each of
    32 lanes of D/32 consecutive values, then by an XOR tree over the lanes.
    """
    one = np.float32(1)
    head_dim = x.shape[-1]
    y = np.asarray(x, np.float32).reshape(-1, head_dim) * signs(head_dim).astype(np.float32)
    half = 1
    while half < head_dim:
        pairs = y.reshape(-1, head_dim // (2 * half), 2, half)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = np.stack([a + b, a - b], axis=2).reshape(-1, head_dim)
        half *= 2
    y = y * np.float32(1.0 / np.sqrt(head_dim))
    y = np.where(np.abs(y) < np.float32(2.0**-60), np.float32(0), y)

    lanes = y.reshape(len(y), 32, head_dim // 32)
    sums = np.zeros(lanes.shape[:2], np.float32)
    for i in range(lanes.shape[2]):
        sums = sums + lanes[:, :, i] * lanes[:, :, i]
    tree = sums.reshape(len(y), head_dim // BLOCK, -1)
    while tree.shape[2] > 1:
        tree = tree[:, :, 0::2] + tree[:, :, 1::2]
    length = np.sqrt(tree[:, :, 0])

    sixteen = np.float32(16)
    norms = length if head_dim == BLOCK else length * (one / sixteen)
    inverse = np.divide(one, norms, out=np.zeros_like(norms), where=norms > np.float32(TINY_NORM))
    blocks = y.reshape(len(y), -1, BLOCK)
    if head_dim == BLOCK:
        v = blocks * (inverse * sixteen)[:, :, None]
    else:
        v = blocks * inverse[:, :, None] * np.float32(scale_factor_d512)
    codes = np.searchsorted(boundaries(cbits, codebook), v, side="left").astype(np.uint8)
    lead = x.shape[:-1]
    return codes.reshape(x.shape), norms.reshape(lead if head_dim == BLOCK else (*lead, 2))


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float, softcap: float = 0.0) -> np.ndarray:
    """One query per head over every key given: q ``(H, D)``, k and v ``(G, keys, D)``."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    group = len(q) // len(k)
    out = np.empty_like(q)
    for head, row in enumerate(q):
        scores = scale * (k[head // group] @ row)
        if softcap > 0.0:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[head] = weights @ v[head // group] / weights.sum()
    return out


@dataclass(frozen=True)
class Visible:
    """Which slots of a cache the newest token sees."""

    kv_seq_len: int
    kv_capacity: int
    ring_start: int = 0
    window: int = 0  # 0: everything

    def slots(self) -> np.ndarray:
        """Slot numbers, oldest first."""
        age = np.arange(self.kv_seq_len)
        if self.window:
            age = age[-self.window :]
        return (self.ring_start + age) % self.kv_capacity
