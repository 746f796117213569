"""What a quantised KV cache does to a model's predictions, by replaying a fixed text.

Every setting decodes the same tokens, whatever it would have chosen itself: after a first divergence, freely running
texts differ everywhere and say nothing about the cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache

from tq_hb.cli._gate_scores import Floats, Summary, score
from tq_hb.integrations.transformers import TqCache, enable

_TURN = 16
"""Tokens that a setting decodes before the next one's turn, so that a slow minute of the machine hits all alike."""

_TIMED_EVERY = 8
"""One step in so many runs the output layer too, as generating does, and is timed. It would double the time of all."""


@dataclass(frozen=True)
class Setting:
    """Bits per value of K and V; None is the library's own cache, in the model's full precision."""

    bits: tuple[int, int] | None

    def __str__(self) -> str:
        return "float32" if self.bits is None else "{}/{}".format(*self.bits)

    def make_cache(self, config: Any) -> Any:
        """Return an empty cache for a model."""
        if self.bits is None:
            return DynamicCache(config=config)
        k_bits, v_bits = self.bits
        return TqCache(config, k_bits=k_bits, v_bits=v_bits, packing="plane")


SETTINGS = (Setting(None), Setting((8, 8)), Setting((8, 6)), Setting((6, 6)), Setting((5, 5)))
"""The first is what the others are compared with."""


@dataclass(frozen=True)
class Result(Summary):
    """What one setting costs, beside what it changes."""

    setting: Setting
    bytes_per_token: int
    nbytes: int
    decode_ms: float
    decode_ms_quartiles: tuple[float, float]
    timed_steps: int
    kernels: tuple[str, ...]


def replay(model: Any, tokens: torch.Tensor, prefill: int, on_steps: Callable[[int], object]) -> list[Result]:
    """Decode a text token by token under every setting, and compare the predictions.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model in float32.
    tokens : torch.Tensor, shape (1, length)
        The text.
    prefill : int
        How many tokens go into the cache at once, in full precision, before the first is decoded.
    on_steps : callable
        Told after every turn how many more of `steps_in_all` are done.

    Returns
    -------
    list of Result
        In the order of `SETTINGS`. KL is that of a setting's next-token distribution from the full-precision cache's,
        over the whole vocabulary, in nats.
    """
    with torch.inference_mode():
        runs = [_Run(setting, model) for setting in SETTINGS]
        for run in runs:
            run.take_over()
            run.step(tokens[:, :prefill])
        # The last token has no successor to predict.
        for turn, positions in enumerate(_split(range(prefill, tokens.shape[1] - 1), _TURN)):
            for i in range(len(runs)):
                run = runs[(turn + i) % len(runs)]
                run.take_over()
                for position in positions:
                    run.decode(tokens[:, position : position + 1], timed=position % _TIMED_EVERY == 0)
                on_steps(len(positions))
        hidden = [run.hidden() for run in runs]
        scores = score(model, hidden[0], hidden, tokens[0, prefill + 1 :], on_steps)
        return [run.result(scored.summary()) for run, scored in zip(runs, scores, strict=True)]


def steps_in_all(length: int, prefill: int) -> int:
    """Return how many steps `replay` reports for a text: every setting decodes and scores each position."""
    return 2 * len(SETTINGS) * (length - 1 - prefill)


class _Run:
    """One setting's decode of the text."""

    def __init__(self, setting: Setting, model: Any) -> None:
        self._setting = setting
        self._model = model
        self._cache = setting.make_cache(model.config)
        self._hidden: list[torch.Tensor] = []
        self._times_ms: list[float] = []

    def take_over(self) -> None:
        """Make the model attend in this setting's way."""
        if self._setting.bits is None:
            self._model.set_attn_implementation("sdpa")
        else:
            enable(self._model)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run the model up to its output layer; the result has shape (tokens, hidden_size)."""
        hidden: torch.Tensor = self._model.model(tokens, cache=self._cache).last_hidden_state[0]
        return hidden

    def decode(self, token: torch.Tensor, *, timed: bool) -> None:
        begin = time.perf_counter()
        self._hidden.append(self.step(token))
        if timed:
            self._model.lm_head(self._hidden[-1])
            self._times_ms.append(1e3 * (time.perf_counter() - begin))

    def hidden(self) -> Floats:
        hidden: Floats = torch.cat(self._hidden).numpy()
        return hidden

    def result(self, summary: Summary) -> Result:
        lower, median, upper = statistics.quantiles(self._times_ms, n=4, method="inclusive")
        per_token, nbytes = self._size()
        return Result(
            **asdict(summary),
            setting=self._setting,
            bytes_per_token=per_token,
            nbytes=nbytes,
            decode_ms=median,
            decode_ms_quartiles=(lower, upper),
            timed_steps=len(self._times_ms),
            kernels=self._kernels(),
        )

    def _size(self) -> tuple[int, int]:
        """Return bytes per token held, and bytes allocated."""
        layers = self._cache.layers
        if self._setting.bits is None:
            sizes = [layer.keys.nbytes + layer.values.nbytes for layer in layers]
            per_token = sum(size // layer.keys.shape[2] for size, layer in zip(sizes, layers, strict=True))
            return per_token, sum(sizes)
        return self._cache.bytes_per_token, self._cache.nbytes

    def _kernels(self) -> tuple[str, ...]:
        """Return what attended to the codes, having made sure that every layer did."""
        if self._setting.bits is None:
            return ()
        plans = self._cache.last_plans
        if None in plans:
            raise RuntimeError(f"layer {plans.index(None)} never attended on codes")
        return tuple(sorted({kernel for plan in plans for kernel in plan.kernels}))


def _split(positions: range, size: int) -> Iterator[range]:
    return (positions[start : start + size] for start in range(0, len(positions), size))
