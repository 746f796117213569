"""A model of Gemma 4's shape decodes on the GPU through the adapter, as it does on the cpu."""

from __future__ import annotations

import numpy as np
import pytest

import tq_hb

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

PROMPT, STEPS = 150, 12


def make_model():
    """Layers of head size 256 with a window and of 512 without, eight heads on four or two KV heads."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_global_key_value_heads=2,
        head_dim=256,
        global_head_dim=512,
        sliding_window=64,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=128,
        num_kv_shared_layers=0,
    )
    model = Gemma4ForCausalLM(config).eval()
    for layer in model.model.layers:
        # The scores are not scaled: that is left to what the norms learn.
        torch.nn.init.constant_(layer.self_attn.q_norm.weight, 2 * layer.self_attn.head_dim**-0.5)
    return model


def decode(model, device, tokens):
    """Feed tokens one by one after a prompt; return the logits and the cache."""
    from tq_hb.integrations.transformers import TqCache, enable

    enable(model)
    cache = TqCache(model.config, k_bits=8, v_bits=6, precision="strict", device=device)
    ids = tokens.to(model.device)
    with torch.inference_mode():
        model(ids[:, :PROMPT], cache=cache)
        steps = [model(ids[:, i : i + 1], cache=cache).logits[0, -1] for i in range(PROMPT, PROMPT + STEPS)]
    return torch.stack(steps).double().cpu(), cache


def test_it_decodes_on_the_gpu_as_on_the_cpu(cuda):
    tokens = torch.randint(0, 128, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make_model()
    want, on_cpu = decode(model, "cpu", tokens)
    got, on_gpu = decode(model.to("cuda"), cuda, tokens)
    assert {layer.kv.head_dim for layer in on_gpu.layers} == {256, 512}
    assert all(plan.backend == "cuda" for plan in on_gpu.last_plans)
    assert float((got - want).norm() / want.norm()) < 1e-3
    same, count = 0, 0
    for ours, its in zip(on_gpu.layers, on_cpu.layers, strict=True):
        for side, its_side in ((ours.kv._k, its.kv._k), (ours.kv._v, its.kv._v)):
            codes, its_codes = (x.packed.numpy()[:, : len(ours.kv)] for x in (side, its_side))
            same, count = same + int((codes == its_codes).sum()), count + codes.size
            assert np.abs(codes.astype(int) - its_codes).max() <= 1
    assert same / count > 0.999  # the models' own sums differ in the last bits


def test_the_same_vectors_give_the_same_codes(cuda):
    """What the adapter appends on the GPU is encoded to the bytes that the cpu makes of the same vectors."""
    rng = np.random.default_rng(0)
    for head_dim in (256, 512):
        k, v = rng.standard_normal((2, 33, 2, head_dim), np.float32)
        on_gpu, on_cpu = (tq_hb.KVCache(2, head_dim, k_bits=8, v_bits=6, device=device) for device in (cuda, "cpu"))
        on_gpu.append(*(torch.from_numpy(x).cuda() for x in (k, v)))
        on_cpu.append(k, v)
        on_gpu.dequantize()  # waits
        for side, its in ((on_gpu._k, on_cpu._k), (on_gpu._v, on_cpu._v)):
            assert np.array_equal(side.packed.numpy()[:, :33], its.packed.numpy()[:, :33])
            assert np.array_equal(side.norms.numpy()[:, :33], its.norms.numpy()[:, :33])
