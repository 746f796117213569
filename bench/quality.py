"""What other formats, a mean key and other signs do to a real model's predictions, by the replay of ``tq-hb gate``.

Two small models, three texts. tq_hb's own widths run on codes; the other formats' keys and values are encoded and
decoded as they come, and attended to in float32. Writes ``bench/results/quality.json`` and ``.png``.

It takes an hour of one core. A part of it that has been measured is kept in ``build/quality`` and not measured again.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its waiting threads would take the cores

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

import tq_hb
from bench import harness, plots, quality_tables
from bench.formats import RIVALS, Floats, Format
from bench.rope import RotatingMean
from tq_hb.cli._gate_caches import Decoded, FloatCache, Layer, Setting, Widths
from tq_hb.cli._gate_replay import replay, replay_reference
from tq_hb.cli._gate_scores import score
from tq_hb.cli._gate_texts import own_texts
from tq_hb.cli._models import LoadedModel, load
from tq_hb.integrations.calibration import Calibration
from tq_hb.integrations.key_means import CALIBRATION_PIECE
from tq_hb.integrations.transformers import calibrate

MODELS = ("smollm2-135m", "gemma-3-270m")
TEXTS = ("licence", "documentation", "code")
TOKENS = 640  # of a text: Gemma's window and a fourth of it
SCORED_EVERY = 2  # one prediction in so many is compared
SCORED_AT_ONCE = 5  # settings: they share the reference's predictions
SHORT_CONTEXT = 2048  # positions that the short calibration is for

OWN = ((8, 8), (8, 6), (6, 6), (5, 5))
COMPARED = ("FP8 E4M3", "q8_0", "q5_1", "affine 8, group 64", "affine 6, group 64")

SIGN_SEEDS = range(4)  # 0 is tq_hb's own table
FAR = {"smollm2-135m": 7_000, "gemma-3-270m": 16_000}  # a first position deep in the model's context
SPANS = (1, 64, 256)  # positions that share a mean, where it turns with them

_KEPT = harness.ROOT / "build" / "quality"


# -- texts, models, means ----------------------------------------------------------------------------------


def texts(name: str) -> dict[str, torch.Tensor]:
    """Return the tokens of the gate's three texts for a model: a licence, documentation, code."""
    return {text.name: text.tokens for text in own_texts(loaded(name).tokenizer, TOKENS)}


def calibration_text() -> str:
    """Return a text of a fourth kind, prose, that means are measured on."""
    data = Path(tq_hb.__file__).parent / "cli" / "data"
    return "\n\n".join((data / name).read_text() for name in ("replay.txt", "prompt.txt"))


@cache
def loaded(name: str) -> LoadedModel:
    """Return a model, loaded once."""
    return load(name, lambda step: print(f"{name}: {step}", flush=True))


@cache
def k_means(name: str, context: int | None = None) -> tuple[Any, ...]:
    """Return a model's mean keys for so many positions, None for its whole context; measured once and kept."""
    kept = _KEPT / f"k-mean-{name}-{context or 'whole'}.safetensors"
    if kept.exists():
        return Calibration.load(kept).k_means
    tokens = loaded(name).tokenizer(calibration_text(), return_tensors="pt").input_ids
    calibration, _ = calibrate(loaded(name).model, tokens, context=context, name=name)
    kept.parent.mkdir(parents=True, exist_ok=True)
    calibration.save(kept)
    return calibration.k_means


@cache
def turning_means(name: str) -> tuple[RotatingMean, ...]:
    """Return a model's mean keys before RoPE."""
    tokens = loaded(name).tokenizer(calibration_text(), return_tensors="pt").input_ids
    return RotatingMean.measure(loaded(name).model, tokens, CALIBRATION_PIECE)


# -- settings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Simulated:
    """tq_hb's codec, its results attended to in float32: for what the caches don't do."""

    name: str
    bits: int
    signs: Floats | None = None
    k_means: tuple[Any, ...] | None = None  # per layer: an array, None, or a function of positions
    first_position: int = 0
    on_codes: ClassVar[bool] = False

    def describe(self) -> dict[str, Any]:
        """Return what it is."""
        return {"name": self.name}

    def make_cache(self, layer: Layer, _first_keys: torch.Tensor, chunk: int) -> SimulatedCache:
        """Return an empty cache."""
        return SimulatedCache(self, layer, chunk)


