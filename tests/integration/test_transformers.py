"""The transformers adapter: exact when the codec is replaced by identity, close with it, and loud about the rest."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parent))  # identity_cache, models

from identity_cache import IdentityKVCache  # noqa: E402
from models import KINDS, WINDOW, make_config, make_model, make_tokens  # noqa: E402
from transformers import AttentionMaskInterface, DynamicCache  # noqa: E402

import tq_hb  # noqa: E402
import tq_hb.integrations.transformers as adapter  # noqa: E402
from tq_hb.integrations.transformers import TqCache, attention, enable  # noqa: E402

# Logits of the tiny models have a magnitude of a few units, and float32 gives about 1e-6 of that.
LOGIT_ATOL = 1e-4

# Prefill beyond the window, decode past the next wrap, several tokens at once (more and fewer than the window), decode.
STEPS = (WINDOW + 8, *[1] * (WINDOW + 3), 9, 1, WINDOW + 5, 1, 1)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def identity(monkeypatch):
    monkeypatch.setattr(adapter, "KVCache", IdentityKVCache)


def run(model, tokens, cache, steps):
    """Logits of all tokens, fed in steps of these sizes."""
    pieces = tokens[:, : sum(steps)].split(list(steps), dim=1)
    return torch.cat([model(piece, cache=cache).logits for piece in pieces], dim=1)[0]


def library_logits(kind, tokens, **changes):
    """The library's own attention over everything at once, without a cache."""
    model = make_model(kind, **changes)
    model.set_attn_implementation("eager")
    return model(tokens, use_cache=False).logits[0]


def enabled(kind="gemma3", **changes):
    model = make_model(kind, **changes)
    enable(model)
    return model


# --- exact, but for the codec ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_librarys_when_the_codec_is_identity(kind, identity):
    tokens = make_tokens(sum(STEPS))
    model = enabled(kind)
    got = run(model, tokens, TqCache(model.config), STEPS)
    torch.testing.assert_close(got, library_logits(kind, tokens), atol=LOGIT_ATOL, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_several_tokens_at_once_are_attended_to_on_codes_where_the_rings_have_room(kind, identity, monkeypatch):
    monkeypatch.setattr(IdentityKVCache, "dequantize", lambda _: pytest.fail("K and V must not be rebuilt"))
    tokens = make_tokens(sum(STEPS))
    model = enabled(kind)
    got = run(model, tokens, TqCache(model.config, rollback=max(STEPS[1:]) - 1), STEPS)
    torch.testing.assert_close(got, library_logits(kind, tokens), atol=LOGIT_ATOL, rtol=0)


@pytest.mark.parametrize("prefill", [1, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1], ids=lambda n: f"prefill{n}")
@pytest.mark.parametrize("more", [1, 2, WINDOW], ids=lambda n: f"then{n}")
def test_logits_are_exact_around_the_window(prefill, more, identity):
    tokens = make_tokens(prefill + more + 3, seed=prefill)
    model = enabled()
    got = run(model, tokens, TqCache(model.config), (prefill, more, 1, 1, 1))
    torch.testing.assert_close(got, library_logits("gemma3", tokens), atol=LOGIT_ATOL, rtol=0)


@pytest.mark.parametrize("kind", ["gemma3", "gemma2"])
def test_without_the_mask_function_sliding_layers_see_too_much(kind, identity, monkeypatch):
    tokens = make_tokens(2 * WINDOW)
    model = enabled(kind)
    want = library_logits(kind, tokens)
    torch.testing.assert_close(model(tokens).logits[0], want, atol=LOGIT_ATOL, rtol=0)

    monkeypatch.delitem(AttentionMaskInterface._global_mapping, adapter.ATTENTION_NAME)
    error = (model(tokens).logits[0] - want).abs().amax(dim=-1)
    assert error[:WINDOW].max() < LOGIT_ATOL
    assert error[WINDOW:].min() > 100 * LOGIT_ATOL


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 4}], ids=["greedy", "prompt_lookup"])
def test_generate_gives_the_librarys_tokens_when_the_codec_is_identity(options, identity):
    model = make_model()
    arguments = {"max_new_tokens": 2 * WINDOW, "min_new_tokens": 2 * WINDOW, "do_sample": False}
    want = model.generate(make_tokens(10), **arguments)
    enable(model)
    # Prompt lookup takes back what it guessed wrong, beyond the wrap of the rings as well.
    cache = TqCache(model.config, rollback=10)
    got = model.generate(make_tokens(10), cache=cache, **arguments, **options)
    assert got.tolist() == want.tolist()
    assert cache.get_seq_length() == got.shape[1] - 1


