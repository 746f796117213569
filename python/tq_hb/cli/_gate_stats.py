"""The gates: what is measured of a setting, how sure it is, and which thresholds it meets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tq_hb.cli._gate_replay import SAMPLED_EVERY, Attention
from tq_hb.cli._gate_scores import Scores

Array = npt.NDArray[Any]
Verdict = Literal["pass", "fail", "open"]

CONFIDENCE = 0.95
RESAMPLES = 1000
BLOCK = 32
"""Tokens that are drawn together: what a codec does at neighbouring positions is alike."""


@dataclass(frozen=True)
class Figure:
    """A value with its confidence interval; one without an interval has None."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Limit:
    """What a figure may be: at most or at least `bound`, by its magnitude."""

    figure: str
    sign: Literal["<", ">"]
    bound: float

    def verdict(self, figure: Figure) -> Verdict:
        """Return whether the figure's whole interval meets the bound, none of it, or some."""
        ends = [abs(end) for end in (figure.value, figure.low, figure.high) if end is not None]
        if figure.low is not None and figure.high is not None and figure.low <= 0 <= figure.high:
            ends.append(0.0)
        met = [end < self.bound if self.sign == "<" else end > self.bound for end in (min(ends), max(ends))]
        return "pass" if all(met) else "open" if any(met) else "fail"

    def is_met(self, figure: Figure) -> bool:
        """Return whether the value itself meets the bound."""
        value = abs(figure.value)
        return value < self.bound if self.sign == "<" else value > self.bound


def in_all(verdicts: Iterable[Verdict]) -> Verdict:
    """Return "pass" if that is every verdict, "fail" if it is any, else "open"."""
    seen = set(verdicts)
    return "fail" if "fail" in seen else "open" if "open" in seen else "pass"


@dataclass(frozen=True)
class Gate:
    """A set of limits. `by_interval`: they have to hold for the whole confidence interval, not just the value."""

    name: str
    limits: tuple[Limit, ...]
    by_interval: bool

    def verdict(self, figures: Mapping[str, Figure]) -> Verdict:
        """Return "pass", "fail", or "open" where the intervals don't tell."""
        return in_all(limit.verdict(figures[limit.figure]) for limit in self.limits)

    def lets_through(self, figures: Mapping[str, Figure]) -> bool:
        """Return whether a setting may be shipped by this gate."""
        if self.by_interval:
            return self.verdict(figures) == "pass"
        return all(limit.is_met(figures[limit.figure]) for limit in self.limits)


# The thresholds that the system in whose format the codes are was measured with: attention outputs as its own replay
# has them, the share of changed argmaxes, and the change of the perplexity.
REFERENCE = Gate(
    "reference",
    (
        Limit("run_cosine_mean", ">", 0.999),
        Limit("run_cosine_p1", ">", 0.99),
        Limit("flips", "<", 0.01),
        Limit("perplexity_change", "<", 0.01),
    ),
    by_interval=False,
)
STRICT = Gate(
    "strict",
    (Limit("run_cosine_mean", ">", 0.9999), Limit("flips", "<", 0.005), Limit("perplexity_change", "<", 0.0115)),
    by_interval=False,
)
# Ours. A KL of 0.005 bounds the mean share of sampled tokens that come out differently by sqrt(0.005 / 2) = 5 %, and
# is below what it costs to round a model's weights to 6 bits (llama.cpp's figures for q6_K: 0.0057, for q8_0 0.0014).
# The 99th percentile keeps single positions from being ruined behind a good mean: sqrt(0.05 / 2) = 16 %.
OURS = Gate("KL", (Limit("kl_mean", "<", 0.005), Limit("kl_p99", "<", 0.05), Limit("needles_lost", "<", 0.5)), True)
GATES = (REFERENCE, STRICT, OURS)

# What is known without a model's predictions, of captured queries, keys and values.
CAPTURED = Gate("cosine", (Limit("cosine_mean", ">", 0.999), Limit("cosine_p1", ">", 0.99)), by_interval=False)
CAPTURED_STRICT = Gate("strict cosine", (Limit("cosine_mean", ">", 0.9999),), by_interval=False)


