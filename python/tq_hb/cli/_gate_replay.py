"""Replays a text through a model with every layer's keys and values in caches of one setting, and measures.

The text is fixed: what a setting would have predicted changes nothing of what comes next. Each query attends through
the setting's cache to everything it sees, its own token and the first tokens included, as in decode; that many queries
go at a time only saves time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import CacheLayerMixin

from tq_hb.cli._gate_caches import Decoded, FloatCache, Layer, LayerCache, Setting, attention_weights, weigh
from tq_hb.integrations.transformers import CodesOnly, TqCache, enable

CHUNK = 256
"""Tokens that go through the model at a time. It sets nothing but the time taken and where "prefill" ends."""

SAMPLED_EVERY = 8
"""One query in so many has its attention compared with exact attention."""

Floats = npt.NDArray[np.float32]
OnTokens = Callable[[int], object]


@dataclass(frozen=True)
class Attention:
    """How attention came out, each of shape (layers, sampled positions).

    `cosine` is that of a position's outputs, all heads together, with exact attention on the same queries, keys and
    values; `variation` is the total variation between the attention weights of the two, mean over the heads;
    `run_cosine` compares with the reference's replay, so that it has in it what the layers before have done.
    """

    cosine: npt.NDArray[np.float64]
    variation: npt.NDArray[np.float64]
    run_cosine: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pass:
    """One setting's replay of a text: final hidden states (tokens, hidden_size), and what the layers did."""

    hidden: Floats
    attention: Attention
    bytes_per_token: float
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Reference:
    """The replay with float32 keys and values: hidden states, and per layer the outputs of the sampled queries."""

    hidden: Floats
    outputs: list[torch.Tensor]


def layers_of(model: Any) -> list[Layer]:
    """Return what each layer of a model has to cache; layers that use another one's keys and values are left out."""
    layers = [(i, layer.kv) for i, layer in enumerate(TqCache(model.config).layers) if hasattr(layer, "kv")]
    return [Layer(i, kv.num_kv_heads, kv.head_dim, kv.sliding_window) for i, kv in layers]


def replay_reference(
    model: Any, tokens: torch.Tensor, on_tokens: OnTokens, *, chunk: int = CHUNK, first_position: int = 0
) -> Reference:
    """Replay with keys and values as they are; the parameters are those of `replay`."""
    probes = [Outputs(layer, chunk) for layer in layers_of(model)]
    hidden = run_layers(model, tokens, probes, on_tokens, chunk, first_position)
    return Reference(hidden, [torch.cat(probe.outputs) for probe in probes])


def replay(
    model: Any,
    tokens: torch.Tensor,
    setting: Setting,
    reference: Reference,
    on_tokens: OnTokens,
    *,
    chunk: int = CHUNK,
    first_position: int = 0,
) -> Pass:
    """Replay with every layer's keys and values in `setting`'s caches.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model in float32.
    tokens : torch.Tensor, shape (1, length)
    setting : Setting
    reference : Reference
        `replay_reference` of the same text.
    on_tokens : callable
        Told how many more tokens have gone through.
    chunk : int
        Tokens that go through the model at a time.
    first_position : int
        What the model takes the first token's position to be.

    Raises
    ------
    RuntimeError
        If a layer did not attend on codes although the setting says so.
    """
    probes = [
        Probe(layer, partial(setting.make_cache, layer, chunk=chunk), chunk, outputs)
        for layer, outputs in zip(layers_of(model), reference.outputs, strict=True)
    ]
    hidden = run_layers(model, tokens, probes, on_tokens, chunk, first_position)
    return Pass(hidden, measured(probes), sum(p.kv.bytes_per_token for p in probes), kernels(setting, probes))


class Outputs:
    """A layer of the reference's replay: exact attention, of which it keeps the sampled outputs."""

    def __init__(self, layer: Layer, chunk: int) -> None:
        self.layer = layer
        self.kv: LayerCache = FloatCache(layer, chunk)
        self.sliding_window = layer.window
        self.seen = self.attended = 0
        self.outputs: list[torch.Tensor] = []

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.kv.append(k.float(), v.float())
        self.seen += len(k)

    def attend(self, q: torch.Tensor, **options: Any) -> torch.Tensor:
        """Attend; of layers that share the keys and values, the first one's outputs are kept."""
        output = self.kv.attend(q.float(), **options)
        if self.attended < self.seen:
            sampled = _sampled(self.seen - len(q), self.seen) - (self.seen - len(q))
            self.outputs.append(output[sampled].flatten(1))
            self.attended += len(q)
        return output.to(q.dtype)


