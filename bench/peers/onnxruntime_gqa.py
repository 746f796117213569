"""ONNX Runtime: its ``GroupQueryAttention``, over a cache that past and present share.

The operator takes the newest token's key and value with the query, and stores them before it attends. Here they are
those that the cache holds at its end already.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bench.peers.contender import Contender, Pair, Problem, Rotation, Storage

# The number type of the cache: that of queries and output, and the error that it explains.
_CACHES = {"float32": ("float32", 1e-5), "float16": ("float16", 1e-2), "int8": ("float32", 5e-2)}
_INT8_MAX = 127


class OnnxRuntimeGqa:
    """The contenders of ONNX Runtime over one cache."""

    def __init__(self, problem: Problem, storage: Storage) -> None:
        self._problem = problem
        self._scales = [_scales(x) for x in (problem.k, problem.v)]
        self._rotations = {name: storage.arrays(name) if name != "int8" else self._quantised() for name in _CACHES}

    def contenders(self, threads: int) -> list[Contender]:
        """Return a call per type of cache."""
        return [self._contender(name, threads) for name in _CACHES]

    def _quantised(self) -> Rotation[Pair]:
        """Return the cache as integers with a scale per channel, which is what the operator offers."""
        k, v = (
            np.rint(x / scales[0]).astype(np.int8)
            for x, scales in zip((self._problem.k, self._problem.v), self._scales, strict=True)
        )
        return Rotation.of_arrays((k, v))

    def _contender(self, name: str, threads: int) -> Contender:
        import onnxruntime

        problem, rotation = self._problem, self._rotations[name]
        io_type, error_limit = _CACHES[name]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(_model(problem, name, io_type), options, ["CPUExecutionProvider"])
        fixed = self._inputs(io_type, name)
        bindings = {id(pair): _binding(session, fixed, pair) for pair in rotation.copies}

        def call() -> onnxruntime.IOBinding:
            binding = bindings[id(rotation.next())]
            session.run_with_iobinding(binding)
            return binding

        def output(binding: onnxruntime.IOBinding) -> npt.NDArray[Any]:
            out: npt.NDArray[Any] = binding.get_outputs()[0].numpy()
            return out.reshape(problem.q.shape)

        return Contender(f"onnxruntime {name}", rotation.nbytes, call, output, error_limit)

    def _inputs(self, io_type: str, cache_type: str) -> dict[str, npt.NDArray[Any]]:
        problem = self._problem
        newest = (np.ascontiguousarray(x[:, -1]) for x in (problem.k, problem.v))
        query, key, value = (x.reshape(1, 1, -1).astype(io_type) for x in (problem.q, *newest))
        inputs = {
            "query": query,
            "key": key,
            "value": value,
            "seqlens_k": np.array([problem.tokens - 1], np.int32),
            "total_sequence_length": np.array(problem.tokens, np.int32),
        }
        if cache_type == "int8":
            inputs["k_scale"], inputs["v_scale"] = self._scales
        return inputs


def _scales(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the steps of the channels: (1, kv_heads, 1, head_dim)."""
    largest: npt.NDArray[np.float32] = np.maximum(x.max(axis=1), -x.min(axis=1))
    return largest[None, :, None, :] / np.float32(_INT8_MAX)


def _model(problem: Problem, cache_type: str, io_type: str) -> bytes:
    """Return a graph of the one operator."""
    from onnx import TensorProto, helper

    number, cache_number = (getattr(TensorProto, _ONNX_NAMES[name]) for name in (io_type, cache_type))
    cache = [1, problem.kv_heads, problem.tokens, problem.head_dim]
    kv_width = problem.kv_heads * problem.head_dim
    width = problem.heads * problem.head_dim
    inputs = [
        ("query", number, [1, 1, width]),
        ("key", number, [1, 1, kv_width]),
        ("value", number, [1, 1, kv_width]),
        ("past_key", cache_number, cache),
        ("past_value", cache_number, cache),
        ("seqlens_k", TensorProto.INT32, [1]),
        ("total_sequence_length", TensorProto.INT32, []),
    ]
    names = [name for name, _, _ in inputs]
    attributes: dict[str, Any] = {"num_heads": problem.heads, "kv_num_heads": problem.kv_heads, "scale": problem.scale}
    if cache_type == "int8":
        scales = [1, problem.kv_heads, 1, problem.head_dim]
        inputs += [("k_scale", TensorProto.FLOAT, scales), ("v_scale", TensorProto.FLOAT, scales)]
        # Between them are inputs that this graph does not use.
        names += ["", "", "", "", "", "k_scale", "v_scale"]
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    outputs = [
        ("output", number, [1, 1, width]),
        ("present_key", cache_number, cache),
        ("present_value", cache_number, cache),
    ]
    node = helper.make_node(
        "GroupQueryAttention", names, [name for name, _, _ in outputs], domain="com.microsoft", **attributes
    )
    values = [[helper.make_tensor_value_info(*value) for value in side] for side in (inputs, outputs)]
    graph = helper.make_graph([node], "attention", *values)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


_ONNX_NAMES = {"float32": "FLOAT", "float16": "FLOAT16", "int8": "INT8"}


def _binding(session: Any, fixed: dict[str, npt.NDArray[Any]], pair: Pair) -> Any:
    """Return inputs and outputs of a call; K and V are used where they are."""
    from onnxruntime import OrtValue

    binding = session.io_binding()
    for name, array in fixed.items():
        binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
    binding.bind_output("output")
    for side, array in zip(("key", "value"), pair, strict=True):
        value = OrtValue.ortvalue_from_numpy(array[None])
        binding.bind_ortvalue_input(f"past_{side}", value)
        binding.bind_ortvalue_output(f"present_{side}", value)
    return binding