def test_an_enabled_model_works_with_the_librarys_caches():
    tokens = make_tokens(sum(STEPS))
    model = enabled()
    got = run(model, tokens, DynamicCache(config=model.config), STEPS)
    torch.testing.assert_close(got, library_logits("gemma3", tokens), atol=LOGIT_ATOL, rtol=0)


# --- with the codec ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_with_8_bits_are_close_and_with_fewer_less_so(kind):
    tokens = make_tokens(sum(STEPS))
    want = library_logits(kind, tokens)
    model = enabled(kind)
    divergence = {}
    for bits in tq_hb.supported_bits():
        got = run(model, tokens, TqCache(model.config, k_bits=bits, v_bits=bits), STEPS)
        p, q = want.double().log_softmax(-1), got.double().log_softmax(-1)
        divergence[bits] = (p.exp() * (p - q)).sum(-1).mean().item()
    assert divergence[8] < 3e-3
    # In theory the squared error grows by 15.5 from 8 bits to 6, and by 3.9 from there to 5.
    assert 4 * divergence[8] < divergence[6] < divergence[5]


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_8_bits_runs_past_the_window_and_every_layer_says_what_it_holds(kind):
    model = enabled(kind)
    cache = TqCache(model.config)
    tokens = model.generate(
        make_tokens(WINDOW - 4), cache=cache, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0
    )
    seen = tokens.shape[1] - 1  # the last one has not been attended to
    assert seen == WINDOW + 7 == cache.get_seq_length()
    holding = [layer.kv for layer in cache.layers if hasattr(layer, "kv")]
    assert len(holding) == (4 if kind == "gemma4" else 6)
    for kv in holding:
        assert (kv.offset, len(kv)) == (seen, seen if kv.sliding_window is None else WINDOW)
    assert cache.bytes_per_token == sum(
        2 * kv.num_kv_heads * (kv.head_dim + 4 * -(-kv.head_dim // 256)) for kv in holding
    )
    assert None not in cache.last_plans


def test_a_first_prefill_is_in_full_precision():
    tokens = make_tokens(WINDOW + 20)
    model = enabled()
    got = model(tokens, cache=TqCache(model.config, k_bits=5, v_bits=5)).logits[0]
    torch.testing.assert_close(got, library_logits("gemma3", tokens), atol=LOGIT_ATOL, rtol=0)


def test_decode_attends_on_the_codes_in_every_layer(monkeypatch):
    calls = []
    attend = tq_hb.KVCache.attend
    monkeypatch.setattr(tq_hb.KVCache, "attend", lambda self, q, **kw: calls.append(self) or attend(self, q, **kw))
    model = enabled()
    cache = TqCache(model.config)
    run(model, make_tokens(50), cache, (40,))
    assert cache.last_plans == (None,) * 6
    assert not calls

    monkeypatch.setattr(tq_hb.KVCache, "dequantize", lambda _: pytest.fail("decode must not rebuild K and V"))
    run(model, make_tokens(50), cache, (1, 1))
    assert calls == [layer.kv for layer in cache.layers] * 2
    assert {plan.backend for plan in cache.last_plans} == {tq_hb.Device("auto").backend}


def test_bfloat16_models_stay_bfloat16():
    tokens = make_tokens(sum(STEPS))
    model = enabled().to(torch.bfloat16)
    got = run(model, tokens, TqCache(model.config), STEPS)
    want = model(tokens, use_cache=False).logits[0]
    assert got.dtype == torch.bfloat16
    # bfloat16 has 8 bits, so that alone makes some percent over six layers.
    assert tq_norm(got - want) < 0.1 * tq_norm(want)


def tq_norm(x):
    return x.double().square().mean().sqrt().item()


# --- what a cache says about itself, and how it is taken back -----------------------------------


def test_a_cache_tells_its_bytes():
    cache = TqCache(make_config(), k_bits=6, v_bits=5)
    assert cache.bytes_per_token == 6 * 520
    rings = 5 * WINDOW * 520
    assert rings <= cache.nbytes <= 1.1 * rings
    run(enabled(), make_tokens(100), cache, (100,))
    held = sum(len(layer.kv) * 520 for layer in cache.layers)
    assert held == rings + 100 * 520
    assert held <= cache.nbytes == sum(layer.kv.nbytes for layer in cache.layers)
    assert (cache.layers[0].kv.k_bits, cache.layers[5].kv.v_bits) == (6, 5)
    assert [layer.kv.sliding_window for layer in cache.layers] == [WINDOW] * 5 + [None]


def test_crop_takes_tokens_back(identity):
    tokens, other = make_tokens(60), make_tokens(60, seed=1)
    model = enabled()
    cache = TqCache(model.config, rollback=7)
    run(model, other, cache, (50,))
    cache.crop(-7)
    cache.crop(0)
    assert cache.get_seq_length() == 43
    got = run(model, tokens[:, 43:], cache, (1, 3, 1))
    spliced = torch.cat([other[:, :43], tokens[:, 43:48]], dim=1)
    torch.testing.assert_close(got, library_logits("gemma3", spliced)[43:], atol=LOGIT_ATOL, rtol=0)


def test_crop_with_the_codec_is_as_if_the_tokens_had_never_come():
    model = enabled()
    first, second = TqCache(model.config, rollback=5), TqCache(model.config, rollback=5)
    tokens = make_tokens(70)
    run(model, tokens, first, (50, 1, 1, 1, 1, 1))
    first.crop(-5)
    run(model, tokens, second, (50,))
    assert torch.equal(run(model, tokens[:, 60:], first, (1, 1)), run(model, tokens[:, 60:], second, (1, 1)))


def test_a_crop_that_cannot_be_done_changes_nothing():
    # The full layer comes first: it could be cropped, and must not be.
    model = enabled(layer_types=["full_attention", *["sliding_attention"] * 5])
    cache = TqCache(model.config, rollback=2)
    run(model, make_tokens(WINDOW + 3), cache, (WINDOW + 3,))
    before = [(len(layer.kv), layer.kv.offset) for layer in cache.layers]
    with pytest.raises(tq_hb.UnsupportedError, match=r"TqCache.crop: tokens_to_remove must be at least -2 .*got -3"):
        cache.crop(-3)
    assert [(len(layer.kv), layer.kv.offset) for layer in cache.layers] == before
    cache.crop(-2)
    with pytest.raises(tq_hb.UnsupportedError, match=r"got -1$"):
        cache.crop(-1)


def test_before_the_wrap_everything_can_be_cropped():
    model = enabled()
    cache = TqCache(model.config)
    run(model, make_tokens(WINDOW), cache, (WINDOW,))
    cache.crop(-WINDOW)
    assert cache.get_seq_length() == 0


def test_full_layers_can_be_cropped_at_any_length():
    model = enabled("llama")
    cache = TqCache(model.config)
    run(model, make_tokens(100), cache, (100,))
    assert cache.is_croppable
    cache.crop(-99)
    assert cache.get_seq_length() == 1


@pytest.mark.parametrize("count", [1, -11])
def test_crop_wants_a_number_of_tokens_there_are(count):
    cache = TqCache(make_config("llama"))
    run(enabled("llama"), make_tokens(10), cache, (10,))
    with pytest.raises(tq_hb.InvalidArgument, match=rf"from -10 \(the tokens seen\) to 0, got {count}$"):
        cache.crop(count)


@pytest.mark.parametrize("count", [None, "1", -1.0])
def test_crop_wants_an_integer(count):
    with pytest.raises(tq_hb.InvalidArgument, match="^TqCache.crop: tokens_to_remove must be an integer, got .*"):
        TqCache(make_config("llama")).crop(count)


def test_reset_forgets_everything():
    model = enabled()
    cache = TqCache(model.config)
    want = run(model, make_tokens(45), cache, (40, 1, 1))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(run(model, make_tokens(45), cache, (40, 1, 1)), want)


def test_a_deep_copy_goes_its_own_way():
    model = enabled()
    cache = TqCache(model.config)
    run(model, make_tokens(40), cache, (40,))
    branch = copy.deepcopy(cache)
    want = run(model, make_tokens(5, seed=2), branch, (1, 1, 1))
    assert (cache.get_seq_length(), branch.get_seq_length()) == (40, 43)
    assert torch.equal(run(model, make_tokens(5, seed=2), cache, (1, 1, 1)), want)


# --- files --------------------------------------------------------------------------------------

OPTIONS = {"k_bits": 8, "v_bits": 6, "packing": "plane", "precision": "strict", "rollback": 3}


def held(cache):
    """What a file keeps of every layer that holds keys."""
    return [dataclasses.asdict(layer.kv._saved("save")) for layer in cache._holding]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 5, 2 * WINDOW + 3], ids=lambda n: f"after{n}")
