"""Measures settings on texts or on a capture, keeping what is done, and finds the smallest one that passes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np

import tq_hb
from tq_hb.cli._gate_caches import WIDEST, Layer, Widths
from tq_hb.cli._gate_capture import Capture, measure_capture
from tq_hb.cli._gate_replay import CHUNK, SAMPLED_EVERY, Attention, Pass, layers_of, replay, replay_reference
from tq_hb.cli._gate_scores import Scores, score
from tq_hb.cli._gate_stats import (
    CAPTURED,
    CAPTURED_STRICT,
    GATES,
    OURS,
    Figure,
    Gate,
    Verdict,
    attention_figures,
    in_all,
    layer_errors,
    layer_figures,
    prediction_figures,
    worst,
)
from tq_hb.cli._gate_store import Arrays, Store
from tq_hb.cli._gate_texts import Text
from tq_hb.cli._models import LoadedModel
from tq_hb.integrations.calibration import Calibration
from tq_hb.integrations.transformers import TqCache

_TRIED_WITH_EXCEPTIONS = 2
"""Settings just below the smallest one that passes that are tried with a few layers at the widest."""

_MOST_EXCEPTIONS = 4
"""One layer in so many may be an exception."""


@dataclass(frozen=True)
class Measured:
    """What one setting came to on one text. `scores` is None for a capture; `needles` tells each depth's answer."""

    text: str
    attention: Attention
    scores: Scores | None
    needles: tuple[bool, ...] | None
    reference_needles: tuple[bool, ...] | None
    bytes_per_token: float
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """One setting's figures, per text and the worst of them, and what the gates say."""

    setting: Widths
    bytes_per_token: float
    kernels: tuple[str, ...]
    texts: dict[str, dict[str, Figure]]
    layers: dict[str, list[dict[str, float]]]
    needles: tuple[bool, ...] | None
    reference_needles: tuple[bool, ...] | None
    gates: tuple[Gate, ...]

    def worst(self) -> dict[str, Figure]:
        """Return each figure on the text where it is worst."""
        every = list(self.texts.values())
        return {name: worst(every, name) for name in every[0]}

    def error(self) -> float:
        """Return the mean KL, or without predictions one minus the mean cosine, on the worst text."""
        figures = self.worst()
        return figures["kl_mean"].value if "kl_mean" in figures else 1 - figures["cosine_mean"].value

    def verdict(self, gate: Gate) -> Verdict:
        """Return the gate's verdict on all texts together."""
        return in_all(gate.verdict(figures) for figures in self.texts.values())

    def is_let_through(self, gate: Gate) -> bool:
        """Return whether the gate lets it through on every text."""
        return all(gate.lets_through(figures) for figures in self.texts.values())


class Job:
    """What is measured: a model on texts, or a capture. `measure` gives a setting's outcome, from the store or anew."""

    gates: tuple[Gate, ...] = GATES
    layers: Sequence[Layer]
    identity: str

    def steps(self, settings: Sequence[Widths]) -> int:
        """Return how many steps `measure` reports at most."""
        raise NotImplementedError

    def measure(self, settings: Sequence[Widths], on_step: Callable[[str, int], object]) -> list[Outcome]:
        """Measure settings; `on_step` is told what is being done, and how many more steps are."""
        raise NotImplementedError

    def check_means(self, calibration: Calibration) -> None:
        """Raise `tq_hb.InvalidArgument` if a calibration is not of what is measured."""
        raise NotImplementedError

    @property
    def primary(self) -> Gate:
        """The gate that exceptions are sought for."""
        return self.gates[-1]