class Probe(Outputs):
    """A layer's cache of the setting under test, beside the same keys and values as they are."""

    def __init__(
        self,
        layer: Layer,
        make_cache: Callable[[torch.Tensor], LayerCache],
        chunk: int,
        reference: torch.Tensor | None = None,
    ) -> None:
        super().__init__(layer, chunk)
        self._make_cache = make_cache
        self._exact = FloatCache(layer, chunk)
        self._reference = reference
        self._made = False
        self._cosine: list[torch.Tensor] = []
        self._variation: list[torch.Tensor] = []

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        if not self._made:
            self.kv, self._made = self._make_cache(k.float()), True
        self._exact.append(k.float(), v.float())
        super().append(k, v)

    def attend(self, q: torch.Tensor, **options: Any) -> torch.Tensor:
        """Attend as the reference does, and compare with exact attention."""
        is_first = self.attended < self.seen
        output = super().attend(q, **options)
        if is_first:
            self._compare(q.float(), self.outputs[-1], **options)
        return output

    def _compare(self, q: torch.Tensor, outputs: torch.Tensor, **options: Any) -> None:
        k, v = self._exact.dequantize()
        held = torch.as_tensor(self.kv.dequantize()[0])
        if len(held) != len(k):
            raise RuntimeError(f"layer {self.layer.index} holds {len(held)} tokens where {len(k)} were expected")
        sampled = _sampled(self.seen - len(q), self.seen)
        rows = sampled - (self.seen - len(k))
        weights, held_weights = (
            attention_weights(q[sampled - (self.seen - len(q))], keys, rows, window=self.sliding_window, **options)
            for keys in (k, held)
        )
        self._cosine.append(_cosine(outputs, weigh(weights, v).flatten(1)))
        self._variation.append((weights - held_weights).abs().double().sum(-1).mean(0) / 2)

    def cosine(self) -> npt.NDArray[np.float64]:
        return np.asarray(torch.cat(self._cosine))

    def variation(self) -> npt.NDArray[np.float64]:
        return np.asarray(torch.cat(self._variation))

    def run_cosine(self) -> npt.NDArray[np.float64]:
        if self._reference is None:
            return np.full(len(self.cosine()), np.nan)
        return np.asarray(_cosine(torch.cat(self.outputs), self._reference))


def measured(probes: Sequence[Probe]) -> Attention:
    """Return what the layers measured."""
    return Attention(
        np.stack([probe.cosine() for probe in probes]),
        np.stack([probe.variation() for probe in probes]),
        np.stack([probe.run_cosine() for probe in probes]),
    )


def kernels(setting: Setting, probes: Sequence[Probe]) -> tuple[str, ...]:
    """Return the kernels that attended, having made sure that each layer's every query did so as the setting says."""
    names: set[str] = set()
    for probe in probes:
        if probe.seen == 0 or probe.attended < probe.seen:
            raise RuntimeError(
                f"{setting.name}: layer {probe.layer.index} attended for {probe.attended} of {probe.seen} tokens"
            )
        plan = probe.kv.last_plan
        if setting.on_codes and plan is None:
            raise RuntimeError(f"{setting.name}: layer {probe.layer.index} never attended on codes")
        names.update(plan.kernels if plan is not None else ())
    return tuple(sorted(names))


class _ReplayLayer(CacheLayerMixin):  # type: ignore[misc]
    """transformers' layer protocol over an `Outputs` or `Probe`: keys and values go nowhere else."""

    def __init__(self, probe: Outputs) -> None:
        super().__init__()
        self.probe = probe
        self.is_initialized = True
        self.is_sliding = probe.sliding_window is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        self.probe.append(key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        codes = CodesOnly(self.probe)  # type: ignore[arg-type]
        return codes, codes

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        window = self.probe.sliding_window
        past = self.probe.seen if window is None else min(self.probe.seen, window - 1)
        return past + query_length, self.probe.seen - past

    def get_seq_length(self) -> int:
        return self.probe.seen

    def get_max_length(self) -> int:
        return -1 if self.probe.sliding_window is None else self.probe.sliding_window


def run_layers(
    model: Any,
    tokens: torch.Tensor,
    probes: Sequence[Outputs],
    on_tokens: OnTokens,
    chunk: int,
    first_position: int,
) -> Floats:
    """Return the final hidden states, every layer having used its probe."""
    enable(model)
    # What is left of this cache is what stands for layers that hold nothing.
    cache = TqCache(model.config)
    for probe in probes:
        cache.layers[probe.layer.index] = _ReplayLayer(probe)
    positions = torch.arange(first_position, first_position + tokens.shape[1])[None]
    hidden = []
    with torch.inference_mode():
        for piece, where in zip(tokens.split(chunk, dim=1), positions.split(chunk, dim=1), strict=True):
            states = model.base_model(piece, position_ids=where, cache=cache).last_hidden_state
            hidden.append(states[0].float())
            on_tokens(piece.shape[1])
    return np.asarray(torch.cat(hidden))


def _sampled(start: int, stop: int) -> torch.Tensor:
    """Return the positions from `start` to `stop` that are compared with exact attention."""
    first = start + (SAMPLED_EVERY - 1 - start) % SAMPLED_EVERY
    return torch.arange(min(first, stop), stop, SAMPLED_EVERY)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = a.double(), b.double()
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


FLOAT32 = Decoded()
"""Keys and values as they are."""
