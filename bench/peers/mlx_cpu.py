"""MLX on its CPU device: the fused attention over float32, and quantised products over its affine groups.

Its attention over float16 and bfloat16, which was slower than over float32 wherever we tried, is left out. MLX has no
setting for its number of threads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.peers.contender import Contender, Problem, Rotation, Storage

_GROUP = 64
# Bits, and the error that they explain.
_AFFINE = {8: 1.3e-2, 6: 5e-2}


class MlxCpu:
    """The contenders of MLX over one cache."""

    def __init__(self, problem: Problem, storage: Storage) -> None:
        import mlx.core as mx

        del storage  # MLX has memory of its own
        mx.set_default_device(mx.cpu)
        self._problem = problem
        self._contenders = [self._float32(), *(self._affine(bits) for bits in _AFFINE)]

    def contenders(self, threads: int) -> list[Contender]:
        """Return a call per type of cache; `threads` has no effect on them."""
        del threads
        return self._contenders

    def _float32(self) -> Contender:
        import mlx.core as mx

        problem = self._problem
        q = mx.array(problem.q)[None, :, None]
        first = (mx.array(problem.k)[None], mx.array(problem.v)[None])
        rotation = _rotation(first)

        def call() -> Any:
            out = mx.fast.scaled_dot_product_attention(q, *rotation.next(), scale=problem.scale)
            mx.eval(out)
            return out

        return Contender("mlx float32", rotation.nbytes, call, self._output, 1e-5)

    def _affine(self, bits: int) -> Contender:
        import mlx.core as mx

        problem = self._problem
        rows = mx.array(problem.q).reshape(1, problem.kv_heads, -1, problem.head_dim) * problem.scale
        sides = (mx.quantize(mx.array(x)[None], group_size=_GROUP, bits=bits) for x in (problem.k, problem.v))
        rotation = _rotation(tuple(part for side in sides for part in side))
        product: Any = partial(mx.quantized_matmul, group_size=_GROUP, bits=bits)

        def call() -> Any:
            parts = rotation.next()
            scores = product(rows, *parts[:3], transpose=True)
            out = product(mx.softmax(scores, axis=-1), *parts[3:], transpose=False)
            mx.eval(out)
            return out

        return Contender(f"mlx affine {bits}", rotation.nbytes, call, self._output, _AFFINE[bits])

    def _output(self, out: Any) -> npt.NDArray[Any]:
        return np.array(out).reshape(self._problem.q.shape)


def _rotation(arrays: tuple[Any, ...]) -> Rotation[tuple[Any, ...]]:
    import mlx.core as mx

    mx.eval(*arrays)

    def copy(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        copies = tuple(mx.array(np.array(array)) for array in arrays)
        mx.eval(*copies)
        return copies

    return Rotation(arrays, copy, sum(array.nbytes for array in arrays))
