"""What the gate puts in the place of a layer's KV cache: tq_hb's caches, and float ones to compare them with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

import tq_hb
from tq_hb.integrations.key_means import prefill_mean

Floats: TypeAlias = npt.NDArray[np.float32]
Codec: TypeAlias = Callable[[Floats], Floats]

WIDEST = 8
"""Bits that are as good as any width here: what the layers get that a setting makes an exception of."""


@dataclass(frozen=True)
class Layer:
    """What one layer's cache has to hold; `window` is None for full attention."""

    index: int
    kv_heads: int
    head_dim: int
    window: int | None


class LayerCache(Protocol):
    """What the replay asks of a layer's cache; `tq_hb.KVCache` has it."""

    @property
    def sliding_window(self) -> int | None:
        """Tokens that a query sees, itself included; None: all."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a token takes."""

    @property
    def last_plan(self) -> Any | None:
        """What served the last attention on codes; None if there was none."""

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Take float32 keys and values, shape (tokens, kv_heads, head_dim)."""

    def attend(
        self, q: torch.Tensor, *, scale: float | None, softcap: float, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend the newest tokens, shape (tokens, heads, head_dim), each to itself and what came before it."""

    def dequantize(self) -> tuple[Any, Any]:
        """Return keys and values held, oldest first, as they were appended up to the codec's error."""


class Setting(Protocol):
    """A way to hold every layer's keys and values."""

    @property
    def name(self) -> str:
        """How tables name it."""

    @property
    def on_codes(self) -> bool:
        """Whether every layer has to attend on tq_hb's codes; the replay makes sure of it."""

    def describe(self) -> dict[str, Any]:
        """Return all that the results depend on, for JSON."""

    def make_cache(self, layer: Layer, first_keys: torch.Tensor, chunk: int) -> LayerCache:
        """Return an empty cache.

        `first_keys`, shape (tokens, kv_heads, head_dim), are about to be appended; up to `chunk` tokens will be
        attended to at a time.
        """


@dataclass(frozen=True)
class Widths:
    """tq_hb's caches: bits per value of K and V, the same in all layers but for `exceptions`, which get 8/8.

    `k_mean` is None, "prefill" (the mean of the first tokens appended, where that fits them) or a (kv_heads, head_dim)
    array or None per layer, which the name calls `centring`.
    """

    k_bits: int
    v_bits: int
    exceptions: tuple[int, ...] = ()
    k_mean: Literal["prefill"] | tuple[Floats | None, ...] | None = None
    centring: str = ""
    codebook: str = "lloyd_max"
    on_codes: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """As ``6/6``, or ``6/6 centred, layers 3 5 at 8/8``."""
        name = f"{self.k_bits}/{self.v_bits} {self.centring}".rstrip()
        if not self.exceptions:
            return name
        return f"{name}, layers {' '.join(map(str, self.exceptions))} at {WIDEST}/{WIDEST}"

    def describe(self) -> dict[str, Any]:
        """Return the fields; means as a digest."""
        k_mean: Any = self.k_mean
        if isinstance(k_mean, tuple):
            digest = hashlib.sha256()
            for mean in k_mean:
                digest.update(b"none" if mean is None else np.ascontiguousarray(mean).tobytes())
            k_mean = digest.hexdigest()
        return {
            "k_bits": self.k_bits,
            "v_bits": self.v_bits,
            "exceptions": list(self.exceptions),
            "k_mean": k_mean,
            "codebook": self.codebook,
        }

    def make_cache(self, layer: Layer, first_keys: torch.Tensor, chunk: int) -> tq_hb.KVCache:
        """Return a plane-packed cache; a ring has room for the window and a chunk."""
        k_bits, v_bits = (WIDEST, WIDEST) if layer.index in self.exceptions else (self.k_bits, self.v_bits)
        k_mean: Any = self.k_mean
        if isinstance(k_mean, tuple):
            k_mean = k_mean[layer.index]
        elif k_mean == "prefill":
            k_mean = prefill_mean(first_keys)
        return tq_hb.KVCache(
            layer.kv_heads,
            layer.head_dim,
            None if layer.window is None else layer.window + chunk - 1,
            k_bits=k_bits,
            v_bits=v_bits,
            sliding_window=layer.window,
            packing="plane",
            codebook=self.codebook,
            k_mean=k_mean,
        )


@dataclass(frozen=True)
class Decoded:
    """Another format: every key and value is encoded and decoded by `codec` when it comes, and attended to in float32.

    With the default codec, which changes nothing, it is what the others are compared with.
    """

    name: str = "float32"
    bits_per_value: float = 32
    codec: Codec | None = None
    on_codes: ClassVar[bool] = False

    def describe(self) -> dict[str, Any]:
        """Return the name, which has to say what the codec does, and the bits."""
        return {"name": self.name, "bits_per_value": self.bits_per_value}

    def make_cache(self, layer: Layer, _first_keys: torch.Tensor, chunk: int) -> FloatCache:
        """Return a cache of decoded values."""
        return FloatCache(layer, chunk, self.codec, self.bits_per_value)


class FloatCache:
    """Keys and values in float32, as they come or as a codec leaves them, attended to exactly."""

    last_plan = None

    def __init__(self, layer: Layer, chunk: int, codec: Codec | None = None, bits_per_value: float = 32) -> None:
        self.sliding_window = layer.window
        self.bytes_per_token = 2 * layer.kv_heads * layer.head_dim * bits_per_value / 8
        self._codec = codec
        self._kept = None if layer.window is None else layer.window + chunk - 1
        self._k = self._v = torch.zeros(0, layer.kv_heads, layer.head_dim)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add tokens; those that no query will see any more are dropped."""
        if self._codec is not None:
            k, v = (torch.from_numpy(self._codec(np.ascontiguousarray(x.numpy()))) for x in (k, v))
        self._k, self._v = torch.cat([self._k, k]), torch.cat([self._v, v])
        if self._kept is not None:
            self._k, self._v = self._k[-self._kept :], self._v[-self._kept :]

    def attend(
        self, q: torch.Tensor, *, scale: float | None, softcap: float, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend the newest tokens."""
        rows = torch.arange(len(self._k) - len(q), len(self._k))
        weights = attention_weights(
            q, self._k, rows, window=self.sliding_window, scale=scale, softcap=softcap, sinks=sinks
        )
        return weigh(weights, self._v)

    def dequantize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what is held, shape (tokens, kv_heads, head_dim)."""
        return self._k, self._v


def attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor,
    *,
    window: int | None,
    scale: float | None,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return the softmax of the scores, shape (heads, queries, keys); what goes to a sink is missing from the sums.

    Parameters
    ----------
    q : torch.Tensor, shape (queries, heads, head_dim)
    k : torch.Tensor, shape (keys, kv_heads, head_dim)
    rows : torch.Tensor, shape (queries,)
        The place of each query's own key in `k`: it sees that one and those before it, as far as the window goes.
    """
    queries, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    grouped = q.view(queries, kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
    scores = (grouped @ k.permute(1, 2, 0)).view(heads, queries, len(k)) * (head_dim**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    age = rows[:, None] - torch.arange(len(k))
    hidden = (age < 0) if window is None else (age < 0) | (age >= window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(heads, queries, 1)], dim=-1)
    return scores.softmax(dim=-1)[..., : len(k)]


def weigh(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the weighted sums of the values, shape (queries, heads, head_dim)."""
    heads, queries, keys = weights.shape
    kv_heads, head_dim = v.shape[1:]
    sums = weights.view(kv_heads, -1, keys) @ v.transpose(0, 1)
    return sums.view(heads, queries, head_dim).transpose(0, 1).contiguous()