class SimulatedCache(FloatCache):
    """A layer of a `Simulated` setting."""

    def __init__(self, setting: Simulated, layer: Layer, chunk: int) -> None:
        super().__init__(layer, chunk)
        mean = None if setting.k_means is None else setting.k_means[layer.index]
        self._bits, self._mean = setting.bits, mean
        # Other signs s in place of tq_hb's own t: R_s x = R_t (s t x).
        own = tq_hb.signs(layer.head_dim)
        self._flips = np.ones_like(own) if setting.signs is None else own * setting.signs[: layer.head_dim]
        self._next = setting.first_position

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Encode, decode and add tokens."""
        positions = np.arange(self._next, self._next + len(k))
        self._next += len(k)
        mean: Any = 0 if self._mean is None else self._mean(positions) if callable(self._mean) else self._mean
        k, v = (
            torch.from_numpy(self._lossy(x.numpy() - m) + m) for x, m in ((k, np.float32(mean)), (v, np.float32(0)))
        )
        super().append(k, v)

    def _lossy(self, x: Floats) -> Floats:
        codes, norms = tq_hb.quantize(x * self._flips, self._bits)
        decoded: Floats = tq_hb.dequantize(codes, norms, self._bits, head_dim=x.shape[-1]) * self._flips
        return decoded


def round_trip(form: Format) -> Callable[[Floats], Floats]:
    """Return what encoding and decoding makes of vectors."""
    return lambda x: form.decode(*form.encode(x))


def rotated(codec: Callable[[Floats], Floats]) -> Callable[[Floats], Floats]:
    """Return the same between a rotation and its inverse."""
    return lambda x: np.asarray(tq_hb.unrotate(codec(tq_hb.rotate(x))))


def bits_per_value(form: Format, head_dim: int) -> float:
    """Return what a value takes, scales included."""
    stored = form.encode(np.ones((64, head_dim), np.float32))
    return 8 * sum(part.nbytes for part in stored if part.size > 1) / (64 * head_dim)


def formats_part(name: str, _first: int) -> Iterator[tuple[dict[str, Any], Setting]]:
    """tq_hb's widths without and with means, and the other formats, plain and rotated."""
    for k_bits, v_bits in OWN:
        yield {"family": "tq_hb", "variant": "plain"}, Widths(k_bits, v_bits)
    for bits in (8, 6):
        yield {"family": "tq_hb", "variant": "short mean"}, Widths(bits, bits, k_mean=k_means(name, SHORT_CONTEXT))
    yield {"family": "tq_hb", "variant": "whole mean"}, Widths(6, 6, k_mean=k_means(name))
    yield {"family": "tq_hb", "variant": "prefill mean"}, Widths(6, 6, k_mean="prefill")
    head_dim = loaded(name).model.config.head_dim
    for form in (form for form in RIVALS if form.name in COMPARED):
        size = bits_per_value(form, head_dim)
        yield {"family": "other", "variant": "plain"}, Decoded(form.name, size, round_trip(form))
        if form.name != "FP8 E4M3":  # which a rotation harms
            yield {"family": "other", "variant": "rotated"}, Decoded(form.name, size, rotated(round_trip(form)))


def positions_part(name: str, first: int) -> Iterator[tuple[dict[str, Any], Setting]]:
    """Means for the first positions, for the whole context, and turning with the position, here or far away."""
    if first:  # at 0 they are among the formats
        yield {"variant": "plain"}, Widths(6, 6)
        yield {"variant": "short mean"}, Widths(6, 6, k_mean=k_means(name, SHORT_CONTEXT))
        yield {"variant": "whole mean"}, Widths(6, 6, k_mean=k_means(name))
    for span in SPANS:
        turning = tuple(mean.over(span) for mean in turning_means(name))
        yield {"variant": f"turning mean, {span}"}, Simulated("6/6", 6, k_means=turning, first_position=first)


