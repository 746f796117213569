"""The attention function that the adapter registers: it gives what the models' own gives, for whatever they pass."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parent))  # identity_cache, models

from identity_cache import IdentityKVCache  # noqa: E402
from models import make_model, make_tokens  # noqa: E402
from torch.nn.attention.flex_attention import create_block_mask  # noqa: E402
from transformers import (  # noqa: E402
    BartConfig,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)
from transformers.models.gemma2 import modeling_gemma2  # noqa: E402
from transformers.models.gpt_oss import modeling_gpt_oss  # noqa: E402

import tq_hb  # noqa: E402
from tq_hb.integrations.transformers import CodesOnly, TqCache, attention, enable  # noqa: E402

# The outputs of one attention have a magnitude of one; the logits of the tiny models one of a few units.
OUTPUT_ATOL = 1e-5
LOGIT_ATOL = 1e-4

HEADS, KV_HEADS = 4, 2


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


class Layer(torch.nn.Module):
    """What attention functions look at of an attention layer."""

    num_key_value_groups = HEADS // KV_HEADS

    def __init__(self, *, head_dim=64, is_causal=True, training=False):
        super().__init__()
        self.head_dim = head_dim
        self.is_causal = is_causal
        self.sinks = torch.linspace(-1, 1, HEADS)
        self.train(training)


def make_qkv(queries, keys, head_dim=64):
    generator = torch.Generator().manual_seed(queries * keys)
    shapes = [(HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys)]
    return [torch.randn(1, *shape, head_dim, generator=generator) for shape in shapes]


def additive(seen):
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def librarys(kind, layer, q, k, v, seen, **options):
    """The model's own attention; it always has an additive mask, or none to see everything."""
    mask = None if seen is None else additive(seen)
    if kind == "softcap":
        return modeling_gemma2.eager_attention_forward(layer, q, k, v, mask, softcap=2.0, **options)[0]
    options = {"scaling": layer.head_dim**-0.5, **options}
    if kind == "sinks":
        return modeling_gpt_oss.eager_attention_forward(layer, q, k, v, mask, **options)[0]
    return modeling_gemma2.eager_attention_forward(layer, q, k, v, mask, **options)[0]


def ours(kind, layer, *arguments, **options):
    extras = {"plain": {}, "softcap": {"softcap": 2.0}, "sinks": {"s_aux": layer.sinks}}
    return attention(layer, *arguments, **extras[kind], **options)[0]


def triangle(queries, keys, first=0):
    """A causal mask (1, 1, queries, keys), the first query being at position `first`."""
    return torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(first)


every_kind = pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])


# --- one layer ---------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize(
    ("queries", "keys", "seen"),
    [
        pytest.param(9, 9, triangle(9, 9), id="prefill"),
        pytest.param(1, 9, None, id="decode"),
        pytest.param(4, 9, triangle(4, 9), id="prefill-of-a-static-cache"),
    ],
)
def test_without_a_mask_a_causal_layer_sees_what_came_before(kind, head_dim, queries, keys, seen):
    layer, qkv = Layer(head_dim=head_dim), make_qkv(queries, keys, head_dim)
    want = librarys(kind, layer, *qkv, seen)
    torch.testing.assert_close(ours(kind, layer, *qkv, None), want, atol=OUTPUT_ATOL, rtol=0)


@every_kind
@pytest.mark.parametrize(
    ("of_layer", "options", "sees_all"),
    [
        (True, {}, False),
        (False, {}, True),
        (True, {"is_causal": False}, True),
        (False, {"is_causal": True}, False),
        (False, {"is_causal": None}, True),
    ],
)
def test_without_a_mask_the_call_and_then_the_layer_says_what_is_seen(kind, of_layer, options, sees_all):
    layer, qkv = Layer(is_causal=of_layer), make_qkv(7, 7)
    want = librarys(kind, layer, *qkv, None if sees_all else triangle(7, 7))
    torch.testing.assert_close(ours(kind, layer, *qkv, None, **options), want, atol=OUTPUT_ATOL, rtol=0)


