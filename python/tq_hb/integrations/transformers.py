"""KV caches of transformers models, held at 5, 6 or 8 bits per value.

`TqCache` is a transformers cache whose layers each hold a `tq_hb.KVCache`; `enable` makes a model attend through it.
Which arithmetic serves a forward pass depends on what it finds:

=====================================  =================================================================
an empty cache (the first prefill)     full precision over the new tokens, which are then encoded
new tokens on a filled cache           the codes, by `KVCache.attend`; K and V are never rebuilt
more new tokens than a ring has spare  full precision over the decoded visible past and the new tokens
=====================================  =================================================================

The last row concerns sliding-window layers only: their ring holds the window and `rollback` tokens more, so up to
``rollback + 1`` tokens at a time are attended to on the codes.

Keys that have a large part in common lose less if they are encoded as differences from it: `calibrate` measures the
mean key of every layer and KV head, once for a model, and ``TqCache(k_mean=)`` takes them.

One sequence at a time: batches, padding and beams raise `tq_hb.UnsupportedError`. So does a mask or a keyword of the
model's attention that the codes can't be attended to with.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

try:  # with all of ours that imports them
    import torch
    from transformers.cache_utils import Cache, DummyLayer, get_layer_types_and_kwargs

    from tq_hb.integrations.attention import ATTENTION_NAME, CodesOnly, attention, make_mask
    from tq_hb.integrations.cache_layer import TqLayer
    from tq_hb.integrations.key_means import MIN_PREFILL, calibrate
except ImportError as error:  # one of them is not there, or too old
    raise type(error)(
        f"{__name__}: needs torch and transformers, got {error}. Install them: pip install 'tq-hb[transformers]', or "
        "from a checkout pip install '.[transformers]'.",
        name=error.name,
    ) from error

from tq_hb import KVCache, Plan, UnsupportedError
from tq_hb.device import resolve_device
from tq_hb.files import read_caches, write_caches
from tq_hb.integrations.calibration import Calibration
from tq_hb.options import invalid

__all__ = [
    "ATTENTION_NAME",
    "MIN_PREFILL",
    "CodesOnly",
    "TqCache",
    "TqLayer",
    "attention",
    "calibrate",
    "enable",
    "make_mask",
]

Config: TypeAlias = Any
Model: TypeAlias = Any
Shape: TypeAlias = tuple[int, int, int | None]
"""KV heads, head dimension and window of a layer; a window of None for full attention."""


def enable(model: Model) -> None:
    """Make a model attend through tq_hb, in place.

    It then works with a `TqCache`, and with the library's own caches as under ``"sdpa"``, padding excepted.
    ``model.set_attn_implementation("sdpa")`` takes it back.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model whose head dimension is one of `tq_hb.supported_head_dims()`.

    Raises
    ------
    tq_hb.InvalidArgument
        If it isn't a transformers model.
    tq_hb.UnsupportedError
        If the model's class doesn't let its attention be replaced.

    Examples
    --------
    >>> import torch
    >>> from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    >>> from tq_hb.integrations.transformers import TqCache, enable
    >>> config = Gemma3TextConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
    ...     num_key_value_heads=1, head_dim=256, sliding_window=8)
    >>> model = Gemma3ForCausalLM(config).eval()
    >>> enable(model)
    >>> cache = TqCache(model.config, k_bits=8, v_bits=6, packing="plane")
    >>> prompt = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    >>> tokens = model.generate(prompt, cache=cache, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    >>> tokens.shape
    torch.Size([1, 15])
    >>> cache.bytes_per_token  # six layers of 256 bytes for K, 192 for V and 8 for norms
    2736
    """
    if not hasattr(model, "set_attn_implementation"):
        raise invalid("enable", "model", "must be a transformers model", type(model).__name__)
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION_NAME:
        raise UnsupportedError(f"enable: model must allow its attention to be replaced, got {type(model).__name__}")


class TqCache(Cache):  # type: ignore[misc]
    """A transformers cache held by tq_hb: pass it as ``cache=`` to a model that `enable` was called on.

    Sliding-window layers hold a ring of `sliding_window` tokens, the others grow. Layers that attend to another layer's
    keys and values hold none.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The model's config; tells each layer's kind, heads, head dimension and window.
    k_bits, v_bits : int
        Bits per value of K and of V: 5, 6 or 8.
    codebook, packing, precision, device
        As for `tq_hb.KVCache`.
    rollback : int
        How many tokens `crop` can take back once a ring has overwritten its oldest. Assisted decoding and prompt
        lookup need as many as they propose at a time. The rings get that many more slots.
    k_mean : optional
        Mean keys, which keys are encoded as differences from; attention is on the keys themselves all the same. One of:

        - a `Calibration` (see `calibrate`), or the path of its file
        - an array (kv_heads, head_dim) or None for every layer, in a sequence, or in a mapping from the layer's index
        - ``"prefill"``: each layer takes the mean over the first prefill's keys, if the mean of the first half of them
          brings those of the second half closer to zero. The prefill must have at least `MIN_PREFILL` tokens.

    Raises
    ------
    tq_hb.InvalidArgument
        If an argument, or the model's head dimension, is outside what tq_hb knows; in `update`, if the prefill is too
        short for ``k_mean="prefill"``.
    tq_hb.UnsupportedError
        If a layer is of another kind than full or sliding attention, or the model has an encoder as well.

    Examples
    --------
    >>> import torch
    >>> from transformers import Qwen3Config
    >>> config = Qwen3Config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=256)
    >>> cache = TqCache(config, k_bits=8, v_bits=5, packing="plane")
    >>> cache.get_seq_length(), cache.bytes_per_token
    (0, 1696)
    >>> TqCache(config, k_mean={1: torch.ones(2, 256)}).k_means[1].shape
    (2, 256)
    """

    def __init__(
        self,
        config: Config,
        *,
        k_bits: int = 8,
        v_bits: int = 8,
        codebook: str = "lloyd_max",
        packing: str = "byte",
        precision: str = "default",
        device: Any = None,
        rollback: int = 0,
        k_mean: Any = None,
    ) -> None:
        if not hasattr(rollback, "__index__") or rollback < 0:
            raise invalid("TqCache", "rollback", "must be an integer of at least 0", repr(rollback))
        options = {
            "k_bits": k_bits,
            "v_bits": v_bits,
            "codebook": codebook,
            "packing": packing,
            "precision": precision,
            "device": device,
        }
        shapes = _shapes("TqCache", config)
        from_prefill = isinstance(k_mean, str) and k_mean == "prefill"
        k_means = [None] * len(shapes) if from_prefill else _k_means(k_mean, config, len(shapes))
        layers: list[Any] = []
        for index, shape in enumerate(shapes):
            if shape is None:
                if k_means[index] is not None:
                    raise invalid("TqCache", "k_mean", f"must be None for layer {index}, which holds no keys", "a mean")
                layers.append(DummyLayer())
                continue
            heads, head_dim, window = shape
            make_kv = functools.partial(
                KVCache,
                heads,
                head_dim,
                None if window is None else window + rollback,
                sliding_window=window,
                **options,
            )
            kv = make_kv(k_mean=_layer_mean(index, k_means[index], (heads, head_dim)))
            layers.append(TqLayer(kv, make_kv if from_prefill else None))
        super().__init__(layers=layers)

    @property
    def _holding(self) -> list[TqLayer]:
        """The layers with keys and values of their own."""
        return [layer for layer in self.layers if isinstance(layer, TqLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for codes and norms, all layers together.

        >>> import torch
        >>> from transformers import Qwen3Config
        >>> from tq_hb.integrations.transformers import TqCache
        >>> config = Qwen3Config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=256)
        >>> cache = TqCache(config)
        >>> _ = cache.update(*torch.ones(2, 1, 2, 3, 256), 0)
        >>> cache.nbytes  # one layer of 64 slots, the other still empty
        66560
        """
        return sum(layer.kv.nbytes for layer in self._holding)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of codes and norms per token held, all layers together.

        >>> from transformers import Qwen3Config
        >>> from tq_hb.integrations.transformers import TqCache
        >>> config = Qwen3Config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=256)
        >>> cache = TqCache(config)
        >>> cache.bytes_per_token  # layers * (K and V) * heads * (codes and norm)
        2080
        """
        return sum(layer.kv.bytes_per_token for layer in self._holding)

    @property
    def last_plans(self) -> tuple[Plan | None, ...]:
        """What served the last attention on codes, per layer that holds keys; None where there hasn't been any yet.

        >>> from transformers import Qwen3Config
        >>> from tq_hb.integrations.transformers import TqCache
        >>> config = Qwen3Config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=256)
        >>> cache = TqCache(config)
        >>> cache.last_plans
        (None, None)
        """
        return tuple(layer.kv.last_plan for layer in self._holding)

    @property
    def k_means(self) -> tuple[Any, ...]:
        """The mean key, float32 (kv_heads, head_dim), per layer that holds keys; None where it is not centred.

        >>> import torch
        >>> from transformers import Qwen3Config
        >>> from tq_hb.integrations.transformers import TqCache
        >>> config = Qwen3Config(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=256)
        >>> cache = TqCache(config, k_mean="prefill")
        >>> cache.k_means
        (None,)
        >>> _ = cache.update(*torch.ones(2, 1, 2, 300, 256), 0)
        >>> float(cache.k_means[0].mean())
        1.0
        """
        return tuple(layer.kv.k_mean for layer in self._holding)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, in every layer or, if that can't be, in none.

        Parameters
        ----------
        tokens_to_remove : int
            Minus the number of tokens, as in transformers.

        Raises
        ------
        tq_hb.InvalidArgument
            If the number is positive, or there are fewer tokens than that.
        tq_hb.UnsupportedError
            If a ring has overwritten tokens that would come into view again; see `rollback`.

        Examples
        --------
        >>> import torch
        >>> from transformers import Qwen3Config
        >>> from tq_hb.integrations.transformers import TqCache
        >>> config = Qwen3Config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=256)
        >>> cache = TqCache(config)
        >>> for index in range(2):
        ...     _ = cache.update(*torch.ones(2, 1, 2, 5, 256), index)
        >>> cache.crop(-2)
        >>> cache.get_seq_length()
        3
        """
        for layer in self._holding:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all layers to a file, which replaces one of that name once it is complete.

        It is one that `tq_hb.save_caches` writes of the layers that hold keys. Their mean keys are in it; those that
        ``k_mean="prefill"`` would take from a prefill still to come are not.

        Raises
        ------
        OSError
            If the file cannot be written.

        Examples
        --------
        >>> import tempfile, torch
        >>> from transformers import Qwen3Config
        >>> from tq_hb.integrations.transformers import TqCache
        >>> config = Qwen3Config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=256)
        >>> cache = TqCache(config, v_bits=6, packing="plane")
        >>> for index in range(2):
        ...     _ = cache.update(*torch.ones(2, 1, 2, 5, 256), index)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache.save(f"{folder}/cache.safetensors")
        ...     loaded = TqCache.load(f"{folder}/cache.safetensors", config)
        >>> loaded.get_seq_length(), loaded.bytes_per_token == cache.bytes_per_token
        (5, True)
        """
        op = "TqCache.save"
        write_caches(op, path, [layer.kv._saved(op) for layer in self._holding])

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: Config, device: Any = None) -> TqCache:
        """Read what `save` wrote, for a model of the same shape, on any device; the codes are those saved.

        Parameters
        ----------
        path : str or os.PathLike
        config : transformers.PreTrainedConfig
            The model's config.
        device : str or tq_hb.Device, optional

        Raises
        ------
        tq_hb.InvalidArgument
            If anything in the file is not as `save` makes it, or its layers are not those of `config`.
        OSError
            If the file cannot be opened or read.

        Examples
        --------
        >>> import tempfile
        >>> from transformers import Qwen3Config
        >>> from tq_hb.integrations.transformers import TqCache
        >>> sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 256}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     TqCache(Qwen3Config(num_hidden_layers=2, **sizes)).save(f"{folder}/cache")
        ...     TqCache.load(f"{folder}/cache", Qwen3Config(num_hidden_layers=3, **sizes))
        Traceback (most recent call last):
        tq_hb.InvalidArgument: TqCache.load: path must hold the 3 layers of config that have keys, got 2
        """
        op = "TqCache.load"
        shapes = _shapes(op, config)
        wanted = {index: shape for index, shape in enumerate(shapes) if shape is not None}
        where = resolve_device(op, device)
        saved = read_caches(op, path)
        if len(saved) != len(wanted):
            raise invalid(op, "path", f"must hold the {len(wanted)} layers of config that have keys", len(saved))
        layers: list[Any] = [DummyLayer() for _ in shapes]
        for (index, shape), one in zip(wanted.items(), saved, strict=True):
            found = one.num_kv_heads, one.head_dim, one.sliding_window
            if found != shape:
                rule = f"must hold (KV heads, head_dim, window) {shape} for layer {index}"
                raise invalid(op, "path", rule, found)
            layers[index] = TqLayer(KVCache._restore(op, one, where))
        cache = cls.__new__(cls)
        super(TqCache, cache).__init__(layers=layers)
        return cache


def _shapes(op: str, config: Config) -> list[Shape | None]:
    """Return the shape of every layer's cache; None for those that attend to another layer's keys and values."""
    if not hasattr(config, "get_text_config"):
        raise invalid(op, "config", "must be a transformers config (model.config)", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{op}: config must be of a model without an encoder, got {config.model_type}")
    config = config.get_text_config(decoder=True)
    layer_types, layer_kwargs = get_layer_types_and_kwargs(config)
    shapes: list[Shape | None] = []
    for index, (layer_type, layer_config) in enumerate(zip(layer_types, config.per_layer_config, strict=True)):
        if layer_type == "dummy":
            shapes.append(None)
            continue
        if layer_type not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(f"{op}: layer {index} must be full_attention or sliding_attention, got {layer_type}")
        heads = getattr(layer_config, "num_key_value_heads", None) or layer_config.num_attention_heads
        head_dim = (
            getattr(layer_config, "head_dim", None) or layer_config.hidden_size // layer_config.num_attention_heads
        )
        shapes.append((heads, head_dim, layer_kwargs[index].get("sliding_window")))
    return shapes


def _k_means(k_mean: Any, config: Config, layers: int) -> list[Any]:
    """Return a mean or None per layer."""
    op, field = "TqCache", "k_mean"
    if k_mean is None:
        return [None] * layers
    if isinstance(k_mean, str | os.PathLike):
        if not Path(k_mean).is_file():
            rule = "must be 'prefill' or the path of a Calibration's file"
            raise invalid(op, field, rule, f"{os.fspath(k_mean)!r} (it isn't there)")
        k_mean = Calibration.load(k_mean)
    if isinstance(k_mean, Calibration):
        return list(k_mean.means_for(op, config))
    if isinstance(k_mean, Mapping):
        for layer in k_mean:
            if not (hasattr(layer, "__index__") and 0 <= layer < layers):
                raise invalid(op, field, f"must be for layers 0 to {layers - 1}", f"one for {layer!r}")
        return [k_mean.get(layer) for layer in range(layers)]
    if not isinstance(k_mean, Sequence):
        rule = "must be a Calibration or its path, a sequence or mapping of arrays, or 'prefill'"
        raise invalid(op, field, rule, type(k_mean).__name__)
    if len(k_mean) != layers:
        raise invalid(op, field, f"must be for the model's {layers} layers", len(k_mean))
    return list(k_mean)


def _layer_mean(layer: int, mean: Any, shape: tuple[int, int]) -> Any:
    """Accept one layer's mean; KVCache looks at the values."""
    if mean is None:
        return None
    got = tuple(getattr(mean, "shape", ()))
    if got != shape:
        raise invalid("TqCache", f"k_mean of layer {layer}", f"must have shape {shape}", got)
    return mean.detach().cpu().float() if isinstance(mean, torch.Tensor) else mean
