"""Where 5, 6 and 8 bits hold on keys that are hard to encode, without and with a mean key.

Synthetic keys have the statistics reported for Qwen2's models, one or two channels with a bias thirty times the rest,
which RoPE leaves where they are or turns with the position. Real ones are those of Gemma 3 270M's full layers. All
attention is on codes. Writes ``bench/results/hard_keys.json``.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its waiting threads would take the cores

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

import tq_hb
from bench import harness, quality, quality_tables
from bench.formats import Floats
from tq_hb.cli._gate_caches import FloatCache, Layer, attention_weights, weigh
from tq_hb.cli._gate_replay import replay, replay_reference
from tq_hb.cli._gate_texts import own_texts

TOKENS = 1024
MEASURED_FROM = 256  # the tokens before are what the mean of a prefill is taken from
BIAS = 30
SHAPE = {"heads": 4, "kv_heads": 2, "head_dim": 128}
PERIODS = {"slow": 6_000, "fast": 60}  # positions in which RoPE turns the biased channels once
GATE = {"mean": 0.999, "p1": 0.99}  # the reference system's gate A, of the cosine with exact attention

REAL_MODEL = "gemma-3-270m"


@dataclass(frozen=True)
class Case:
    """Queries (tokens, heads, D), keys and values (tokens, kv_heads, D), float32; means to try, by name."""

    name: str
    q: Floats
    k: Floats
    v: Floats
    scale: float | None = None
    means: dict[str, Floats | None] = field(default_factory=dict)


def synthetic(channels: int, period: int | None, seed: int = 0) -> Case:
    """Return unit normal values, and a bias on some channels of the keys; `period` None: RoPE leaves it."""
    rng = np.random.default_rng(seed)
    heads, kv_heads, head_dim = SHAPE["heads"], SHAPE["kv_heads"], SHAPE["head_dim"]
    q = 2 * rng.standard_normal((TOKENS, heads, head_dim), dtype=np.float32)  # scores spread as a model's do
    k, v = rng.standard_normal((2, TOKENS, kv_heads, head_dim), dtype=np.float32)
    for channel in range(7, 7 + channels):
        k[:, :, channel] += BIAS
        if period is not None:
            angles = 2 * np.pi * np.arange(TOKENS) / period
            _turn(q, channel, angles)
            _turn(k, channel, angles)
    kind = "no bias" if not channels else f"{channels} biased"
    motion = "" if not channels else ", constant" if period is None else f", turning once in {period} positions"
    return Case(kind + motion, q, k, v)


def _turn(x: Floats, channel: int, angles: npt.NDArray[np.float64]) -> None:
    """Turn one pair of channels of every token in place, as RoPE does."""
    pair = x[..., channel], x[..., channel + x.shape[-1] // 2]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    x[..., channel], x[..., channel + x.shape[-1] // 2] = pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin


@dataclass
class Recorder:
    """A setting that changes nothing and keeps each layer's queries, keys and values."""

    name: str = "recorded"
    on_codes: ClassVar[bool] = False
    caches: dict[int, RecordingCache] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return nothing that results depend on."""
        return {}

    def make_cache(self, layer: Layer, _first_keys: torch.Tensor, chunk: int) -> RecordingCache:
        """Return an empty cache."""
        self.caches[layer.index] = RecordingCache(layer, chunk)
        return self.caches[layer.index]


class RecordingCache(FloatCache):
    """A layer of a `Recorder`."""

    def __init__(self, layer: Layer, chunk: int) -> None:
        super().__init__(layer, chunk)
        self.queries: list[torch.Tensor] = []
        self.scale: float | None = None

    def attend(self, q: torch.Tensor, *, scale: float | None, softcap: float, sinks: Any) -> torch.Tensor:
        """Attend the newest tokens."""
        self.queries.append(q.clone())
        self.scale = scale
        return super().attend(q, scale=scale, softcap=softcap, sinks=sinks)


def real() -> list[Case]:
    """Return what Gemma's full layers attend with on the text that is code."""
    loaded, means = quality.loaded(REAL_MODEL), quality.k_means(REAL_MODEL)
    tokens = own_texts(loaded.tokenizer, TOKENS)[-1].tokens
    recorder = Recorder()
    replay(loaded.model, tokens, recorder, replay_reference(loaded.model, tokens, lambda _: None), lambda _: None)
    cases = []
    for layer, cache in recorder.caches.items():
        if cache.sliding_window is None:
            k, v = (x.numpy() for x in cache.dequantize())
            q = torch.cat(cache.queries).numpy()
            cases.append(Case(f"layer {layer}", q, k, v, cache.scale, {"calibrated": means[layer]}))
    return cases


def statistics(k: Floats) -> dict[str, float]:
    """Return what makes keys hard: long rows, few channels that have most of it, the same in every row."""
    rows = k.reshape(-1, k.shape[-1]).astype(float)
    centred = rows - rows.mean()
    return {
        "row_norm": float(np.linalg.norm(rows, axis=1).mean()),
        "kurtosis": float((centred**4).mean() / (centred**2).mean() ** 2),
        "mean_energy": float(np.sum(k.mean(axis=0, dtype=float) ** 2) * len(k) / np.sum(k.astype(float) ** 2)),
    }


def measure(case: Case) -> list[dict[str, Any]]:
    """Compare attention on the codes with exact attention, at every width, without and with a mean."""
    q, k, v = (torch.from_numpy(x) for x in (case.q, case.k, case.v))
    options: dict[str, Any] = {"window": None, "scale": case.scale, "softcap": 0.0, "sinks": None}
    want = weigh(attention_weights(q, k, torch.arange(TOKENS), **options), v).numpy()[MEASURED_FROM:]
    means = {"none": None, "prefill": case.k[:MEASURED_FROM].mean(axis=0, dtype=float).astype(np.float32)} | case.means
    results = []
    for mean_name, mean in means.items():
        if mean_name != "none" and mean is None:
            continue
        for bits in tq_hb.supported_bits():
            cache = tq_hb.KVCache(k.shape[1], k.shape[2], k_bits=bits, v_bits=bits, packing="plane", k_mean=mean)
            cache.append(case.k, case.v)
            got = cache.attend(case.q, scale=case.scale)[MEASURED_FROM:]
            a, b = (x.reshape(len(x), -1).astype(float) for x in (got, want))
            cosine = np.sum(a * b, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
            loss = {"mean": float(cosine.mean()), "p1": float(np.quantile(cosine, 0.01))}
            results.append(
                {
                    "case": case.name,
                    "k_mean": mean_name,
                    "bits": bits,
                    "nmse": float(np.sum((a - b) ** 2) / np.sum(b**2)),
                }
                | {"cosine": loss, "holds": all(loss[name] >= least for name, least in GATE.items())}
                | {"statistics": statistics(case.k), "kernels": cache.last_plan.kernels if cache.last_plan else ()}
            )
    return results


def main() -> None:
    """Measure and write."""
    parser = harness.measuring_parser("bench.hard_keys", __doc__)
    parser.add_argument("--no-model", action="store_true", help="synthetic keys only")
    args = harness.parse(parser, is_partial=lambda args: args.no_model)
    torch.set_num_threads(1)
    cases = [synthetic(0, None)]
    cases += [synthetic(channels, period) for channels in (1, 2) for period in (None, *PERIODS.values())]
    if not args.no_model:
        cases += real()
    results = [row for case in harness.track(cases, lambda case: case.name) for row in measure(case)]
    harness.finish("hard_keys", results, args.out, quality_tables.hard_synthetic, quality_tables.hard_real)


if __name__ == "__main__":
    harness.run("bench.hard_keys", main)