def signs_part(name: str, _first: int) -> Iterator[tuple[dict[str, Any], Setting]]:
    """Other signs, without and with means."""
    for seed in SIGN_SEEDS:
        signs = None if seed == 0 else np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), 512)
        yield {"variant": "plain", "seed": seed}, Simulated("6/6", 6, signs)
        yield {"variant": "short mean", "seed": seed}, Simulated("6/6", 6, signs, k_means(name, SHORT_CONTEXT))


_PARTS = {"formats": formats_part, "positions": positions_part, "signs": signs_part}


# -- measuring ---------------------------------------------------------------------------------------------


def measure(
    name: str, text: str, settings: list[tuple[dict[str, Any], Setting]], first: int = 0
) -> Iterator[list[dict[str, Any]]]:
    """Replay a text under every setting, and yield the results of some at a time."""
    model, tokens = loaded(name).model, texts(name)[text]
    reference = replay_reference(model, tokens, _quiet, first_position=first)
    scored = slice(None, -1, SCORED_EVERY)
    for start in range(0, len(settings), SCORED_AT_ONCE):
        some = settings[start : start + SCORED_AT_ONCE]
        runs = [replay(model, tokens, setting, reference, _quiet, first_position=first) for _, setting in some]
        hidden = [run.hidden[scored] for run in runs]
        all_scores = score(model, reference.hidden[scored], hidden, tokens[0, 1:][scored])
        yield [
            {
                **tags,
                "setting": setting.name,
                "first_position": first,
                "bytes_per_token": run.bytes_per_token,
                "on_codes": setting.on_codes,
                "kernels": run.kernels,
                "layer_loss": [float(1 - cosine) for cosine in run.attention.cosine.mean(axis=1)],
                **asdict(scores.summary()),
            }
            for (tags, setting), run, scores in zip(some, runs, all_scores, strict=True)
        ]


def _quiet(_count: int) -> None:
    pass


@dataclass(frozen=True)
class Unit:
    """What is measured of one model on one text."""

    part: str
    model: str
    text: str
    first: int = 0

    def __str__(self) -> str:
        return f"{self.part}, {self.model}, {self.text} from {self.first}"

    @property
    def kept(self) -> Path:
        """The file of what has been measured of it."""
        return _KEPT / f"{self.part}-{self.model}-{self.text}-{self.first}.json"

    def run(self) -> None:
        """Measure what is missing."""
        rows = json.loads(self.kept.read_text()) if self.kept.exists() else []
        settings = list(_PARTS[self.part](self.model, self.first))[len(rows) :]
        if settings:
            for new in measure(self.model, self.text, settings, self.first):
                rows += [{"part": self.part, "model": self.model, "text": self.text, **row} for row in new]
                scratch = self.kept.with_suffix(".new")
                scratch.write_text(json.dumps(rows))
                scratch.rename(self.kept)
                print(f"{self}: {len(rows)}", flush=True)


UNITS = (
    *(Unit("formats", name, text) for name in MODELS for text in TEXTS),
    *(Unit("positions", name, "code", first) for name in MODELS for first in (0, FAR[name])),
    *(Unit("signs", name, "code") for name in MODELS),
)


def main() -> None:
    """Measure what is missing and write everything."""
    parser = harness.measuring_parser("bench.quality", __doc__)
    parser.add_argument("--parts", nargs="*", default=_PARTS, choices=_PARTS, help="default: all")
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS, help="default: both")

    def is_chosen(unit: Unit, args: argparse.Namespace) -> bool:
        return unit.part in args.parts and unit.model in args.models

    args = harness.parse(
        parser, is_partial=lambda args: not all(is_chosen(unit, args) or unit.kept.exists() for unit in UNITS)
    )
    torch.set_num_threads(1)
    tq_hb.set_num_threads(1)
    _KEPT.mkdir(parents=True, exist_ok=True)
    for unit in harness.track([unit for unit in UNITS if is_chosen(unit, args)]):
        unit.run()
    results = [row for unit in UNITS if unit.kept.exists() for row in json.loads(unit.kept.read_text())]
    harness.finish("quality", results, args.out, quality_tables.formats, quality_tables.gain, plot=plots.quality)


if __name__ == "__main__":
    harness.run("bench.quality", main)
