"""PyTorch: ``scaled_dot_product_attention``.

The query heads of a KV head go in as rows of one query. With ``enable_gqa``, which is measured over float32 beside it,
16-bit numbers took 5 to 20 times as long as so, and are left out.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bench.peers.contender import Contender, Pair, Problem, Rotation, Storage

# The number type, and the error that it explains.
_DTYPES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 2e-2}


class TorchSdpa:
    """The contenders of torch over one cache."""

    def __init__(self, problem: Problem, storage: Storage) -> None:
        import torch

        self._problem = problem
        self._tensors: dict[str, Rotation[Pair]] = {}
        self._views: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for name in _DTYPES:
            rotation = self._tensors[name] = storage.arrays(name)
            for pair in rotation.copies:
                k, v = (torch.from_numpy(array).view(getattr(torch, name)).unsqueeze(0) for array in pair)
                self._views[id(pair)] = (k, v)

    def contenders(self, threads: int) -> list[Contender]:
        """Return the calls; all later calls of torch use as many threads."""
        import torch

        torch.set_num_threads(threads)
        return [*(self._contender(name, False) for name in _DTYPES), self._contender("float32", True)]

    def _contender(self, name: str, enable_gqa: bool) -> Contender:
        import torch

        problem, rotation, views = self._problem, self._tensors[name], self._views
        attend = torch.nn.functional.scaled_dot_product_attention
        heads = problem.heads if enable_gqa else problem.kv_heads
        query = torch.from_numpy(problem.q).view(1, heads, -1, problem.head_dim).to(getattr(torch, name))

        def call() -> torch.Tensor:
            with torch.inference_mode():
                return attend(query, *views[id(rotation.next())], enable_gqa=enable_gqa)

        def output(result: torch.Tensor) -> npt.NDArray[np.float32]:
            array: npt.NDArray[np.float32] = result.reshape(problem.q.shape).float().numpy()
            return array

        return Contender(
            name=f"torch {name}" + (" enable_gqa" if enable_gqa else ""),
            nbytes=rotation.nbytes,
            call=call,
            output=output,
            error_limit=_DTYPES[name],
        )
