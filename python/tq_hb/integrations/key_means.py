"""Mean keys of a transformers model, measured on a text, and of a first prefill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from tq_hb.integrations.calibration import Calibration
from tq_hb.options import invalid

MIN_PREFILL = 256
"""Fewest tokens of a first prefill that ``k_mean="prefill"`` takes the mean over: fewer say little about the rest."""

CALIBRATION_PIECE = 256
"""Tokens that `calibrate` runs at a time, each such piece at positions of its own."""

Model: TypeAlias = Any


def calibrate(
    model: Model,
    tokens: torch.Tensor,
    *,
    context: int | None = None,
    name: str = "",
    text_sha256: str = "",
    on_tokens: Callable[[int], object] | None = None,
) -> tuple[Calibration, tuple[float | None, ...]]:
    """Measure a model's mean key per layer and KV head on a text.

    RoPE turns a part of every key with its position, and the mean with it: one taken over the first thousand positions
    can be worse than none at the eight thousandth. So the text is run in pieces of `CALIBRATION_PIECE` tokens, spread
    evenly over the positions of a whole context. What turns within it averages out, and what is left holds anywhere in
    it. A layer gets a mean only if that over every other piece brings the keys of the pieces between closer to zero.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model, in eval mode, whatever its attention implementation.
    tokens : torch.Tensor, shape (1, tokens), integer
        The text: at least four pieces. Any kind of text will do; a thousand tokens are few, ten thousand plenty.
    context : int, optional
        Positions that the means shall hold for. Default: the model's longest, ``config.max_position_embeddings``. If
        you know that you need fewer, say so: the means are then worth more.
    name, text_sha256 : str
        Kept in the calibration, for people.
    on_tokens : callable, optional
        Told after each piece how many more tokens are done, of those that fill whole pieces.

    Returns
    -------
    calibration : Calibration
    residuals : tuple of float or None
        Per layer the share of the keys' energy that is left after the subtraction, |k - mean|^2 / |k|^2, in the pieces
        that the mean is not from. Layers from 1 on are not centred; None for layers without keys of their own.

    Raises
    ------
    tq_hb.InvalidArgument
        If the text is too short, or the context is shorter than a piece or longer than the model's.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from tq_hb.integrations.transformers import TqCache, calibrate
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    >>> model = LlamaForCausalLM(config).eval()
    >>> calibration, residuals = calibrate(model, torch.arange(1024)[None] % 64)
    >>> cache = TqCache(config, k_mean=calibration)
    """
    op, piece = "calibrate", CALIBRATION_PIECE
    if tokens.ndim != 2 or tokens.shape[0] != 1 or tokens.shape[1] < 4 * piece:
        raise invalid(op, "tokens", f"must have shape (1, at least {4 * piece})", tuple(tokens.shape))
    config = model.config.get_text_config(decoder=True)
    count = tokens.shape[1] // piece
    longest = getattr(config, "max_position_embeddings", None) or count * piece
    positions = longest if context is None else context
    if not piece <= positions <= longest:
        raise invalid(op, "context", f"must be from {piece} to {longest}", positions)
    halves = [[_KeySums() for _ in range(config.num_hidden_layers)] for _ in range(2)]
    for index in range(count):
        first = index * (positions - piece) // (count - 1)
        with torch.no_grad():
            # The logits of one token, since those of all would take most of the time and of the memory.
            model(
                tokens[:, index * piece : (index + 1) * piece],
                position_ids=torch.arange(first, first + piece, device=tokens.device)[None],
                cache=Cache(layers=[_KeyRecorder(sums) for sums in halves[index % 2]]),
                logits_to_keep=1,
            )
        if on_tokens is not None:
            on_tokens(piece)
    residuals = tuple(_residual(even, odd) for even, odd in zip(*halves, strict=True))
    k_means = tuple(
        _overall_mean(even, odd).numpy() if residual is not None and residual < 1 else None
        for even, odd, residual in zip(*halves, residuals, strict=True)
    )
    return Calibration(k_means, config.model_type, name, count * piece, positions, text_sha256), residuals


def prefill_mean(keys: torch.Tensor) -> torch.Tensor | None:
    """Return the mean over the tokens of a first prefill, or None if that of the first half does not fit the second.

    Parameters
    ----------
    keys : torch.Tensor, shape (tokens, kv_heads, head_dim)

    Raises
    ------
    tq_hb.InvalidArgument
        If there are fewer than `MIN_PREFILL` tokens.

    Examples
    --------
    >>> import torch
    >>> from tq_hb.integrations.key_means import prefill_mean
    >>> prefill_mean(torch.ones(300, 2, 64)).shape
    torch.Size([2, 64])
    >>> prefill_mean(torch.cat([torch.ones(150, 2, 64), -torch.ones(150, 2, 64)])) is None
    True
    """
    if len(keys) < MIN_PREFILL:
        rule = f"must have a first prefill of at least {MIN_PREFILL} tokens"
        raise invalid("TqCache", "k_mean='prefill'", rule, len(keys))
    first, second = _KeySums(), _KeySums()
    half = len(keys) // 2
    first.add(keys[:half])
    second.add(keys[half:])
    if second.energy_around(first.mean()) >= second.energy:
        return None
    return _overall_mean(first, second)


class _KeySums:
    """Sums over tokens of one layer's keys, (kv_heads, head_dim), and of their squared norms."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Any = 0.0
        self.energy: float = 0.0

    def add(self, keys: torch.Tensor) -> None:
        """Take in keys of shape (tokens, kv_heads, head_dim)."""
        exact = keys.detach().double().cpu()
        self.count += len(exact)
        self.total = self.total + exact.sum(dim=0)
        self.energy += exact.square().sum().item()

    def mean(self) -> torch.Tensor:
        mean: torch.Tensor = self.total / self.count
        return mean

    def energy_around(self, center: torch.Tensor) -> float:
        """Return the sum of the keys' squared distances from a mean key."""
        cross: float = (self.total * center).sum().item()
        square: float = center.square().sum().item()
        return self.energy - 2 * cross + self.count * square


def _residual(first: _KeySums, second: _KeySums) -> float | None:
    """Return what share of each part's energy the mean of the other leaves; None without keys."""
    if not first.count:
        return None
    energy = first.energy + second.energy
    left = second.energy_around(first.mean()) + first.energy_around(second.mean())
    return float(left / energy) if energy else 1.0


def _overall_mean(first: _KeySums, second: _KeySums) -> torch.Tensor:
    mean: torch.Tensor = (first.total + second.total) / (first.count + second.count)
    return mean.float()


class _KeyRecorder(CacheLayerMixin):  # type: ignore[misc]
    """A cache layer that keeps nothing but sums of the keys: for one forward pass over a whole text."""

    is_sliding = False
    is_croppable = False

    def __init__(self, sums: _KeySums) -> None:
        super().__init__()
        self.is_initialized = True
        self._sums = sums

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._sums.add(key_states[0].transpose(0, 1))
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1
