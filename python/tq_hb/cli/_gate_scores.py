"""Compares the predictions of a replay with the reference's, over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# A block of logits of this shape stays in the processor's caches, through all the steps done on it.
_ROWS = 256
_TOKENS = 8192

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Summary:
    """What predictions come to, KL in nats."""

    mean_kl: float
    mean_kl_standard_error: float
    p99_kl: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    predictions: int


@dataclass(frozen=True)
class Scores:
    """A setting's predictions of every next token against the reference's, each of shape (predictions,).

    `nll` is the negative logarithm of the probability of the token that follows, in nats. `right` tells where that
    token is the likeliest one.
    """

    kl: npt.NDArray[np.float64]
    same_top1: npt.NDArray[np.bool_]
    nll: npt.NDArray[np.float64]
    reference_nll: npt.NDArray[np.float64]
    right: npt.NDArray[np.bool_]
    reference_right: npt.NDArray[np.bool_]

    def summary(self) -> Summary:
        """Return what they come to; the standard error takes positions for independent."""
        return Summary(
            mean_kl=float(self.kl.mean()),
            mean_kl_standard_error=float(self.kl.std(ddof=1) / np.sqrt(len(self.kl))),
            p99_kl=float(np.quantile(self.kl, 0.99)),
            top1_agreement=float(self.same_top1.mean()),
            perplexity=float(np.exp(self.nll.mean())),
            reference_perplexity=float(np.exp(self.reference_nll.mean())),
            predictions=len(self.kl),
        )


def score(
    model: Any,
    reference: Floats,
    passes: Sequence[Floats],
    targets: torch.Tensor,
    on_predictions: Callable[[int], object] = lambda _: None,
) -> list[Scores]:
    """Compare predictions with the reference's.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its output layer makes the predictions.
    reference : array, shape (predictions, hidden_size)
        Final hidden states of the reference.
    passes : sequence of arrays of that shape
        Those of the settings.
    targets : torch.Tensor, shape (predictions,)
        The tokens that follow.
    on_predictions : callable
        Told how many more predictions of a setting have been made.
    """
    head = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    blocks: list[list[Scores]] = [[] for _ in passes]
    with torch.inference_mode():
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, min(start + _ROWS, len(targets)))
            states = [torch.from_numpy(hidden[rows]) for hidden in (reference, *passes)]
            for block, scores in zip(blocks, _score_rows(head, softcap, states, targets[rows]), strict=True):
                block.append(scores)
            on_predictions((rows.stop - start) * len(passes))
    return [
        Scores(*(np.concatenate([getattr(part, field.name) for part in block]) for field in fields(Scores)))
        for block in blocks
    ]


def _score_rows(head: Any, softcap: float | None, states: list[torch.Tensor], targets: torch.Tensor) -> list[Scores]:
    """Score one block of rows, a slice of the vocabulary at a time; the first of `states` is the reference."""
    reference, *others = (_Logits(head, softcap, hidden, targets) for hidden in states)
    weights = _Weights(len(targets))
    divergences = [_Divergence(weights) for _ in others]
    for start in range(0, len(head.weight), _TOKENS):
        tokens = slice(start, min(start + _TOKENS, len(head.weight)))
        wanted = reference.of(tokens)
        weights.take(wanted)
        for logits, divergence in zip(others, divergences, strict=True):
            divergence.add(wanted, logits.of(tokens))
    return [
        Scores(
            kl=divergence.kl().numpy(),
            same_top1=(logits.top == reference.top).numpy(),
            nll=(weights.log_sum() + divergence.log_normaliser() - logits.target).numpy(),
            reference_nll=(weights.log_sum() - reference.target).numpy(),
            right=(logits.top == targets).numpy(),
            reference_right=(reference.top == targets).numpy(),
        )
        for logits, divergence in zip(others, divergences, strict=True)
    ]


class _Logits:
    """The logits of some rows, a slice of the vocabulary at a time, and what has been seen of them."""

    def __init__(self, head: Any, softcap: float | None, hidden: torch.Tensor, targets: torch.Tensor) -> None:
        self._head, self._softcap, self._hidden, self._targets = head, softcap, hidden, targets
        self._buffer = torch.empty(len(hidden), _TOKENS)
        self._highest = torch.full((len(hidden),), -torch.inf)
        self.top = torch.zeros(len(hidden), dtype=torch.long)
        self.target = torch.zeros(len(hidden), dtype=torch.float64)

    def of(self, tokens: slice) -> torch.Tensor:
        logits = self._buffer[:, : tokens.stop - tokens.start]
        torch.matmul(self._hidden, self._head.weight[tokens].T, out=logits)
        if self._head.bias is not None:
            logits += self._head.bias[tokens]
        if self._softcap is not None:
            logits.div_(self._softcap).tanh_().mul_(self._softcap)
        highest, where = logits.max(dim=1)
        # The first of equals, as argmax has it.
        better = highest > self._highest
        self.top[better] = where[better] + tokens.start
        self._highest = torch.maximum(highest, self._highest)
        inside = (self._targets >= tokens.start) & (self._targets < tokens.stop)
        self.target[inside] = logits[inside, self._targets[inside] - tokens.start].double()
        return logits


class _Weights:
    """The reference's probabilities, a slice of the vocabulary at a time, short of a factor that is known at the end.

    They are relative to the likeliest token so far; what was summed up before has to be multiplied by `rescale`.
    """

    def __init__(self, rows: int) -> None:
        self._highest = torch.full((rows,), -torch.inf)
        self._buffer = torch.empty(rows, _TOKENS)
        self.total = torch.zeros(rows, dtype=torch.float64)

    def take(self, wanted: torch.Tensor) -> None:
        highest = torch.maximum(self._highest, wanted.amax(dim=1))
        self.rescale = (self._highest - highest).double().exp()
        self._highest = highest
        self.values = self._buffer[:, : wanted.shape[1]]
        torch.sub(wanted, highest[:, None], out=self.values).exp_()
        self.total = self.total * self.rescale + self.values.sum(dim=1)

    def log_sum(self) -> torch.Tensor:
        """Return the logarithm of the sum of the exponentials of the logits."""
        return self._highest.double() + self.total.log()


class _Divergence:
    """The sums that make KL(reference || other) of some rows.

    They are of the difference d of the logits: KL = log(sum p exp(d)) - sum p d. The difference of float32
    log-probabilities of hundreds of thousands of tokens would leave little of a KL of 1e-4.
    """

    def __init__(self, weights: _Weights) -> None:
        self._weights = weights
        rows = len(weights.total)
        self._sums = torch.zeros(2, rows, dtype=torch.float64)
        self._grown = torch.empty(rows, _TOKENS)

    def add(self, wanted: torch.Tensor, logits: torch.Tensor) -> None:
        """Take the slice of both that the weights have taken; `logits` is overwritten."""
        grown = self._grown[:, : wanted.shape[1]]
        difference = logits.sub_(wanted)
        torch.expm1(difference, out=grown)
        self._sums *= self._weights.rescale
        self._sums += torch.stack([torch.linalg.vecdot(self._weights.values, x) for x in (grown, difference)])

    def log_normaliser(self) -> torch.Tensor:
        """Return by how much the logarithm of the other's sum of exponentials is larger."""
        return torch.log1p(self._sums[0] / self._weights.total)

    def kl(self) -> torch.Tensor:
        return self.log_normaliser() - self._sums[1] / self._weights.total