def test_a_loaded_cache_goes_on_bit_for_bit(kind, tokens, tmp_path):
    model = enabled(kind)
    cache = TqCache(model.config, **OPTIONS)
    if tokens:
        run(model, make_tokens(tokens), cache, (tokens,))
    cache.save(tmp_path / "cache.safetensors")
    loaded = TqCache.load(tmp_path / "cache.safetensors", model.config)

    assert [layer.is_croppable for layer in loaded._holding] == [layer.is_croppable for layer in cache._holding]
    for want, got in zip(held(cache), held(loaded), strict=True):
        assert want.keys() == got.keys()
        assert all(np.array_equal(got[name], value) for name, value in want.items())
    more = make_tokens(WINDOW + 4, seed=1)
    steps = (4, *[1] * WINDOW)
    assert torch.equal(run(model, more, loaded, steps), run(model, more, cache, steps))
    assert loaded.get_seq_length() == tokens + WINDOW + 4
    assert len(loaded.layers) == len(cache.layers)


def test_a_loaded_cache_keeps_its_means(tmp_path):
    model = enabled("llama")
    cache = TqCache(model.config, k_mean="prefill")
    run(model, make_tokens(300), cache, (300,))
    assert any(mean is not None for mean in cache.k_means)
    cache.save(tmp_path / "cache")
    for want, got in zip(cache.k_means, TqCache.load(tmp_path / "cache", model.config).k_means, strict=True):
        assert np.array_equal(want, got)


