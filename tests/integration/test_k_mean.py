"""Mean keys: measured on a model, kept in a file, taken by the transformers adapter, and worth it."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parent))  # models

from models import make_config, make_model, make_tokens  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from transformers import DynamicCache  # noqa: E402

import tq_hb  # noqa: E402
from tq_hb.integrations import calibration as file_module  # noqa: E402
from tq_hb.integrations import key_means  # noqa: E402
from tq_hb.integrations.calibration import Calibration  # noqa: E402
from tq_hb.integrations.key_means import CALIBRATION_PIECE, MIN_PREFILL, prefill_mean  # noqa: E402
from tq_hb.integrations.transformers import TqCache, calibrate, enable  # noqa: E402

SLOW, FAST = 127, 0  # channels of a head dimension of 128 that RoPE turns least and most


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def make_biased(channel: int = SLOW, kind: str = "llama-128", **changes):
    """A model with a large constant in one channel of every key before RoPE, as Qwen2's biases make it."""
    model = make_model(kind, num_hidden_layers=2, attention_bias=True, **changes)
    for layer in model.model.layers:
        bias = layer.self_attn.k_proj.bias
        bias.zero_()
        bias.view(-1, layer.self_attn.head_dim)[:, channel] = 30.0
    return model


def keys_of(model, tokens, first=0):
    """Every layer's keys after RoPE, (tokens, kv_heads, head_dim)."""
    cache = DynamicCache(config=model.config)
    model(tokens, cache=cache, position_ids=first + torch.arange(tokens.shape[1])[None])
    return [layer.keys[0].transpose(0, 1) for layer in cache.layers]


def divergence(model, tokens, prefill, **options):
    """KL from the model's own predictions, of those decoded after a prefill."""
    model.set_attn_implementation("eager")
    want = model(tokens, use_cache=False).logits[0, prefill:].double().log_softmax(-1)
    enable(model)
    cache = TqCache(model.config, rollback=tokens.shape[1], **options)
    model(tokens[:, :prefill], cache=cache)
    got = model(tokens[:, prefill:], cache=cache).logits[0].double().log_softmax(-1)
    assert None not in cache.last_plans
    return (want.exp() * (want - got)).sum(-1).mean().item()


# --- measuring -----------------------------------------------------------------------------------


def test_calibrate_gives_the_mean_of_the_keys_at_the_pieces_positions():
    model, tokens = make_biased(), make_tokens(4 * CALIBRATION_PIECE + 7)
    seen = []
    calibration, residuals = calibrate(model, tokens, context=1024, name="a model", on_tokens=seen.append)
    assert seen == [CALIBRATION_PIECE] * 4
    pieces = tokens[:, : 4 * CALIBRATION_PIECE].split(CALIBRATION_PIECE, dim=1)
    keys = [keys_of(model, piece, first) for piece, first in zip(pieces, (0, 256, 512, 768), strict=True)]
    for layer, (mean, residual) in enumerate(zip(calibration.k_means, residuals, strict=True)):
        every = torch.cat([piece[layer] for piece in keys]).double()
        np.testing.assert_allclose(mean, every.mean(0), atol=1e-4)
        halves = [torch.cat([piece[layer] for piece in keys[i::2]]).double() for i in (0, 1)]
        left = sum((a - b.mean(0)).square().sum() for a, b in (halves, halves[::-1]))
        assert residual == pytest.approx((left / every.square().sum()).item(), rel=1e-6)
        assert residual < 0.5
    assert (calibration.model_type, calibration.model, calibration.tokens, calibration.context) == (
        "llama",
        "a model",
        1024,
        1024,
    )


def test_calibrate_spreads_the_pieces_over_the_context(monkeypatch):
    model = make_biased()
    firsts = []
    forward = model.model.rotary_emb.forward
    monkeypatch.setattr(
        model.model.rotary_emb,
        "forward",
        lambda x, position_ids: firsts.append(position_ids) or forward(x, position_ids),
    )
    calibrate(model, make_tokens(4 * CALIBRATION_PIECE), context=2000)
    assert [int(ids[0, 0]) for ids in firsts] == [0, 581, 1162, 1744]
    assert int(firsts[-1][0, -1]) == 1999


def test_what_turns_with_the_position_is_not_centred():
    tokens = make_tokens(4 * CALIBRATION_PIECE)
    calibration, residuals = calibrate(make_biased(FAST), tokens)
    slow, _ = calibrate(make_biased(SLOW), tokens)
    for fast_mean, residual, slow_mean in zip(calibration.k_means, residuals, slow.k_means, strict=True):
        assert residual > 0.9
        assert fast_mean is None or np.abs(fast_mean).max() < 3
        assert slow_mean[0, SLOW] == pytest.approx(30, abs=3)


