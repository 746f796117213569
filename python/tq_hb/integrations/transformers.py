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

import copy
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

try:
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, get_layer_types_and_kwargs
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:  # one of them is not there, or too old
    raise type(error)(
        f"{__name__}: needs torch and transformers, got {error}. Install them: pip install 'tq-hb[transformers]', or "
        "from a checkout pip install '.[transformers]'.",
        name=error.name,
    ) from error

from tq_hb import InvalidArgument, KVCache, UnsupportedError
from tq_hb.device import resolve_device
from tq_hb.files import read_caches, write_caches
from tq_hb.integrations.calibration import Calibration
from tq_hb.integrations.key_means import MIN_PREFILL, calibrate, prefill_mean
from tq_hb.options import invalid

__all__ = ["ATTENTION_NAME", "MIN_PREFILL", "TqCache", "calibrate", "enable"]

ATTENTION_NAME = "tq_hb"
"""What the attention and mask functions are registered as, for ``attn_implementation=``."""

_UNSUPPORTED = ("position_bias", "sinks", "indices", "block_indices")
"""Keywords of transformers' attention functions that change the result, and are not supported."""

_HIDING = -1e4
"""An additive mask hides a key by at most this; a number between it and 0 is a bias."""

Config: TypeAlias = Any
Model: TypeAlias = Any
Plan: TypeAlias = Any
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
            raise InvalidArgument(f"TqCache: rollback must be an integer of at least 0, got {rollback!r}")
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
                    raise InvalidArgument(f"TqCache: k_mean must be None for layer {index}, which holds no keys")
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
        write_caches("TqCache.save", path, [layer.kv._saved() for layer in self._holding])

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
            raise InvalidArgument(
                f"{op}: path must hold the {len(wanted)} layers of config that have keys, got {len(saved)}"
            )
        layers: list[Any] = [DummyLayer() for _ in shapes]
        for (index, shape), one in zip(wanted.items(), saved, strict=True):
            found = one.num_kv_heads, one.head_dim, one.sliding_window
            if found != shape:
                raise InvalidArgument(
                    f"{op}: path must hold (KV heads, head_dim, window) {shape} for layer {index}, got {found}"
                )
            layers[index] = TqLayer(KVCache._restore(op, one, where))
        cache = cls.__new__(cls)
        super(TqCache, cache).__init__(layers=layers)
        return cache


class TqLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a `TqCache`: transformers' layer protocol over a `tq_hb.KVCache`.

    >>> from tq_hb import KVCache
    >>> from tq_hb.integrations.transformers import TqLayer
    >>> layer = TqLayer(KVCache(1, 256, sliding_window=512))
    >>> layer.is_sliding, layer.get_max_length()
    (True, 512)
    """

    def __init__(self, kv: KVCache, make_kv: Callable[..., KVCache] | None = None) -> None:
        """Hold `kv`, or with `make_kv` at the first prefill what it makes of ``k_mean=``."""
        super().__init__()
        self.kv = kv
        self._make_kv = make_kv
        self.is_initialized = True
        self.is_sliding = kv.sliding_window is not None
        # Whether cropping works however many tokens have been seen.
        self.is_croppable = kv.sliding_window is None or kv.capacity > kv.sliding_window

    def __repr__(self) -> str:
        return f"TqLayer({self.kv!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> TqLayer:
        clone = copy.copy(self)
        clone.kv = self.kv.copy()
        return clone

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the cache was made from the model's config.

        >>> import torch
        >>> from tq_hb import KVCache
        >>> from tq_hb.integrations.transformers import TqLayer
        >>> layer = TqLayer(KVCache(1, 256))
        >>> layer.lazy_initialization(*torch.ones(2, 1, 1, 3, 256))
        >>> layer.get_seq_length()
        0
        """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Any, Any]:
        """Encode the new tokens and return what the attention function shall attend to.

        Parameters
        ----------
        key_states, value_states : torch.Tensor, shape (1, kv_heads, tokens, head_dim)

        Returns
        -------
        tuple
            Full-precision keys and values, shape (1, kv_heads, visible, head_dim), or `CodesOnly`, twice.

        Examples
        --------
        >>> import torch
        >>> from tq_hb import KVCache
        >>> from tq_hb.integrations.transformers import TqLayer
        >>> layer = TqLayer(KVCache(1, 256))
        >>> keys, values = layer.update(*torch.ones(2, 1, 1, 3, 256))
        >>> keys.shape
        torch.Size([1, 1, 3, 256])
        >>> keys, values = layer.update(*torch.ones(2, 1, 1, 1, 256))
        >>> type(keys).__name__
        'CodesOnly'
        """
        if key_states.shape[0] != 1:
            raise _only_one(key_states.shape[0])
        if self.kv.offset == 0:
            if self._make_kv is not None:
                self.kv = self._make_kv(k_mean=prefill_mean(_token_major(key_states)))
            keys: Any = key_states
            values: Any = value_states
        elif self._keeps_in_view(key_states.shape[2]):
            keys = values = CodesOnly(self.kv)
        else:
            keys, values = self._visible_past(key_states)
            keys = torch.cat([keys, key_states], dim=2)
            values = torch.cat([values, value_states], dim=2)
        self.kv.append(_token_major(key_states), _token_major(value_states))
        return keys, values

    def _keeps_in_view(self, tokens: int) -> bool:
        """Tell whether appending so many tokens overwrites nothing that the first of them sees."""
        kv = self.kv
        if kv.sliding_window is None:
            return True
        oldest_held = max(0, kv.offset + tokens - kv.capacity)
        return oldest_held <= max(0, kv.offset - kv.sliding_window + 1)

    def _visible_past(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the next token sees of the keys and values held, decoded, in the model's layout."""
        length = self._visible_past_length()
        k, v = (torch.from_numpy(x[len(x) - length :]).transpose(0, 1) for x in self.kv.dequantize())
        return k[None].to(like), v[None].to(like)

    def _visible_past_length(self) -> int:
        window = self.kv.sliding_window
        return len(self.kv) if window is None else min(len(self.kv), window - 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the next `query_length` tokens are masked over, and the position of the first.

        >>> import torch
        >>> from tq_hb import KVCache
        >>> from tq_hb.integrations.transformers import TqLayer
        >>> layer = TqLayer(KVCache(1, 256, sliding_window=4))
        >>> _ = layer.update(*torch.ones(2, 1, 1, 6, 256))
        >>> layer.get_mask_sizes(2)  # the three last tokens and the two new ones
        (5, 3)
        """
        past = self._visible_past_length()
        return past + query_length, self.kv.offset - past

    def get_seq_length(self) -> int:
        """Return the number of tokens seen.

        >>> import torch
        >>> from tq_hb import KVCache
        >>> from tq_hb.integrations.transformers import TqLayer
        >>> layer = TqLayer(KVCache(1, 256, sliding_window=4))
        >>> _ = layer.update(*torch.ones(2, 1, 1, 6, 256))
        >>> layer.get_seq_length()
        6
        """
        return int(self.kv.offset)

    def get_max_length(self) -> int:
        """Return the window, or -1 where there is no maximum.

        >>> from tq_hb import KVCache
        >>> from tq_hb.integrations.transformers import TqLayer
        >>> layer = TqLayer(KVCache(1, 256))
        >>> layer.get_max_length(), TqLayer(KVCache(1, 256, sliding_window=4)).get_max_length()
        (-1, 4)
        """
        return -1 if self.kv.sliding_window is None else int(self.kv.sliding_window)

    def reset(self) -> None:
        """Forget everything.

        >>> import torch
        >>> from tq_hb import KVCache
        >>> from tq_hb.integrations.transformers import TqLayer
        >>> layer = TqLayer(KVCache(1, 256))
        >>> _ = layer.update(*torch.ones(2, 1, 1, 3, 256))
        >>> layer.reset()
        >>> layer.get_seq_length()
        0
        """
        self.kv.clear()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what `crop` would raise; see `TqCache.crop`.

        >>> from tq_hb import KVCache
        >>> from tq_hb.integrations.transformers import TqLayer
        >>> layer = TqLayer(KVCache(1, 256))
        >>> layer.check_crop(-1)
        Traceback (most recent call last):
        tq_hb.InvalidArgument: TqCache.crop: tokens_to_remove must be from -0 (the tokens seen) to 0, got -1
        """
        count, kv = -tokens_to_remove, self.kv
        if not 0 <= count <= kv.offset:
            raise InvalidArgument(
                f"TqCache.crop: tokens_to_remove must be from -{kv.offset} (the tokens seen) to 0, "
                f"got {tokens_to_remove}"
            )
        # Once a ring has overwritten tokens, what is left must still fill the window.
        spare = len(kv) - (kv.sliding_window or 0)
        if len(kv) < kv.offset and count > spare:
            raise UnsupportedError(
                f"TqCache.crop: tokens_to_remove must be at least {-spare} after a sliding-window layer has wrapped "
                f"(make the cache with a larger rollback), got {tokens_to_remove}"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; see `TqCache.crop`.

        >>> import torch
        >>> from tq_hb import KVCache
        >>> from tq_hb.integrations.transformers import TqLayer
        >>> layer = TqLayer(KVCache(1, 256))
        >>> _ = layer.update(*torch.ones(2, 1, 1, 3, 256))
        >>> layer.crop(-1)
        >>> layer.get_seq_length()
        2
        """
        self.check_crop(tokens_to_remove)
        self.kv.trim(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> NoReturn:
        """Raise: beams need a batch.

        >>> import torch
        >>> from tq_hb import KVCache
        >>> from tq_hb.integrations.transformers import TqLayer
        >>> layer = TqLayer(KVCache(1, 256))
        >>> layer.reorder_cache(torch.tensor([1, 0]))
        Traceback (most recent call last):
        tq_hb.UnsupportedError: TqCache: beams are not supported, got a reordering by [1, 0]
        """
        raise UnsupportedError(f"TqCache: beams are not supported, got a reordering by {beam_idx.tolist()}")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Raise: batches are not supported.

        >>> from tq_hb import KVCache
        >>> from tq_hb.integrations.transformers import TqLayer
        >>> layer = TqLayer(KVCache(1, 256))
        >>> layer.batch_repeat_interleave(4)
        Traceback (most recent call last):
        tq_hb.UnsupportedError: TqCache: batch must be 1 (use a TqCache for each sequence), got 4 repeats
        """
        raise _only_one(f"{repeats} repeats")

    def batch_select_indices(self, indices: torch.Tensor) -> NoReturn:
        """Raise: batches are not supported.

        >>> import torch
        >>> from tq_hb import KVCache
        >>> from tq_hb.integrations.transformers import TqLayer
        >>> layer = TqLayer(KVCache(1, 256))
        >>> layer.batch_select_indices(torch.tensor([0, 2]))
        Traceback (most recent call last):
        tq_hb.UnsupportedError: TqCache: batch must be 1 (use a TqCache for each sequence), got 2 selected
        """
        raise _only_one(f"{len(indices)} selected")


class CodesOnly:
    """Stands in for the keys and values of a decode step, which exist as codes only.

    Only this module's attention function can use it. Anything else that touches it, say another attention
    implementation, gets an error instead of a wrong result.

    >>> from tq_hb import KVCache
    >>> from tq_hb.integrations.transformers import CodesOnly
    >>> CodesOnly(KVCache(1, 256)).shape  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tq_hb.UnsupportedError: TqCache: attn_implementation must be 'tq_hb' ...
    """

    def __init__(self, kv: KVCache) -> None:
        self.kv = kv

    def __getattr__(self, name: str) -> NoReturn:
        # Python's own protocols (copy, pickle, numpy) probe for optional methods and expect an AttributeError.
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    @classmethod
    def __torch_function__(cls, *_args: Any, **_kwargs: Any) -> NoReturn:
        cls._refuse()

    @staticmethod
    def _refuse() -> NoReturn:
        raise UnsupportedError(
            f"TqCache: attn_implementation must be {ATTENTION_NAME!r} (call "
            "tq_hb.integrations.transformers.enable on the model), got a model that attends in another way"
        )


def _only_one(got: object) -> UnsupportedError:
    return UnsupportedError(f"TqCache: batch must be 1 (use a TqCache for each sequence), got {got}")


def _shapes(op: str, config: Config) -> list[Shape | None]:
    """Return the shape of every layer's cache; None for those that attend to another layer's keys and values."""
    if not hasattr(config, "get_text_config"):
        raise InvalidArgument(f"{op}: config must be a transformers config (model.config), got {type(config).__name__}")
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
    if isinstance(k_mean, str | os.PathLike):
        if not Path(k_mean).is_file():
            raise InvalidArgument(
                f"TqCache: k_mean must be 'prefill' or the path of a Calibration's file, got {os.fspath(k_mean)!r} (it "
                "isn't there)"
            )
        k_mean = Calibration.load(k_mean)
    if isinstance(k_mean, Calibration):
        model_type = config.get_text_config(decoder=True).model_type
        if k_mean.model_type != model_type:
            raise InvalidArgument(
                f"TqCache: k_mean must be of a model of type {model_type!r}, got one of {k_mean.model_type!r}"
            )
        k_mean = k_mean.k_means
    if k_mean is None:
        return [None] * layers
    if isinstance(k_mean, Mapping):
        for layer in k_mean:
            if not (hasattr(layer, "__index__") and 0 <= layer < layers):
                raise InvalidArgument(f"TqCache: k_mean must be for layers 0 to {layers - 1}, got one for {layer!r}")
        return [k_mean.get(layer) for layer in range(layers)]
    if not isinstance(k_mean, Sequence):
        raise InvalidArgument(
            "TqCache: k_mean must be a Calibration or its path, a sequence or mapping of arrays, or 'prefill', "
            f"got {type(k_mean).__name__}"
        )
    if len(k_mean) != layers:
        raise InvalidArgument(f"TqCache: k_mean must be for the model's {layers} layers, got {len(k_mean)}")
    return list(k_mean)


def _layer_mean(layer: int, mean: Any, shape: tuple[int, int]) -> Any:
    """Accept one layer's mean; KVCache looks at the values."""
    if mean is None:
        return None
    got = tuple(getattr(mean, "shape", ()))
    if got != shape:
        raise InvalidArgument(f"TqCache: k_mean of layer {layer} must have shape {shape}, got {got}")
    return mean.detach().cpu().float() if isinstance(mean, torch.Tensor) else mean


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' attention functions do, on codes where `TqLayer.update` gave `CodesOnly`.

    Parameters
    ----------
    module : torch.nn.Module
        The attention layer.
    query : torch.Tensor, shape (batch, heads, queries, head_dim)
    key, value : torch.Tensor, shape (batch, kv_heads, keys, head_dim), or CodesOnly
    attention_mask : torch.Tensor, shape (batch, 1, queries, keys), optional
        True or 0 for keys that are seen. None: as `is_causal` says.
    scaling : float, optional
        Multiplies the scores. Default ``head_dim ** -0.5``.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)``.
    s_aux : torch.Tensor, shape (heads,), optional
        Attention sinks: one more logit per head in the softmax, as GPT-OSS has them.
    dropout : float
        Share of the weights that are dropped.
    is_causal : bool, optional
        Without a mask: whether a query sees keys up to its own place, or all. Default: what the layer says, or True.

    Returns
    -------
    tuple of torch.Tensor, shape (batch, queries, heads, head_dim), and None (attention weights are not kept)

    Raises
    ------
    tq_hb.UnsupportedError
        For position biases, sparse attention and sinks per query; on codes also for dropout, for a mask that is not the
        causal one, and for several queries that are not causal.
    tq_hb.InvalidArgument
        If the mask is of another kind.

    Examples
    --------
    >>> import torch
    >>> from tq_hb.integrations.transformers import attention
    >>> q, k, v = torch.zeros(1, 4, 1, 256), torch.ones(1, 2, 3, 256), torch.ones(1, 2, 3, 256)
    >>> module = torch.nn.Module()
    >>> module.num_key_value_groups, module.is_causal = 2, True
    >>> out, _ = attention(module, q, k, v, None)
    >>> out.shape, float(out.mean())
    (torch.Size([1, 1, 4, 256]), 1.0)
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"attention: {name} is not supported, got {type(module).__name__} with it")
    if key is None:
        raise UnsupportedError(
            "attention: key must be what the cache's update returned, got None (a TqCache can't serve cross attention)"
        )
    if attention_mask is not None and not _is_mask(attention_mask):
        got = getattr(attention_mask, "dtype", type(attention_mask).__name__)
        raise invalid("attention", "attention_mask", "must be a tensor of bool or of a floating type", got)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if isinstance(key, CodesOnly):
        if dropout:
            raise UnsupportedError(f"attention: dropout must be 0 on a TqCache, got {dropout}")
        return _attend_on_codes(key.kv, query, attention_mask, is_causal, scaling, softcap, s_aux), None
    if softcap or s_aux is not None:
        if attention_mask is None and is_causal:
            attention_mask = _causal_mask(query, key)
        # As in the models' own attention, only a layer in training drops weights.
        dropout = dropout if module.training else 0.0
        return _attend_in_full(query, key, value, attention_mask, scaling, softcap, s_aux, dropout), None
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return output, None


def _attend_on_codes(
    kv: KVCache,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    queries = query.shape[2]
    if mask is None and queries > 1 and not is_causal:
        raise UnsupportedError(f"attention: is_causal must be True for several queries on a TqCache, got {queries}")
    if mask is not None and not _is_causal(mask, queries, kv.sliding_window):
        raise UnsupportedError("attention: attention_mask must be causal on a TqCache, got one that hides other keys")
    output: torch.Tensor = kv.attend(
        query[0].transpose(0, 1).detach(),
        scale=scale,
        softcap=softcap or 0.0,
        sinks=None if sinks is None else sinks.detach(),
    )
    return output[None]


def _attend_in_full(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Attend in full precision with a softcap or sinks, which torch's fused attention lacks."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(len(scores), -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.nn.functional.dropout(scores.softmax(dim=-1)[..., : key.shape[2]], dropout)
    output: torch.Tensor = weights.to(value.dtype) @ value
    return output.transpose(1, 2).contiguous()


def _causal_mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Return what `is_causal` means to torch's fused attention, which transformers leaves masks out for.

    One query sees everything. Several are the first tokens: keys beyond theirs are a static cache's empty places.
    """
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril() if queries > 1 else None


def make_mask(*, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Make the mask that `attention` takes, as transformers' mask functions do.

    Without a mask function of its own, an attention function gets no mask at all, and sliding-window layers silently
    see beyond their window.

    Raises
    ------
    tq_hb.UnsupportedError
        If `attention_mask`, shape (batch, tokens), marks padding.

    Examples
    --------
    >>> import torch
    >>> from tq_hb.integrations.transformers import make_mask
    >>> make_mask(attention_mask=torch.tensor([[0, 1, 1]]))
    Traceback (most recent call last):
    tq_hb.UnsupportedError: make_mask: attention_mask must not mark padding, got one that hides 1 tokens
    """
    if attention_mask is not None and not attention_mask.all():
        hidden = int((attention_mask == 0).sum())
        raise UnsupportedError(f"make_mask: attention_mask must not mark padding, got one that hides {hidden} tokens")
    mask: torch.Tensor | None = sdpa_mask(attention_mask=attention_mask, **kwargs)
    return mask


def _is_mask(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and (mask.dtype == torch.bool or mask.is_floating_point())


def _is_causal(mask: torch.Tensor, queries: int, window: int | None) -> bool:
    """Tell whether the queries, being the newest tokens, see just what the cache shows them."""
    if mask.shape[-2] != queries:
        return False
    keys = mask.shape[-1]
    wanted = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    if window is not None:
        wanted = wanted.triu(keys - queries - window + 1)
    if mask.dtype == torch.bool:
        return bool((mask == wanted).all())
    return bool(torch.where(wanted, mask == 0, mask <= _HIDING).all())


def _token_major(states: torch.Tensor) -> torch.Tensor:
    """View (1, kv_heads, tokens, head_dim) as (tokens, kv_heads, head_dim)."""
    return states.detach()[0].transpose(0, 1)


AttentionInterface.register(ATTENTION_NAME, attention)
AttentionMaskInterface.register(ATTENTION_NAME, make_mask)