@every_kind
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("form", [lambda seen: seen, additive], ids=["bool", "additive"])
def test_a_mask_says_all(kind, queries, is_causal, form):
    layer, qkv = Layer(), make_qkv(queries, 9)
    seen = torch.rand(1, 1, queries, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[..., 4] = True
    want = librarys(kind, layer, *qkv, seen)
    got = ours(kind, layer, *qkv, form(seen), is_causal=is_causal)
    torch.testing.assert_close(got, want, atol=OUTPUT_ATOL, rtol=0)


@pytest.mark.parametrize("kind", ["softcap", "sinks"])
def test_a_query_that_a_mask_hides_everything_from_gets_what_the_models_own_gives(kind):
    layer, qkv = Layer(), make_qkv(3, 3)
    seen = triangle(3, 3)
    seen[..., 0, :] = False
    torch.testing.assert_close(
        ours(kind, layer, *qkv, seen), librarys(kind, layer, *qkv, seen), atol=OUTPUT_ATOL, rtol=0
    )


@every_kind
def test_scaling_multiplies_the_scores(kind):
    layer, qkv = Layer(), make_qkv(5, 5)
    want = librarys(kind, layer, *qkv, triangle(5, 5), scaling=0.3)
    torch.testing.assert_close(ours(kind, layer, *qkv, None, scaling=0.3), want, atol=OUTPUT_ATOL, rtol=0)


@pytest.mark.parametrize("kind", ["softcap", "sinks"])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_drops_weights_in_training(kind, training):
    layer, qkv = Layer(training=training), make_qkv(6, 6)
    torch.manual_seed(0)
    want = librarys(kind, layer, *qkv, triangle(6, 6), dropout=0.4)
    torch.manual_seed(0)
    got = ours(kind, layer, *qkv, None, dropout=0.4)
    torch.testing.assert_close(got, want, atol=OUTPUT_ATOL, rtol=0)
    assert torch.allclose(got, ours(kind, layer, *qkv, None), atol=OUTPUT_ATOL) != training


@every_kind
@pytest.mark.parametrize("name", ["position_bias", "sinks", "indices", "block_indices"])
def test_keywords_that_would_change_the_result_are_refused(kind, name):
    layer, qkv = Layer(), make_qkv(5, 5)
    ours(kind, layer, *qkv, None, **{name: None})
    with pytest.raises(tq_hb.UnsupportedError, match=rf"^attention: {name} is not supported, got Layer with it$"):
        ours(kind, layer, *qkv, None, **{name: torch.zeros(1)})


MASKS = {
    "int64": lambda: torch.ones(1, 1, 5, 5, dtype=torch.long),
    "BlockMask": lambda: create_block_mask(lambda _b, _h, q, k: q >= k, 1, 1, 5, 5, device="cpu"),
}


@every_kind
@pytest.mark.parametrize("got", MASKS)
@pytest.mark.parametrize("on_codes", [True, False])
def test_other_kinds_of_masks_are_refused(kind, got, on_codes):
    q, k, v = make_qkv(5, 5)
    if on_codes:
        k = v = make_codes(k, v)
    with pytest.raises(tq_hb.InvalidArgument, match=rf"^attention: attention_mask must be a tensor of .*{got}$"):
        ours(kind, Layer(), q, k, v, MASKS[got]())


# --- whole models ------------------------------------------------------------------------------

some_models = pytest.mark.parametrize("kind", ["gemma3", "gemma2", "gpt-oss-64"])


def assert_as_eager(model, forward):
    """Compare the logits that `forward` gets from the model with its own attention and with ours."""
    model.set_attn_implementation("eager")
    torch.manual_seed(0)
    want = forward(model)
    enable(model)
    torch.manual_seed(0)
    torch.testing.assert_close(forward(model), want, atol=LOGIT_ATOL, rtol=0)


@some_models
def test_a_bidirectional_model_sees_what_comes_after(kind):
    tokens = make_tokens(20)
    assert_as_eager(make_model(kind, is_causal=False), lambda model: model(tokens).logits)
    assert_as_eager(make_model(kind), lambda model: model(tokens, is_causal=False, use_cache=False).logits)


@some_models
def test_a_static_cache_is_prefilled_and_decoded_from(kind):
    def forward(model):
        cache = StaticCache(config=model.config, max_cache_len=64)
        return torch.cat([model(piece, cache=cache).logits for piece in make_tokens(40).split([20, 1, 3, 16], 1)], 1)

    assert_as_eager(make_model(kind), forward)


@some_models
def test_several_prompts_in_one_sequence_do_not_see_each_other(kind):
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
    assert_as_eager(
        make_model(kind), lambda model: model(make_tokens(40), position_ids=positions, use_cache=False).logits
    )


@some_models
def test_a_batch_of_prompts_is_attended_to_without_a_tq_cache(kind):
    tokens = torch.cat([make_tokens(40), make_tokens(40, seed=1)])
    assert_as_eager(make_model(kind), lambda model: model(tokens).logits)


def test_a_model_in_training_drops_weights():
    assert_as_eager(
        make_model("gemma2", attention_dropout=0.3).train(),
        lambda model: model(make_tokens(40), use_cache=False).logits,
    )


def make_encoder_decoder():
    """T5Gemma: a softcap in an encoder, in a decoder, and in the cross attention between them."""
    shape = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": 64,
        "sliding_window": 16,
        "initializer_range": 0.15,
        "attn_logit_softcapping": 2.0,
    }
    torch.manual_seed(1)
    config = T5GemmaConfig(encoder=shape, decoder={**shape, "cross_attention_hidden_size": 64}, vocab_size=96)
    return T5GemmaForConditionalGeneration(config).eval()