class ModelJob(Job):
    """A model on texts, of which the last may be the needle text."""

    def __init__(self, loaded: LoadedModel, texts: Sequence[Text], store: Store) -> None:
        self._model, self._texts, self._store = loaded.model, texts, store
        self.layers = layers_of(loaded.model)
        self.identity = model_digest(loaded.model)

    def steps(self, settings: Sequence[Widths]) -> int:
        replayed = sum(text.tokens.shape[1] for text in self._texts) * (1 + len(settings))
        return int(replayed + sum(len(_scored_rows(text)) for text in self._texts) * len(settings))

    def measure(self, settings: Sequence[Widths], on_step: Callable[[str, int], object]) -> list[Outcome]:
        per_text = [self._measure_text(text, settings, on_step) for text in self._texts]
        return [
            _outcome(setting, [results[i] for results in per_text], self.gates) for i, setting in enumerate(settings)
        ]

    def check_means(self, calibration: Calibration) -> None:
        TqCache(self._model.config, k_mean=calibration)

    def _measure_text(
        self, text: Text, settings: Sequence[Widths], on_step: Callable[[str, int], object]
    ) -> list[Measured]:
        keys = [self._key(text, setting) for setting in settings]
        stored = [self._store.load({**key, "stage": "scores"}) for key in keys]
        missing = [i for i, arrays in enumerate(stored) if arrays is None]
        if missing:
            reference = replay_reference(self._model, text.tokens, partial(on_step, f"{text.name}, float32"))
            passes = []
            for i in missing:
                name = f"{text.name}, {settings[i].name}"
                arrays = self._store.load({**keys[i], "stage": "pass"})
                if arrays is None:
                    done = replay(self._model, text.tokens, settings[i], reference, partial(on_step, name))
                    arrays = _pass_arrays(done)
                    self._store.save({**keys[i], "stage": "pass"}, arrays)
                passes.append(arrays)
            rows = _scored_rows(text)
            scores = score(
                self._model,
                reference.hidden[rows],
                [arrays["hidden"][rows] for arrays in passes],
                text.tokens[0, rows + 1],
                partial(on_step, f"{text.name}, scoring"),
            )
            for i, arrays, scored in zip(missing, passes, scores, strict=True):
                kept = {name: array for name, array in arrays.items() if name != "hidden"}
                kept |= {field.name: getattr(scored, field.name) for field in fields(Scores)}
                self._store.save({**keys[i], "stage": "scores"}, kept)
                self._store.drop({**keys[i], "stage": "pass"})
                stored[i] = kept
        return [_measured(text, arrays) for arrays in stored if arrays is not None]

    def _key(self, text: Text, setting: Widths) -> dict[str, Any]:
        return {
            "model": self.identity,
            "text": text.sha256,
            "answers": text.answers,
            "setting": setting.describe(),
            "chunk": CHUNK,
            "sampled_every": SAMPLED_EVERY,
        }


class CaptureJob(Job):
    """Captured queries, keys and values: attention alone."""

    gates = (CAPTURED_STRICT, CAPTURED)

    def __init__(self, captured: Capture, store: Store) -> None:
        self._captured, self._store = captured, store
        self.layers = [given.layer for given in captured.layers]
        self.identity = captured.sha256

    def steps(self, settings: Sequence[Widths]) -> int:
        return len(settings) * sum(len(given.q) for given in self._captured.layers)

    def measure(self, settings: Sequence[Widths], on_step: Callable[[str, int], object]) -> list[Outcome]:
        return [_outcome(setting, [self._measure(setting, on_step)], self.gates) for setting in settings]

    def check_means(self, calibration: Calibration) -> None:
        means = calibration.k_means
        if len(means) != len(self.layers):
            raise tq_hb.InvalidArgument(f"k_means must be for {len(self.layers)} captured layers, got {len(means)}")
        for layer, mean in zip(self.layers, means, strict=True):
            shape = (layer.kv_heads, layer.head_dim)
            if mean is not None and mean.shape != shape:
                raise tq_hb.InvalidArgument(f"k_means[{layer.index}] must have shape {shape}, got {mean.shape}")

    def _measure(self, setting: Widths, on_step: Callable[[str, int], object]) -> Measured:
        key = {"capture": self.identity, "setting": setting.describe(), "chunk": CHUNK, "sampled_every": SAMPLED_EVERY}
        arrays = self._store.load(key)
        if arrays is None:
            attention, nbytes, names = measure_capture(self._captured, setting, partial(on_step, setting.name))
            arrays = _attention_arrays(attention, nbytes, names)
            self._store.save(key, arrays)
        return _measured_attention("captured", arrays)


