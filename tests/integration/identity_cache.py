"""A stand-in for `tq_hb.KVCache` that keeps K and V as they are, so that an adapter can be tested without the codec."""

from __future__ import annotations

import copy
from typing import Any

import torch


class IdentityKVCache:
    """`KVCache`'s protocol over float32 tensors, in the plainest way."""

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        capacity: int | None = None,
        *,
        sliding_window: int | None = None,
        **_options: Any,
    ) -> None:
        self.sliding_window = sliding_window
        self.capacity = capacity
        self.last_plan = None
        self._empty = torch.zeros(0, num_kv_heads, head_dim)
        self.clear()

    def __len__(self) -> int:
        return len(self._k)

    def clear(self) -> None:
        self._k, self._v, self.offset = self._empty, self._empty, 0

    def copy(self) -> IdentityKVCache:
        return copy.copy(self)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self._k, self._v = torch.cat([self._k, k.float()]), torch.cat([self._v, v.float()])
        if self.sliding_window is not None:
            self._k, self._v = self._k[-self.capacity :], self._v[-self.capacity :]
        self.offset += len(k)

    def attend(
        self, q: torch.Tensor, *, scale: float | None, softcap: float, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        return torch.stack([self._attend(q[i], len(q) - 1 - i, scale, softcap, sinks) for i in range(len(q))])

    def _attend(
        self, q: torch.Tensor, newer: int, scale: float | None, softcap: float, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """One query, before which the `newer` newest tokens have not come yet."""
        end = len(self) - newer
        begin = max(0, self.offset - newer - (self.sliding_window or self.offset)) - (self.offset - len(self))
        assert begin >= 0, "a key that the query should see is gone"
        group = q.shape[0] // self._k.shape[1]
        k, v = (x[begin:end].repeat_interleave(group, dim=1) for x in (self._k, self._v))
        scores = torch.einsum("hd,thd->ht", q.float(), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.float()[:, None]], dim=1)
        return torch.einsum("ht,thd->hd", scores.softmax(-1)[:, : end - begin], v).to(q.dtype)

    def dequantize(self) -> tuple[Any, Any]:
        return self._k.numpy(), self._v.numpy()

    def trim(self, n: int) -> None:
        assert n <= len(self)
        self._k, self._v = self._k[: len(self) - n], self._v[: len(self) - n]
        self.offset -= n