def test_a_layer_whose_mean_does_not_carry_over_is_left_out():
    """The second half of the pieces has the opposite bias."""
    model = make_biased()
    signs = iter([1, -1, 1, -1])

    def flip(*_):
        model.model.layers[1].self_attn.k_proj.bias.fill_(0)[SLOW] = 30.0 * next(signs)

    model.register_forward_pre_hook(flip)
    calibration, residuals = calibrate(model, make_tokens(4 * CALIBRATION_PIECE))
    assert calibration.k_means[1] is None
    assert residuals[1] > 1 > residuals[0]
    assert calibration.k_means[0] is not None


def test_calibrate_works_with_shared_keys_and_sliding_windows():
    calibration, residuals = calibrate(make_model("gemma4"), make_tokens(4 * CALIBRATION_PIECE))
    assert residuals[4:] == (None, None)
    assert None not in residuals[:4]
    head_dims = [256, 256, 512, 256, None, None]
    assert all(mean is None or mean.shape == (1, d) for mean, d in zip(calibration.k_means, head_dims, strict=True))
    TqCache(make_config("gemma4"), k_mean=calibration)


@pytest.mark.parametrize(
    ("tokens", "context", "message"),
    [
        (1023, None, r"calibrate: tokens must have shape \(1, at least 1024\), got \(1, 1023\)"),
        (1024, 255, r"calibrate: context must be from 256 to 2048, got 255"),
        (1024, 2049, r"calibrate: context must be from 256 to 2048, got 2049"),
    ],
)
def test_calibrate_refuses_what_it_cannot_do(tokens, context, message):
    with pytest.raises(tq_hb.InvalidArgument, match=message):
        calibrate(make_biased(), make_tokens(tokens), context=context)


# --- what it is worth ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "channel", "at_least"), [("llama-128", SLOW, 3), ("gemma2", 255, 1.5)])
def test_centring_takes_the_loss_of_a_biased_channel_away(kind, channel, at_least):
    """Gemma 2's softcap does see a constant added to all keys, so that one has to be given back before it."""
    model = make_biased(channel, kind)
    means, _ = calibrate(model, make_tokens(4 * CALIBRATION_PIECE, seed=3))
    tokens = make_tokens(320)
    plain = divergence(model, tokens, 260, k_bits=5)
    calibrated = divergence(model, tokens, 260, k_bits=5, k_mean=means)
    of_prefill = divergence(model, tokens, 260, k_bits=5, k_mean="prefill")
    assert calibrated < plain / at_least
    assert of_prefill < plain / at_least


# --- every way to say it -------------------------------------------------------------------------


def test_all_forms_of_the_argument_mean_the_same(tmp_path):
    config = make_config("llama-128", num_hidden_layers=3)
    mean = np.random.default_rng(0).standard_normal((1, 128)).astype(np.float32)
    calibration = Calibration((None, mean, None), "llama")
    calibration.save(tmp_path / "means.safetensors")
    forms = [
        calibration,
        tmp_path / "means.safetensors",
        str(tmp_path / "means.safetensors"),
        [None, mean, None],
        (None, torch.from_numpy(mean), None),
        {1: mean},
        {1: torch.from_numpy(mean).double()},
    ]
    for form in forms:
        first, second, third = TqCache(config, k_mean=form).k_means
        assert first is None is third
        np.testing.assert_array_equal(second, mean)
    assert TqCache(config).k_means == (None, None, None)


