"""OpenVINO: its attention with a cache of its own, which is the state of a model that keeps K and V.

A call hands over the newest token's key and value, and the cache grows by it: a few tokens in the course of a run.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.peers.contender import Contender, Problem, Rotation, Storage

TURBO_REASON = "such a cache can't be set, only be built by attending, which takes time as the square of its length"

# The cache's number type, bytes per value without scales, and the error that it explains.
_CACHES = {"f16": (2, 1e-2), "u8": (1, 3e-2)}


class OpenVinoSdpa:
    """The contenders of OpenVINO over one cache."""

    def __init__(self, problem: Problem, storage: Storage) -> None:
        del storage  # the model's state has memory of its own
        self._problem = problem

    def contenders(self, threads: int) -> list[Contender]:
        """Return a call per type of cache."""
        return [self._contender(name, threads) for name in _CACHES]

    def _contender(self, name: str, threads: int) -> Contender:
        import openvino

        problem, (itemsize, error_limit) = self._problem, _CACHES[name]
        options: dict[str, Any] = {"KV_CACHE_PRECISION": name, "INFERENCE_PRECISION_HINT": "f32"}
        options |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        compiled = openvino.Core().compile_model(_model(problem), "CPU", options)
        request = partial(self._request, compiled)
        nbytes = problem.values * itemsize
        rotation: Rotation[Any] = Rotation(request(), lambda _: request(), nbytes)

        def call() -> Any:
            current = rotation.next()
            current.infer(share_outputs=True)
            return current

        return Contender(f"openvino {name}", nbytes, call, self._output, error_limit)

    def _request(self, compiled: Any) -> Any:
        """Return a request whose next call makes its cache complete."""
        from openvino import Tensor

        problem, request = self._problem, compiled.create_infer_request()
        fixed = {"q": problem.q[None, :, None], "beam": np.zeros(1, np.int32)}
        held, last_but_one, last = (
            {side: np.ascontiguousarray(x[None]) for side, x in zip("kv", parts, strict=True)}
            for parts in zip(*(np.split(x, [-2, -1], axis=1) for x in (problem.k, problem.v)), strict=True)
        )
        request.infer(fixed | last)  # makes the states, which are then replaced
        for state in request.query_state():
            state.state = Tensor(held[state.name[-1]])
        request.infer(fixed | last_but_one)  # makes room for more tokens, so that no call has to
        for name, array in (fixed | last).items():
            request.set_tensor(name, Tensor(array))
        return request

    def _output(self, request: Any) -> npt.NDArray[Any]:
        out: npt.NDArray[Any] = request.get_output_tensor(0).data
        return out.reshape(self._problem.q.shape).copy()


def _model(problem: Problem) -> Any:
    """Return a model that appends K and V to its state and attends to it."""
    import openvino
    from openvino import opset6, opset13

    heads, kv_heads, width = problem.heads, problem.kv_heads, problem.head_dim
    q, k, v = (
        opset13.parameter([1, count, -1, width], np.float32, name=name)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    beam = opset13.parameter([-1], np.int32, name="beam")
    sinks, sides = [], []
    for name, newest in (("past_k", k), ("past_v", v)):
        empty = opset13.constant(np.zeros((1, kv_heads, 0, width), np.float32))
        shape = openvino.PartialShape([1, kv_heads, -1, width])
        past = opset6.read_value(empty, name, openvino.Type.f32, shape)
        past = opset13.gather(past, beam, opset13.constant(np.int64(0)))
        side = opset13.concat([past, newest], 2)
        sinks.append(opset6.assign(side, name))
        if heads != kv_heads:  # the form of a repeated KV head that OpenVINO recognises, and does not carry out
            group = opset13.constant(np.array([1, 1, heads // kv_heads, 1, 1]))
            side = opset13.unsqueeze(side, opset13.constant(np.int64(2)))
            side = opset13.broadcast(side, group, broadcast_spec="BIDIRECTIONAL")
            side = opset13.reshape(side, opset13.constant(np.array([0, heads, -1, width])), special_zero=True)
        sides.append(side)
    attention = opset13.scaled_dot_product_attention(q, *sides, causal=False)
    return openvino.Model([opset13.result(attention)], sinks, [q, k, v, beam], "attention")
