"""Keep the newest tokens in full precision and the history packed.

The newest keys and values, which most attention goes to, stay as they came; older ones move into a
``tq_hb.KVCache`` at 5 bits per value. Each part is attended to on its own, with the logarithm of the sum of its
weights, and ``tq_hb.merge_states`` puts the two results together: exactly what attention over all of them gives.

Run it: ``python examples/recent_window.py``
"""

from __future__ import annotations

import numpy as np

import tq_hb


class RecentWindow:
    """The cache of one layer: the newest ``recent`` tokens in float32, those before them packed."""

    def __init__(self, num_kv_heads: int, head_dim: int, *, recent: int = 128, bits: int = 5) -> None:
        self.history = tq_hb.KVCache(num_kv_heads, head_dim, k_bits=bits, v_bits=bits, packing="plane")
        self.recent = recent
        self.k = self.v = np.empty((0, num_kv_heads, head_dim), np.float32)

    def __len__(self) -> int:
        return len(self.history) + len(self.k)

    def append(self, k: np.ndarray, v: np.ndarray) -> None:
        """Add tokens, (tokens, num_kv_heads, head_dim); what is recent no more moves into the history."""
        self.k, self.v = np.concatenate([self.k, k]), np.concatenate([self.v, v])
        old = max(0, len(self.k) - self.recent)
        self.history.append(self.k[:old], self.v[:old])
        self.k, self.v = self.k[old:], self.v[old:]

    def attend(self, q: np.ndarray) -> np.ndarray:
        """Attend the newest tokens' queries, (queries, heads, head_dim), to everything up to each of them."""
        # A position is counted from the beginning of a part. The history begins with the first token, so there it is
        # what it is in the whole; the queries may stand beyond its end.
        packed = self.history.attend(q, q_offset=len(self) - 1, return_lse=True)
        output, _ = tq_hb.merge_states(*packed, *self._attend_recent(q))
        return output

    def _attend_recent(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Attention in full precision: the output, and the logarithm of the sum of exp(score)."""
        queries, heads, head_dim = q.shape
        grouped = q.reshape(queries, self.k.shape[1], -1, head_dim)
        scores = np.einsum("nghd,tgd->nght", grouped, self.k) * head_dim**-0.5
        newer = np.arange(len(self.k)) > np.arange(len(self.k) - queries, len(self.k))[:, None]
        scores = np.where(newer[:, None, None, :], -np.inf, scores)
        top = scores.max(axis=-1, keepdims=True)
        top[np.isneginf(top)] = 0  # a query that sees no recent token
        weights = np.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        with np.errstate(divide="ignore"):
            lse = (top + np.log(total))[..., 0].reshape(queries, heads)
        output = np.einsum("nght,tgd->nghd", weights / np.maximum(total, 1e-30), self.v)
        return output.reshape(q.shape).astype(np.float32), lse.astype(np.float32)


def main() -> None:
    """Compare the output with attention in full precision, and the memory with that of float16.

    Keys drift from token to token and the query is like the newest of them, so most weight falls on recent tokens.
    """
    rng = np.random.default_rng(0)
    heads, kv_heads, head_dim, length = 8, 2, 128, 2000
    k, v = rng.standard_normal((2, length, kv_heads, head_dim), dtype=np.float32)
    for t in range(1, length):
        k[t] = 0.99 * k[t - 1] + 0.14 * k[t]
    q = np.repeat(k[-1:], heads // kv_heads, axis=1)

    exact, mixed = RecentWindow(kv_heads, head_dim, recent=length), RecentWindow(kv_heads, head_dim)
    packed = tq_hb.KVCache(kv_heads, head_dim, k_bits=5, v_bits=5, packing="plane")
    for cache in (exact, mixed, packed):
        cache.append(k, v)

    want = exact.attend(q)
    for name, cache in (("newest 128 in full precision", mixed), ("everything packed", packed)):
        error = np.linalg.norm(cache.attend(q) - want) / np.linalg.norm(want)
        print(f"{name}: relative error {error:.4f}")
    bytes_per_token = mixed.history.bytes_per_token
    print(f"{bytes_per_token} bytes per packed token; {4 * kv_heads * head_dim} in float16")


if __name__ == "__main__":
    main()
