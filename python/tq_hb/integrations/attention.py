"""The attention and mask functions that transformers models call once `enable` has named them."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tq_hb import KVCache, UnsupportedError
from tq_hb.options import invalid

ATTENTION_NAME = "tq_hb"
"""What the attention and mask functions are registered as, for ``attn_implementation=``."""

_UNSUPPORTED = ("position_bias", "sinks", "indices", "block_indices")
"""Keywords of transformers' attention functions that change the result, and are not supported."""

_HIDING = -1e4
"""An additive mask hides a key by at most this; a number between it and 0 is a bias."""


class CodesOnly:
    """Stands in for the keys and values of a decode step, which exist as codes only.

    Only this module's attention function can use it. Anything else that touches it, say another attention
    implementation, gets an error instead of a wrong result.

    >>> from tq_hb import KVCache
    >>> from tq_hb.integrations.transformers import CodesOnly
    >>> CodesOnly(KVCache(1, 256)).shape  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tq_hb.UnsupportedError: TqCache: attn_implementation must be 'tq_hb' ...
    """

    def __init__(self, kv: KVCache) -> None:
        self.kv = kv

    def __getattr__(self, name: str) -> NoReturn:
        # Python's own protocols (copy, pickle, numpy) probe for optional methods and expect an AttributeError.
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    @classmethod
    def __torch_function__(cls, *_args: Any, **_kwargs: Any) -> NoReturn:
        cls._refuse()

    @staticmethod
    def _refuse() -> NoReturn:
        raise UnsupportedError(
            f"TqCache: attn_implementation must be {ATTENTION_NAME!r} (call "
            "tq_hb.integrations.transformers.enable on the model), got a model that attends in another way"
        )


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' attention functions do, on codes where `TqLayer.update` gave `CodesOnly`.

    Parameters
    ----------
    module : torch.nn.Module
        The attention layer.
    query : torch.Tensor, shape (batch, heads, queries, head_dim)
    key, value : torch.Tensor, shape (batch, kv_heads, keys, head_dim), or CodesOnly
    attention_mask : torch.Tensor, shape (batch, 1, queries, keys), optional
        True or 0 for keys that are seen. None: as `is_causal` says.
    scaling : float, optional
        Multiplies the scores. Default ``head_dim ** -0.5``.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)``.
    s_aux : torch.Tensor, shape (heads,), optional
        Attention sinks: one more logit per head in the softmax, as GPT-OSS has them.
    dropout : float
        Share of the weights that are dropped.
    is_causal : bool, optional
        Without a mask: whether a query sees keys up to its own place, or all. Default: what the layer says, or True.

    Returns
    -------
    tuple of torch.Tensor, shape (batch, queries, heads, head_dim), and None (attention weights are not kept)

    Raises
    ------
    tq_hb.UnsupportedError
        For position biases, sparse attention and sinks per query; on codes also for dropout, for a mask that is not the
        causal one, and for several queries that are not causal.
    tq_hb.InvalidArgument
        If the mask is of another kind.

    Examples
    --------
    >>> import torch
    >>> from tq_hb.integrations.transformers import attention
    >>> q, k, v = torch.zeros(1, 4, 1, 256), torch.ones(1, 2, 3, 256), torch.ones(1, 2, 3, 256)
    >>> module = torch.nn.Module()
    >>> module.num_key_value_groups, module.is_causal = 2, True
    >>> out, _ = attention(module, q, k, v, None)
    >>> out.shape, float(out.mean())
    (torch.Size([1, 1, 4, 256]), 1.0)
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"attention: {name} is not supported, got {type(module).__name__} with it")
    if key is None:
        raise UnsupportedError(
            "attention: key must be what the cache's update returned, got None (a TqCache can't serve cross attention)"
        )
    if attention_mask is not None and not _is_mask(attention_mask):
        got = getattr(attention_mask, "dtype", type(attention_mask).__name__)
        raise invalid("attention", "attention_mask", "must be a tensor of bool or of a floating type", got)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if isinstance(key, CodesOnly):
        if dropout:
            raise UnsupportedError(f"attention: dropout must be 0 on a TqCache, got {dropout}")
        return _attend_on_codes(key.kv, query, attention_mask, is_causal, scaling, softcap, s_aux), None
    if softcap or s_aux is not None:
        if attention_mask is None and is_causal:
            attention_mask = _causal_mask(query, key)
        # As in the models' own attention, only a layer in training drops weights.
        dropout = dropout if module.training else 0.0
        return _attend_in_full(query, key, value, attention_mask, scaling, softcap, s_aux, dropout), None
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return output, None


def _attend_on_codes(
    kv: KVCache,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    queries = query.shape[2]
    if mask is None and queries > 1 and not is_causal:
        raise UnsupportedError(f"attention: is_causal must be True for several queries on a TqCache, got {queries}")
    if mask is not None and not _is_causal(mask, queries, kv.sliding_window):
        raise UnsupportedError("attention: attention_mask must be causal on a TqCache, got one that hides other keys")
    output: torch.Tensor = kv.attend(
        query[0].transpose(0, 1).detach(),
        scale=scale,
        softcap=softcap or 0.0,
        sinks=None if sinks is None else sinks.detach(),
    )
    return output[None]


def _attend_in_full(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Attend in full precision with a softcap or sinks, which torch's fused attention lacks."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(len(scores), -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.nn.functional.dropout(scores.softmax(dim=-1)[..., : key.shape[2]], dropout)
    output: torch.Tensor = weights.to(value.dtype) @ value
    return output.transpose(1, 2).contiguous()


def _causal_mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Return what `is_causal` means to torch's fused attention, which transformers leaves masks out for.

    One query sees everything. Several are the first tokens: keys beyond theirs are a static cache's empty places.
    """
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril() if queries > 1 else None


def make_mask(*, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Make the mask that `attention` takes, as transformers' mask functions do.

    Without a mask function of its own, an attention function gets no mask at all, and sliding-window layers silently
    see beyond their window.

    Raises
    ------
    tq_hb.UnsupportedError
        If `attention_mask`, shape (batch, tokens), marks padding.

    Examples
    --------
    >>> import torch
    >>> from tq_hb.integrations.transformers import make_mask
    >>> make_mask(attention_mask=torch.tensor([[0, 1, 1]]))
    Traceback (most recent call last):
    tq_hb.UnsupportedError: make_mask: attention_mask must not mark padding, got one that hides 1 tokens
    """
    if attention_mask is not None and not attention_mask.all():
        hidden = int((attention_mask == 0).sum())
        raise UnsupportedError(f"make_mask: attention_mask must not mark padding, got one that hides {hidden} tokens")
    mask: torch.Tensor | None = sdpa_mask(attention_mask=attention_mask, **kwargs)
    return mask


def _is_mask(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and (mask.dtype == torch.bool or mask.is_floating_point())


def _is_causal(mask: torch.Tensor, queries: int, window: int | None) -> bool:
    """Tell whether the queries, being the newest tokens, see just what the cache shows them."""
    if mask.shape[-2] != queries:
        return False
    keys = mask.shape[-1]
    wanted = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    if window is not None:
        wanted = wanted.triu(keys - queries - window + 1)
    if mask.dtype == torch.bool:
        return bool((mask == wanted).all())
    return bool(torch.where(wanted, mask == 0, mask <= _HIDING).all())


AttentionInterface.register(ATTENTION_NAME, attention)
AttentionMaskInterface.register(ATTENTION_NAME, make_mask)
