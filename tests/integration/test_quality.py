"""The measurements of quality: what is simulated is what the caches would do, and hard keys are hard."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parent))  # models
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench

from models import make_model, make_tokens  # noqa: E402
from transformers import DynamicCache  # noqa: E402

import tq_hb  # noqa: E402

quality = pytest.importorskip("bench.quality", reason="the benchmarks are not beside the tests")

from bench import hard_keys, quality_tables  # noqa: E402
from bench.formats import Blocks  # noqa: E402
from bench.rope import RotatingMean  # noqa: E402

from tq_hb.cli._gate_caches import Layer  # noqa: E402

LAYER = Layer(0, 2, 128, None)


def vectors(tokens=40, seed=0, mean=0.0):
    return (np.random.default_rng(seed).standard_normal((2, tokens, 2, 128)) + mean).astype(np.float32)


@pytest.mark.parametrize("mean", [None, np.full((2, 128), 3, np.float32)], ids=["plain", "mean"])
def test_a_simulated_cache_holds_what_a_cache_holds(mean):
    k, v = vectors(mean=3)
    simulated = quality.Simulated("6/6", 6, k_means=None if mean is None else (mean,)).make_cache(LAYER, None, 16)
    cache = tq_hb.KVCache(2, 128, k_bits=6, v_bits=6, k_mean=mean)
    simulated.append(*map(torch.from_numpy, (k, v)))
    cache.append(k, v)
    for got, want in zip(simulated.dequantize(), cache.dequantize(), strict=True):
        np.testing.assert_allclose(got.numpy(), want, atol=1e-5)


def test_other_signs_lose_as_much_on_random_vectors_and_something_else():
    k, v = vectors(400)
    errors = {}
    for seed in (0, 1):
        signs = None if seed == 0 else np.random.default_rng(1).choice(np.array([-1, 1], np.float32), 512)
        cache = quality.Simulated("6/6", 6, signs).make_cache(LAYER, None, 16)
        cache.append(*map(torch.from_numpy, (k, v)))
        errors[seed] = cache.dequantize()[0].numpy() - k
    nmse = {seed: np.sum(error**2) / np.sum(k**2) for seed, error in errors.items()}
    assert nmse[1] == pytest.approx(nmse[0], rel=0.05)
    assert np.abs(errors[1] - errors[0]).max() > 0.01


def test_a_turning_mean_is_asked_for_the_positions_that_come():
    seen = []

    def mean(positions):
        seen.append(positions.tolist())
        return np.zeros((len(positions), 2, 128), np.float32)

    cache = quality.Simulated("6/6", 6, k_means=(mean,), first_position=7).make_cache(LAYER, None, 16)
    k, v = map(torch.from_numpy, vectors(3))
    cache.append(k, v)
    cache.append(k[:2], v[:2])
    assert seen == [[7, 8, 9], [10, 11]]


@pytest.mark.parametrize("kind", ["llama-128", "gemma3"])
@pytest.mark.parametrize("first", [0, 700])
def test_a_mean_before_rope_turns_as_the_keys_do(kind, first):
    """With a bias that dwarfs the rest, the turned mean is nearly the key, at any position and in fast channels too."""
    model = make_model(kind, attention_bias=True)
    for layer in model.model.layers:
        generator = torch.Generator().manual_seed(3)
        layer.self_attn.k_proj.bias.data = 30 * torch.randn(layer.self_attn.k_proj.bias.shape, generator=generator)
    means = RotatingMean.measure(model, make_tokens(256), 64)
    states = DynamicCache()
    with torch.inference_mode():
        model(make_tokens(20, seed=9), cache=states, position_ids=first + torch.arange(20)[None])
    positions = np.arange(first, first + 20)
    for mean, layer in zip(means, states.layers, strict=True):
        keys = layer.keys[0].transpose(0, 1).numpy()
        assert np.sum((keys - mean.over(1)(positions)) ** 2) < 0.1 * np.sum(keys**2)
        # One mean for 256 positions leaves what turns fast, but nothing is added.
        assert 0.1 * np.sum(keys**2) < np.sum((keys - mean.over(256)(positions)) ** 2) < np.sum(keys**2)


def test_a_rotated_format_is_the_format_of_rotated_vectors():
    pytest.importorskip("gguf")
    x = vectors()[0]
    form = Blocks("q8_0")
    got = quality.rotated(quality.round_trip(form))(x)
    np.testing.assert_allclose(tq_hb.rotate(got), form.decode(*form.encode(tq_hb.rotate(x))), atol=1e-5)
    assert quality.bits_per_value(form, 128) == 8.5


def test_hard_keys_are_hard_until_they_are_centred():
    (plain, biased, turning) = (
        {(row["k_mean"], row["bits"]): row for row in hard_keys.measure(case)}
        for case in (hard_keys.synthetic(0, None), hard_keys.synthetic(1, None), hard_keys.synthetic(1, 60))
    )
    for bits in tq_hb.supported_bits():
        assert biased["none", bits]["nmse"] > 3 * plain["none", bits]["nmse"]
        assert biased["prefill", bits]["nmse"] == pytest.approx(plain["prefill", bits]["nmse"], rel=0.05)
        assert turning["prefill", bits]["nmse"] > 3 * plain["none", bits]["nmse"]
    assert (biased["none", 5]["holds"], plain["none", 8]["holds"]) == (False, True)
    assert biased["none", 8]["statistics"]["kurtosis"] > 20


def test_only_texts_that_every_setting_has_are_averaged():
    rows = [{"text": text, "setting": n} for text, count in (("a", 3), ("b", 2), ("c", 3)) for n in range(count)]
    assert quality_tables.complete_texts(rows) == {"a", "c"}


def test_tables_of_what_was_left_out_say_so():
    report = {"command": "python -m bench.quality --parts signs", "results": []}
    for _, make in quality_tables.TABLES.values():
        assert make(report) == "Not measured by `python -m bench.quality --parts signs`.\n"
