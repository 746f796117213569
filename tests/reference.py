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
BLOCK = 256  # coordinates under one norm, or the whole vector where it is shorter
PLANE_BLOCK = 128  # coordinates that own their bytes of a plane, or the whole row where it is shorter
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
    """+1/-1 per coordinate: bit j mod 8 of byte j // 8, a set bit being -1. Up to 512 they are the first of one row."""
    packed = _table("signs.json", "512").astype(np.uint8)
    return 1.0 - 2.0 * np.unpackbits(packed, bitorder="little")[:head_dim]


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


def norms_shape(head_dim: int, *lead: int) -> tuple[int, ...]:
    """Shape of the norms of vectors with this leading shape."""
    return lead if head_dim <= BLOCK else (*lead, head_dim // BLOCK)


def unit_norm(head_dim: int) -> float:
    """The norm under which a decoded value is the level itself: a length for one block, an RMS for two."""
    return float(np.sqrt(head_dim)) if head_dim <= BLOCK else 1.0


def normalised(x: np.ndarray, scale_factor_d512: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """What the quantiser sees (unit RMS), and the norms: ``(..., D)`` and ``(...)`` or ``(..., 2)``."""
    y = rotate(x)
    blocks = y.reshape(*y.shape[:-1], -1, min(y.shape[-1], BLOCK))
    length = np.sqrt((blocks**2).sum(-1))
    unit = np.divide(1.0, length, out=np.zeros_like(length), where=length > TINY_NORM)
    v = (blocks * (np.sqrt(blocks.shape[-1]) * unit)[..., None]).reshape(y.shape)
    if y.shape[-1] <= BLOCK:
        return v, length[..., 0]
    # Two blocks keep an RMS each, not a length.
    return v * scale_factor_d512, length / np.sqrt(BLOCK)


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
    head_dim = codes.shape[-1]
    if head_dim <= BLOCK:
        return values * (norms / np.sqrt(head_dim))[..., None]
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
    block = min(head_dim, BLOCK)
    tree = sums.reshape(len(y), head_dim // block, -1)
    while tree.shape[2] > 1:
        tree = tree[:, :, 0::2] + tree[:, :, 1::2]
    length = np.sqrt(tree[:, :, 0])

    root = np.float32(np.sqrt(block))
    norms = length if head_dim <= BLOCK else length * (one / root)
    inverse = np.divide(one, norms, out=np.zeros_like(norms), where=norms > np.float32(TINY_NORM))
    blocks = y.reshape(len(y), -1, block)
    if head_dim <= BLOCK:
        v = blocks * (inverse * root)[:, :, None]
    else:
        v = blocks * inverse[:, :, None] * np.float32(scale_factor_d512)
    codes = np.searchsorted(boundaries(cbits, codebook), v, side="left").astype(np.uint8)
    return codes.reshape(x.shape), norms.reshape(norms_shape(head_dim, *x.shape[:-1]))


def _places(plane_bits: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Byte and first bit of every coordinate in a plane of ``plane_bits`` bits per code."""
    block = min(head_dim, PLANE_BLOCK)
    block_bytes = block * plane_bits // 8
    j = np.arange(head_dim)
    u = j % block
    return j // block * block_bytes + u % block_bytes, plane_bits * (u // block_bytes)


def unpack_planes(rows: np.ndarray, cbits: int, head_dim: int) -> np.ndarray:
    """Codes of plane packed rows: ``(..., D * cbits / 8)`` to ``(..., D)``."""
    assert rows.shape[-1] * 8 == head_dim * cbits
    if cbits == 8:
        return rows.copy()
    nibbles, high = rows[..., : head_dim // 2], rows[..., head_dim // 2 :]
    low_byte, low_bit = _places(4, head_dim)
    high_byte, high_bit = _places(cbits - 4, head_dim)
    low_codes = nibbles[..., low_byte] >> low_bit & 15
    high_codes = high[..., high_byte] >> high_bit & (2 ** (cbits - 4) - 1)
    return (low_codes | high_codes << 4).astype(np.uint8)


def pack_planes(codes: np.ndarray, cbits: int) -> np.ndarray:
    """The inverse of :func:`unpack_planes`."""
    head_dim = codes.shape[-1]
    if cbits == 8:
        return codes.copy()
    planes = []
    for plane_bits, values in ((4, codes & 15), (cbits - 4, codes >> 4 & (2 ** (cbits - 4) - 1))):
        plane = np.zeros((*codes.shape[:-1], head_dim * plane_bits // 8), np.uint8)
        for j, (byte, bit) in enumerate(zip(*_places(plane_bits, head_dim), strict=True)):
            plane[..., byte] |= values[..., j] << np.uint8(bit)
        planes.append(plane)
    return np.concatenate(planes, axis=-1)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    ranges: list[tuple[int, int]] | None = None,
    return_lse: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Attention of q ``(H, D)`` or ``(N, H, D)`` to k and v ``(G, keys, D)``.

    Query i sees the keys ``begin ... end - 1`` of ``ranges[i]``, or all. ``bias`` has q's leading shape and is added
    to the scaled scores before softcap; ``sinks (H,)`` are one more logit each. A query that sees no key gives 0.
    """
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    queries = q if q.ndim == 3 else q[None]
    sinks = np.full(queries.shape[1], -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    added = np.zeros(queries.shape[:2]) if bias is None else np.asarray(bias, np.float64).reshape(queries.shape[:2])
    ranges = [(0, k.shape[1])] * len(queries) if ranges is None else ranges
    group = queries.shape[1] // len(k)
    out, lse = np.zeros_like(queries), np.full(queries.shape[:2], -np.inf)
    for i, (begin, end) in enumerate(ranges):
        for head, row in enumerate(queries[i]):
            scores = scale * (k[head // group, begin:end] @ row) + added[i, head]
            if softcap > 0.0:
                scores = softcap * np.tanh(scores / softcap)
            top = max(scores.max(initial=-np.inf), sinks[head])
            if top == -np.inf:
                continue
            weights = np.exp(scores - top)
            total = weights.sum() + np.exp(sinks[head] - top)
            out[i, head] = weights @ v[head // group, begin:end] / total
            lse[i, head] = top + np.log(total)
    out, lse = out.reshape(q.shape), lse.reshape(q.shape[:-1])
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class Visible:
    """Which slots of a cache the newest tokens see, each as a query."""

    kv_seq_len: int
    kv_capacity: int
    ring_start: int = 0
    window: int = 0  # 0: everything
    num_queries: int = 1

    def ages(self) -> list[tuple[int, int]]:
        """What each query sees, counted from the oldest slot on, the end left out."""
        ends = range(self.kv_seq_len - self.num_queries + 1, self.kv_seq_len + 1)
        return [(max(0, end - self.window) if self.window else 0, end) for end in ends]

    def slots(self) -> np.ndarray:
        """Slot numbers of the keys that at least one query sees, oldest first."""
        age = np.arange(min(begin for begin, _ in self.ages()), self.kv_seq_len)
        return (self.ring_start + age) % self.kv_capacity

    def ranges(self) -> list[tuple[int, int]]:
        """What each query sees, as places in :meth:`slots`."""
        oldest = min(begin for begin, _ in self.ages())
        return [(begin - oldest, end - oldest) for begin, end in self.ages()]
