"""Tiny random transformers models that the adapter is tested with."""

from __future__ import annotations

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 96
WINDOW = 32

_CLASSES = {
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"sliding_window": WINDOW, "query_pre_attn_scalar": 168}),
    # Softcapped attention, which torch's fused attention can't do.
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "num_key_value_heads": 2},
    ),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-128": (LlamaForCausalLM, LlamaConfig, {"head_dim": 128}),
    # Attention sinks, and sliding layers in turn with full ones. Every expert is used: choosing some of them would be
    # a jump that magnifies the codec's error.
    "gpt-oss-64": (
        GptOssForCausalLM,
        GptOssConfig,
        {"head_dim": 64, "sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 2},
    ),
    "qwen3-512": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 512, "num_key_value_heads": 2}),
    # Head dimension hidden_size / heads, full layers and then sliding ones.
    "qwen2-64": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {
            "hidden_size": 256,
            "initializer_range": 0.07,  # the sums are longer
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 3,
        },
    ),
    # Every layer is sliding.
    "mistral-128": (
        MistralForCausalLM,
        MistralConfig,
        {"head_dim": 128, "num_key_value_heads": 2, "sliding_window": WINDOW},
    ),
    # Head dimensions 256 and 512; the last two layers attend to keys and values of the ones before.
    "gemma4": (
        Gemma4ForCausalLM,
        Gemma4TextConfig,
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
}
KINDS = tuple(_CLASSES)


def make_config(kind: str = "gemma3", **changes):
    _, config_class, own = _CLASSES[kind]
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,  # in Gemma 3, five sliding layers and a full one
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        # Large enough that attention is far from uniform, and the window matters.
        "initializer_range": 0.15,
    }
    return config_class(**{**shape, **own, **changes})


def make_model(kind: str = "gemma3", **changes) -> PreTrainedModel:
    torch.manual_seed(1)
    model = _CLASSES[kind][0](make_config(kind, **changes)).eval()
    if kind == "gemma4":
        # Its scores are not scaled: that is left to what the norms learn.
        for layer in model.model.layers:
            torch.nn.init.constant_(layer.self_attn.q_norm.weight, 2 * layer.self_attn.head_dim**-0.5)
    return model


def make_tokens(length: int, seed: int = 0) -> torch.Tensor:
    """Token ids, shape (1, length), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (1, length), generator=generator)
