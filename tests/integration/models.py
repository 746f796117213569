"""Tiny random transformers models that the adapter is tested with."""

from __future__ import annotations

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
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
    return _CLASSES[kind][0](make_config(kind, **changes)).eval()


def make_tokens(length: int, seed: int = 0) -> torch.Tensor:
    """Token ids, shape (1, length), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (1, length), generator=generator)