@pytest.mark.parametrize(
    ("k_mean", "message"),
    [
        ([np.ones((1, 128)), np.ones((2, 128))], r"k_mean of layer 1 must have shape \(1, 128\), got \(2, 128\)"),
        ({1: np.ones(128)}, r"k_mean of layer 1 must have shape \(1, 128\), got \(128,\)"),
        ({0: 3.0}, r"k_mean of layer 0 must have shape \(1, 128\), got \(\)"),
        ([None], r"k_mean must be for the model's 2 layers, got 1"),
        ({2: np.ones((1, 128))}, r"k_mean must be for layers 0 to 1, got one for 2"),
        ({"a": None}, r"k_mean must be for layers 0 to 1, got one for 'a'"),
        (7, r"k_mean must be a Calibration or its path, .* got int"),
        (Calibration((None,), "llama"), r"k_mean must be for the model's 2 layers, got 1"),
        (Calibration((None, None), "gemma2"), r"k_mean must be of a model of type 'llama', got one of 'gemma2'"),
        ("prefil", r"TqCache: k_mean must be 'prefill' or the path of .*, got 'prefil' \(it isn't there\)"),
        ([np.full((1, 128), np.nan), None], r"k_mean must be finite"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_wrong_means_are_refused(k_mean, message):
    with pytest.raises(tq_hb.InvalidArgument, match=message):
        TqCache(make_config("llama-128", num_hidden_layers=2), k_mean=k_mean)


def test_layers_that_hold_no_keys_take_no_mean():
    with pytest.raises(tq_hb.InvalidArgument, match="k_mean must be None for layer 5, which holds no keys"):
        TqCache(make_config("gemma4"), k_mean={5: np.ones((1, 512))})


# --- the mean of a prefill -----------------------------------------------------------------------


def test_the_mean_of_a_prefill_is_taken_once_and_again_after_a_reset():
    model = make_biased()
    enable(model)
    cache = TqCache(model.config, k_mean="prefill")
    tokens = make_tokens(MIN_PREFILL + 20)
    model(tokens[:, :MIN_PREFILL], cache=cache)
    before = cache.k_means
    for mean, keys in zip(before, keys_of(model, tokens[:, :MIN_PREFILL]), strict=True):
        np.testing.assert_allclose(mean, keys.double().mean(0), atol=1e-4)
    branch = copy.deepcopy(cache)
    model(tokens[:, MIN_PREFILL:], cache=cache)
    assert all(np.array_equal(a, b) for a, b in zip(before, cache.k_means, strict=True))
    assert branch.get_seq_length() == MIN_PREFILL
    cache.reset()
    model(make_tokens(MIN_PREFILL, seed=5), cache=cache)
    assert not np.array_equal(cache.k_means[0], before[0])
    assert np.array_equal(branch.k_means[0], before[0])


def test_a_prefill_that_is_too_short_is_refused_and_nothing_is_held():
    model = make_biased()
    enable(model)
    cache = TqCache(model.config, k_mean="prefill")
    with pytest.raises(tq_hb.InvalidArgument, match="must have a first prefill of at least 256 tokens, got 255"):
        model(make_tokens(MIN_PREFILL - 1), cache=cache)
    assert cache.get_seq_length() == 0
    assert cache.k_means == (None, None)


@pytest.mark.parametrize("count", [256, 257])
def test_a_prefill_whose_halves_differ_is_not_centred(count):
    keys = torch.randn(count, 2, 64)
    assert prefill_mean(keys + 1) is not None
    keys[: count // 2] += 1
    keys[count // 2 :] -= 1
    assert prefill_mean(keys) is None


# --- the file ------------------------------------------------------------------------------------


def write(path, arrays=None, **metadata):
    defaults = {"format": "tq_hb.k_mean", "version": "1", "layers": "2", "tokens": "9", "context": "9"}
    arrays = {"layer.1.k_mean": np.ones((1, 64), np.float32)} if arrays is None else arrays
    save_file(arrays, path, {k: v for k, v in (defaults | metadata).items() if v is not None})
    return path


def test_a_file_keeps_everything(tmp_path):
    mean = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    saved = Calibration((mean, None, mean[::-1]), "llama", "a model", 1024, 4096, "ab" * 32)
    saved.save(tmp_path / "means")
    loaded = Calibration.load(tmp_path / "means")
    assert loaded.k_means[1] is None
    for i in (0, 2):
        np.testing.assert_array_equal(loaded.k_means[i], saved.k_means[i])
    fields = [field.name for field in dataclasses.fields(Calibration) if field.name != "k_means"]
    assert [getattr(loaded, name) for name in fields] == [getattr(saved, name) for name in fields]
    assert (tmp_path / "means").stat().st_size < 3 * mean.nbytes + 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": None}, "its format is None"),
        ({"format": "pt"}, "its format is 'pt'"),
        ({"version": "2"}, "its version is '2'"),
        ({"layers": None}, "its layers is ''"),
        ({"layers": "-1"}, "its layers is '-1'"),
        ({"layers": "999999999"}, "its layers is 999999999"),
        ({"tokens": "many"}, "its tokens is 'many'"),
        ({"layers": "1"}, "it has a tensor 'layer.1.k_mean' for 1 layers"),
        ({"arrays": {"mean": np.ones((1, 64), np.float32)}}, "it has a tensor 'mean' for 2 layers"),
        ({"arrays": {"layer.1.k_mean": np.ones((1, 64))}}, r"k_means\[1\] must be None or a float32 array"),
        ({"arrays": {"layer.0.k_mean": np.ones(64, np.float32)}}, r"k_means\[0\] must be .* got float32 \(64,\)"),
        ({"arrays": {"layer.0.k_mean": np.full((1, 64), np.inf, np.float32)}}, r"k_means\[0\] must be finite, got inf"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(f"{k}" for k in value),
)
def test_other_files_are_refused(tmp_path, change, message):
    with pytest.raises(tq_hb.InvalidArgument, match=message):
        Calibration.load(write(tmp_path / "means", **change))
    assert len(Calibration.load(write(tmp_path / "means")).k_means) == 2


def test_damaged_files_are_refused(tmp_path):
    path = write(tmp_path / "means")
    whole = path.read_bytes()
    for size in (0, 7, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(tq_hb.InvalidArgument, match="Calibration.load: path must be a file of mean keys"):
            Calibration.load(path)
    with pytest.raises(tq_hb.InvalidArgument, match="it isn't there"):
        Calibration.load(tmp_path)


@pytest.mark.parametrize("module", [file_module, key_means])
def test_the_documentation_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 5
    assert result.failed == 0