def test_a_saved_cache_is_one_of_the_layers_that_hold_keys(tmp_path):
    model = enabled()
    cache = TqCache(model.config)
    run(model, make_tokens(5), cache, (5,))
    cache.save(tmp_path / "cache")
    assert [len(kv) for kv in tq_hb.load_caches(tmp_path / "cache")] == [5] * len(cache._holding)
    tq_hb.save_caches(tmp_path / "layers", [layer.kv for layer in cache._holding])
    assert (tmp_path / "cache").read_bytes() == (tmp_path / "layers").read_bytes()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_hidden_layers": 2}, r"the 2 layers of config that have keys, got 6"),
        ({"head_dim": 64}, r"\(KV heads, head_dim, window\) \(1, 64, \d+\) for layer 0, got \(1, 256, \d+\)"),
        ({"sliding_window": WINDOW + 1}, rf"\(1, 256, {WINDOW + 1}\) for layer 0, got \(1, 256, {WINDOW}\)"),
    ],
    ids=["layers", "head_dim", "window"],
)
def test_a_file_of_another_shape_is_refused(other, message, tmp_path):
    TqCache(make_config()).save(tmp_path / "cache")
    with pytest.raises(tq_hb.InvalidArgument, match=f"^TqCache.load: path must hold .*{message}$"):
        TqCache.load(tmp_path / "cache", make_config(**other))


def test_errors_of_files_name_the_call(tmp_path):
    with pytest.raises(tq_hb.InvalidArgument, match="^TqCache.save: path must be a str or an os.PathLike, got int"):
        TqCache(make_config()).save(1)
    with pytest.raises(FileNotFoundError):
        TqCache.load(tmp_path / "none", make_config())
    with pytest.raises(tq_hb.InvalidArgument, match="^TqCache.load: "):
        TqCache.load(tmp_path / "none", make_config(), "gpu")
    (tmp_path / "text").write_text("no cache")
    with pytest.raises(tq_hb.InvalidArgument, match="^TqCache.load: "):
        TqCache.load(tmp_path / "text", make_config())


# --- what is not supported is said, and nothing else happens ------------------------------------


def unsupported(message):
    return pytest.raises(tq_hb.UnsupportedError, match=message)


def test_batches_are_refused():
    model = enabled()
    with unsupported(r"TqCache: batch must be 1 \(use a TqCache for each sequence\), got 2$"):
        model(make_tokens(8).repeat(2, 1), cache=TqCache(model.config))


def test_padding_is_refused():
    model = enabled()
    mask = torch.ones(1, 8, dtype=torch.long)
    model(make_tokens(8), attention_mask=mask, cache=TqCache(model.config))
    mask[0, :2] = 0
    with unsupported("attention_mask must not mark padding, got one that hides 2 tokens"):
        model(make_tokens(8), attention_mask=mask, cache=TqCache(model.config))


