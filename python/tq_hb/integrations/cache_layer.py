"""transformers' protocol of a cache's layer, over a `tq_hb.KVCache`."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from tq_hb import KVCache, UnsupportedError
from tq_hb.integrations.attention import CodesOnly
from tq_hb.integrations.key_means import prefill_mean
from tq_hb.options import invalid


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
        return self.kv.offset

    def get_max_length(self) -> int:
        """Return the window, or -1 where there is no maximum.

        >>> from tq_hb import KVCache
        >>> from tq_hb.integrations.transformers import TqLayer
        >>> layer = TqLayer(KVCache(1, 256))
        >>> layer.get_max_length(), TqLayer(KVCache(1, 256, sliding_window=4)).get_max_length()
        (-1, 4)
        """
        return -1 if self.kv.sliding_window is None else self.kv.sliding_window

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
        if not hasattr(tokens_to_remove, "__index__"):
            raise invalid("TqCache.crop", "tokens_to_remove", "must be an integer", repr(tokens_to_remove))
        count, kv = -operator.index(tokens_to_remove), self.kv
        if not 0 <= count <= kv.offset:
            rule = f"must be from -{kv.offset} (the tokens seen) to 0"
            raise invalid("TqCache.crop", "tokens_to_remove", rule, tokens_to_remove)
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


def _only_one(got: object) -> UnsupportedError:
    return UnsupportedError(f"TqCache: batch must be 1 (use a TqCache for each sequence), got {got}")


def _token_major(states: torch.Tensor) -> torch.Tensor:
    """View (1, kv_heads, tokens, head_dim) as (tokens, kv_heads, head_dim)."""
    return states.detach()[0].transpose(0, 1)
