"""A mean key before RoPE, and what RoPE makes of it at a position: for measuring what that would be worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class RotatingMean:
    """One layer's mean key before RoPE, (kv_heads, head_dim), and the angles by which a position turns it."""

    mean: torch.Tensor
    angles: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def measure(cls, model: Any, tokens: torch.Tensor, piece: int) -> tuple[RotatingMean, ...]:
        """Average the keys of every layer, turned back to position 0, over whole pieces of a text."""
        config, rotary = model.config, model.base_model.rotary_emb
        kinds = set(getattr(config, "layer_types", None) or ())
        several = len(kinds) > 1 and "rope_theta" not in config.rope_parameters
        sums: list[Any] = [0] * config.num_hidden_layers
        count = 0
        angles = [_angles(rotary, config.layer_types[i] if several else None) for i in range(len(sums))]
        for part in tokens[:, : tokens.shape[1] // piece * piece].split(piece, dim=1):
            states = DynamicCache()
            with torch.inference_mode():
                model.base_model(part, cache=states)
            for i, layer in enumerate(states.layers):
                cos, sin = angles[i](torch.arange(piece))
                keys = layer.keys[0]
                sums[i] = sums[i] + (keys * cos - _turn_quarter(keys) * sin).double().sum(dim=1)
            count += piece
        return tuple(cls((total / count).float(), turn) for total, turn in zip(sums, angles, strict=True))

    def over(self, span: int) -> Callable[[NDArray[np.int64]], Floats]:
        """Return the mean, (tokens, kv_heads, head_dim), at positions of which `span` in a row share one."""

        def at(positions: NDArray[np.int64]) -> Floats:
            blocks, which = np.unique(positions // span, return_inverse=True)
            cos, sin = self.angles(torch.from_numpy((blocks[:, None] * span + np.arange(span)).ravel()))
            turned = self.mean[:, None] * cos + _turn_quarter(self.mean)[:, None] * sin
            shared: Floats = turned.unflatten(1, (len(blocks), span)).mean(dim=2).numpy()
            return np.ascontiguousarray(shared[:, which].transpose(1, 0, 2))

        return at


def _angles(rotary: Any, kind: str | None) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return a function from positions to the cosines and sines of the angles, (tokens, head_dim)."""

    def at(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        like = torch.zeros(1)
        cos, sin = rotary(like, positions[None]) if kind is None else rotary(like, positions[None], kind)
        return cos[0], sin[0]

    return at


def _turn_quarter(x: torch.Tensor) -> torch.Tensor:
    """Turn every pair of channels i, i + head_dim / 2 by a quarter."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