def prediction_figures(scores: Scores) -> dict[str, Figure]:
    """Return how one text's predictions diverge, how many argmaxes change, and what becomes of the perplexity."""
    change = scores.nll - scores.reference_nll
    return {
        "kl_mean": bootstrap(scores.kl, _mean, BLOCK),
        "kl_p99": bootstrap(scores.kl, _percentile(99), BLOCK),
        "flips": bootstrap(~scores.same_top1, _mean, BLOCK),
        "perplexity_change": bootstrap(change, lambda x: np.expm1(_mean(x)), BLOCK),
        "perplexity": Figure(float(np.exp(scores.nll.mean()))),
        "reference_perplexity": Figure(float(np.exp(scores.reference_nll.mean()))),
    }


def attention_figures(attention: Attention) -> dict[str, Figure]:
    """Return how one text's attention came out, all layers together, on the same inputs and as the replay has it."""
    block = BLOCK // SAMPLED_EVERY
    figures = {"variation_mean": bootstrap(attention.variation.mean(axis=0), _mean, block)}
    kinds = {"cosine": attention.cosine, "run_cosine": attention.run_cosine}
    for name, cosine in kinds.items():
        if np.isnan(cosine).any():
            continue
        figures |= {
            f"{name}_mean": bootstrap(cosine.mean(axis=0), _mean, block),
            f"{name}_p1": bootstrap(cosine.T, _percentile(1), block),
            f"{name}_min": Figure(float(cosine.min())),
        }
    return figures


def layer_figures(attention: Attention) -> list[dict[str, float]]:
    """Return per layer what attention on the same inputs came to."""
    return [
        {
            "cosine_mean": float(cosine.mean()),
            "cosine_p1": float(np.percentile(cosine, 1)),
            "cosine_min": float(cosine.min()),
            "variation_mean": float(variation.mean()),
        }
        for cosine, variation in zip(attention.cosine, attention.variation, strict=True)
    ]


def layer_errors(texts: Mapping[str, Sequence[Mapping[str, float]]]) -> list[float]:
    """Return per layer one minus the mean cosine, mean of the texts, of each one's `layer_figures`."""
    errors = [[1 - layer["cosine_mean"] for layer in layers] for layers in texts.values()]
    return [float(error) for error in np.mean(errors, axis=0)]


def bootstrap(values: Array, statistic: Callable[[Array], Array], block: int) -> Figure:
    """Return a statistic with its interval, from resamples that draw `block` neighbours at a time.

    Parameters
    ----------
    values : array, shape (positions,) or (positions, ...)
    statistic : callable
        Of an array with one more axis in front, over all but that one.
    block : int
        Positions that are drawn together, around the end to the beginning.
    """
    picked = values[_draws(len(values), min(block, len(values)))]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(statistic(picked), [tail, 100 - tail])
    return Figure(float(statistic(values[None])[0]), float(low), float(high))


@cache
def _draws(length: int, block: int) -> npt.NDArray[np.int64]:
    """Return positions, shape (RESAMPLES, length): the same ones for all settings, so that these stay comparable."""
    rng = np.random.default_rng(length)
    starts = rng.integers(length, size=(RESAMPLES, -(-length // block), 1))
    return ((starts + np.arange(block)) % length).reshape(RESAMPLES, -1)[:, :length]


def _mean(values: Array) -> Array:
    return np.asarray(values.reshape(len(values), -1).mean(axis=1))


def _percentile(percent: float) -> Callable[[Array], Array]:
    def of(values: Array) -> Array:
        return np.asarray(np.percentile(values.reshape(len(values), -1), percent, axis=1))

    return of


def worst(figures: Sequence[Mapping[str, Figure]], name: str) -> Figure:
    """Return the text's figure that is furthest from what it is without a codec."""
    have = [each[name] for each in figures if name in each]
    pick = min if "cosine" in name else max
    return pick(have, key=lambda figure: abs(figure.value))