def test_cross_attention_sees_all_of_the_encoder():
    tokens = make_tokens(40)
    assert_as_eager(
        make_encoder_decoder(), lambda model: model(input_ids=tokens, decoder_input_ids=tokens[:, :20]).logits
    )


def test_a_tq_cache_for_the_decoder_of_a_model_with_an_encoder_is_refused():
    with pytest.raises(
        tq_hb.UnsupportedError, match=r"^TqCache: config must be of a model without an encoder, got bart"
    ):
        TqCache(BartConfig())


def test_a_tq_cache_for_cross_attention_is_refused():
    model, tokens = make_encoder_decoder(), make_tokens(20)
    enable(model)
    config = model.config.decoder
    arguments = {"encoder_outputs": model.get_encoder()(tokens), "decoder_input_ids": tokens[:, :1]}
    cache = EncoderDecoderCache(TqCache(config), DynamicCache())
    for _ in range(2):
        model(**arguments, cache=cache)
    cache = EncoderDecoderCache(TqCache(config), TqCache(config))
    model(**arguments, cache=cache)
    with pytest.raises(tq_hb.UnsupportedError, match=r"^attention: key must be .*can't serve cross attention"):
        model(**arguments, cache=cache)


# --- on codes ----------------------------------------------------------------------------------


def make_codes(k, v, window=None):
    kv = IdentityKVCache(KV_HEADS, k.shape[-1], window and window + k.shape[2], sliding_window=window)
    kv.append(k[0].transpose(0, 1), v[0].transpose(0, 1))
    return CodesOnly(kv)


def causal(queries, keys, window=None):
    seen = triangle(queries, keys, keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)


@every_kind
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_codes_are_attended_to_as_the_models_own_attention_does(kind, window, queries, scaling):
    layer, (q, k, v) = Layer(), make_qkv(queries, 9)
    options = {} if scaling is None else {"scaling": scaling}
    seen = causal(queries, 9, window)
    want = librarys(kind, layer, q, k, v, seen, **options)
    codes = make_codes(k, v, window)
    for mask in (None, seen, additive(seen), additive(seen).half(), torch.where(seen, 0.0, -1e4)):
        got = ours(kind, layer, q, codes, codes, mask, **options)
        torch.testing.assert_close(got, want, atol=OUTPUT_ATOL, rtol=0)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    "change",
    [
        lambda seen: causal(1, 9),
        lambda seen: seen[..., :2, :],
        lambda seen: ~seen,
        lambda seen: seen.flip(-2),
        lambda seen: torch.where(seen, 0.5, -torch.inf),
        lambda seen: torch.where(seen, -0.5, -torch.inf),
        lambda seen: torch.where(seen, 0.0, -1.0),
        lambda seen: torch.where(seen, torch.nan, -torch.inf),
    ],
    ids=["one-row", "two-rows", "inverse", "flipped", "bias", "negative-bias", "slightly-hidden", "nan"],
)
def test_masks_that_the_cache_would_not_attend_with_are_refused(change, window):
    q, k, v = make_qkv(3, 9)
    codes = make_codes(k, v, window)
    with pytest.raises(tq_hb.UnsupportedError, match=r"^attention: attention_mask must be causal on a TqCache"):
        attention(Layer(), q, codes, codes, change(causal(3, 9, window)))


@every_kind
def test_one_query_of_a_layer_that_is_not_causal_sees_all_codes(kind):
    layer, (q, k, v) = Layer(is_causal=False), make_qkv(1, 9)
    codes = make_codes(k, v)
    want = librarys(kind, layer, q, k, v, None)
    torch.testing.assert_close(ours(kind, layer, q, codes, codes, None), want, atol=OUTPUT_ATOL, rtol=0)


def test_several_queries_that_are_not_causal_are_refused_on_codes():
    model = make_model("gemma2", is_causal=False)
    enable(model)
    cache = TqCache(model.config)
    model(make_tokens(20), cache=cache)
    model(make_tokens(1), cache=cache)
    with pytest.raises(tq_hb.UnsupportedError, match=r"is_causal must be True for several queries on a TqCache, got 3"):
        model(make_tokens(3), cache=cache)