def test_beams_are_refused():
    model = enabled()
    with unsupported("batch must be 1 .*, got 2$"):
        model.generate(make_tokens(8), cache=TqCache(model.config), max_new_tokens=4, num_beams=2)
    cache = TqCache(model.config)
    run(model, make_tokens(8), cache, (8,))
    with unsupported("beams are not supported"):
        cache.reorder_cache(torch.tensor([0]))
    with unsupported("got 3 repeats"):
        cache.batch_repeat_interleave(3)
    with unsupported("got 2 selected"):
        cache.batch_select_indices(torch.tensor([0, 0]))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_decode_under_another_attention_is_refused(implementation):
    model = make_model()
    model.set_attn_implementation(implementation)
    cache = TqCache(model.config)
    run(model, make_tokens(8), cache, (8,))
    with unsupported("attn_implementation must be 'tq_hb'"):
        run(model, make_tokens(8), cache, (1,))


def test_a_mask_that_is_not_the_causal_one_is_refused():
    model = enabled()
    cache = TqCache(model.config)
    run(model, make_tokens(8), cache, (8,))
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    model(make_tokens(1), attention_mask=mask, cache=cache)
    model(make_tokens(1), attention_mask=torch.zeros(1, 1, 1, 10), cache=cache)
    for hiding in (mask.clone().index_fill_(3, torch.tensor([4]), False), torch.full((1, 1, 1, 11), -1e9)):
        with unsupported("attention_mask must be causal"):
            model(make_tokens(1), attention_mask=hiding, cache=cache)


@pytest.mark.parametrize("diagonal", [-1, 1])
def test_a_mask_that_shows_several_queries_too_little_or_too_much_is_refused(diagonal):
    model = enabled("llama")
    cache = TqCache(model.config)
    run(model, make_tokens(8), cache, (8,))
    mask = torch.ones(1, 1, 3, 11, dtype=torch.bool)
    model(make_tokens(3), attention_mask=mask.tril(8), cache=copy.deepcopy(cache))
    with unsupported("attention_mask must be causal"):
        model(make_tokens(3), attention_mask=mask.tril(8 + diagonal), cache=cache)


def test_position_biases_are_refused():
    x = torch.zeros(1, 4, 1, 256)
    with unsupported("attention: position_bias is not supported"):
        attention(torch.nn.Module(), x, x, x, None, position_bias=torch.zeros(4))


def test_dropout_is_refused_on_codes():
    model = enabled(attention_dropout=0.1)
    cache = TqCache(model.config)
    run(model, make_tokens(8), cache, (8,))
    model.train()
    with unsupported("dropout must be 0 on a TqCache, got 0.1"):
        run(model, make_tokens(8), cache, (1,))


def test_other_kinds_of_layers_are_refused():
    config = make_config("llama")
    config.layer_types = ["full_attention", "chunked_attention", *["full_attention"] * 4]
    config.attention_chunk_size = 16
    with unsupported("layer 1 must be full_attention or sliding_attention, got chunked_attention"):
        TqCache(config)


def test_other_head_dimensions_are_refused():
    with pytest.raises(tq_hb.InvalidArgument, match="head_dim must be 64, 128, 256 or 512, got 96"):
        TqCache(make_config(head_dim=96))


@pytest.mark.parametrize("model", [None, "gemma", torch.nn.Linear(1, 1)], ids=lambda model: type(model).__name__)
def test_what_is_no_model_is_not_enabled(model):
    with pytest.raises(tq_hb.InvalidArgument, match=f"^enable: model must be .*, got {type(model).__name__}$"):
        enable(model)


def test_models_whose_attention_cannot_be_replaced_are_refused(monkeypatch):
    model = make_model()
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda _: False)
    with unsupported("model must allow its attention to be replaced, got Gemma3ForCausalLM"):
        enable(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollback": -1}, "rollback"),
        ({"rollback": 1.5}, "rollback"),
        ({"k_bits": 4}, "k_bits"),
        ({"v_bits": 7}, "v_bits"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(tq_hb.InvalidArgument, match=message):
        TqCache(make_config(), **options)


@pytest.mark.parametrize("make", [TqCache, lambda config: TqCache.load("no such file", config)], ids=["new", "load"])
def test_a_model_in_the_place_of_its_config_is_refused(make):
    message = r"^TqCache(.load)?: config must be a transformers config \(model.config\), got Gemma3ForCausalLM$"
    with pytest.raises(tq_hb.InvalidArgument, match=message):
        make(make_model())