def with_worst_layers_excepted(job: Job, outcomes: Sequence[Outcome]) -> Iterator[Widths]:
    """Return the settings just below the smallest one that passes, each with its worst layers as exceptions.

    The layers are those whose attention outputs are furthest from exact ones on the same inputs. Only settings whose
    exceptions leave them smaller than the smallest one are returned.
    """
    best = smallest(outcomes, job.primary)
    if best is None:
        return
    below = [o for o in outcomes if o.bytes_per_token < best.bytes_per_token and not o.setting.exceptions]
    below.sort(key=lambda o: (-o.bytes_per_token, o.error()))
    allowed = len(job.layers) // _MOST_EXCEPTIONS
    for outcome in below[:_TRIED_WITH_EXCEPTIONS]:
        worst_first = np.argsort(-np.array(layer_errors(outcome.layers)), kind="stable")
        exceptions = [job.layers[i] for i in worst_first[:allowed]]
        more_bits = 2 * WIDEST - outcome.setting.k_bits - outcome.setting.v_bits
        more_bytes = sum(layer.kv_heads * layer.head_dim * more_bits / 8 for layer in exceptions)
        if exceptions and outcome.bytes_per_token + more_bytes < best.bytes_per_token:
            yield replace(outcome.setting, exceptions=tuple(sorted(layer.index for layer in exceptions)))


def smallest(outcomes: Sequence[Outcome], gate: Gate) -> Outcome | None:
    """Return the outcome of fewest bytes that a gate lets through; of equal ones, that of the least error."""
    passing = [outcome for outcome in outcomes if outcome.is_let_through(gate)]
    return min(passing, key=lambda o: (o.bytes_per_token, o.error()), default=None)


def model_digest(model: Any) -> str:
    """Return a digest of a model's configuration and weights."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().cpu().numpy().data)
    return digest.hexdigest()


def _scored_rows(text: Text) -> Any:
    """Return the positions whose predictions are compared: all, or those before a token of an answer."""
    if not text.answers:
        return np.arange(text.tokens.shape[1] - 1)
    return np.array([position - 1 for answer in text.answers for position in answer])


def _attention_arrays(attention: Attention, nbytes: float, kernels: Sequence[str]) -> Arrays:
    return {**asdict(attention), "bytes_per_token": np.array(nbytes), "kernels": np.array(kernels, dtype=str)}


def _pass_arrays(done: Pass) -> Arrays:
    return {"hidden": done.hidden, **_attention_arrays(done.attention, done.bytes_per_token, done.kernels)}


def _measured_attention(text: str, arrays: Arrays) -> Measured:
    attention = Attention(**{field.name: arrays[field.name] for field in fields(Attention)})
    names = tuple(str(name) for name in arrays["kernels"])
    return Measured(text, attention, None, None, None, float(arrays["bytes_per_token"]), names)


def _measured(text: Text, arrays: Arrays) -> Measured:
    attention = _measured_attention(text.name, arrays)
    scores = Scores(**{field.name: arrays[field.name] for field in fields(Scores)})
    if not text.answers:
        return replace(attention, scores=scores)
    found, wanted = (_answered(text, right) for right in (scores.right, scores.reference_right))
    return replace(attention, needles=found, reference_needles=wanted)


def _answered(text: Text, right: Any) -> tuple[bool, ...]:
    """Return which answers have every token right."""
    ends = np.cumsum([len(answer) for answer in text.answers])[:-1]
    return tuple(bool(part.all()) for part in np.split(right, ends))


def _outcome(setting: Widths, measured: Sequence[Measured], gates: tuple[Gate, ...]) -> Outcome:
    needles = next((m for m in measured if m.needles is not None), None)
    lost: dict[str, Figure] = {}
    if OURS in gates:
        pairs = zip(needles.needles or (), needles.reference_needles or (), strict=True) if needles else ()
        lost = {"needles_lost": Figure(float(sum(wanted and not found for found, wanted in pairs)))}
    texts = {
        m.text: {**attention_figures(m.attention), **(prediction_figures(m.scores) if m.scores else {}), **lost}
        for m in measured
        if m.needles is None
    }
    return Outcome(
        setting,
        measured[0].bytes_per_token,
        measured[0].kernels,
        texts,
        {m.text: layer_figures(m.attention) for m in measured if m.needles is None},
        needles.needles if needles else None,
        needles.reference_needles if needles else None,
        gates,
    )
