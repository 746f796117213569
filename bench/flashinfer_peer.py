"""FlashInfer's decode attention beside ours: its headers, compiled here by nvcc."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HEAD_DIMS = (128, 256)
_INCLUDES = ("cccl/libcudacxx/include", "cccl/cub", "cccl/thrust", "include", "cutlass/include")
_SOURCE = Path(__file__).with_name("flashinfer_decode.cu")

Calls = Sequence[Callable[[Any], None]]


class FlashInfer:
    """The library of its two kernels; raises RuntimeError where it cannot be made."""

    def __init__(self) -> None:
        spec, nvcc = importlib.util.find_spec("flashinfer"), shutil.which("nvcc")
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeError("flashinfer-python is not installed")
        if nvcc is None:
            raise RuntimeError("nvcc is not there")
        data = Path(spec.submodule_search_locations[0]) / "data"
        self._folder = tempfile.TemporaryDirectory()
        library = Path(self._folder.name) / "flashinfer_decode.so"
        options = ["-O3", "-std=c++17", "-arch=native", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC", "-shared"]
        includes = [f"-I{data / folder}" for folder in _INCLUDES]
        built = subprocess.run(
            [nvcc, *options, *includes, str(_SOURCE), "-o", str(library)], check=False, capture_output=True, text=True
        )
        if built.returncode != 0:
            raise RuntimeError(f"its headers do not compile: {built.stderr[-500:]}")
        self._attend = ctypes.CDLL(str(library)).flashinfer_attend
        self._attend.argtypes = [
            *(ctypes.c_int, ctypes.c_int, ctypes.c_uint),
            *(ctypes.c_void_p,) * 5,
            *(ctypes.c_uint,) * 3,
            *(ctypes.c_float, ctypes.c_void_p),
        ]
        self.version = importlib.metadata.version("flashinfer-python")

    def measure(
        self, shape: tuple[int, int, int, int], sets: int, time_calls: Callable[[Calls], float], min_calls: int
    ) -> dict[str, dict[str, float]]:
        """Time both kernels over float16 and float8, each on as many caches; the faster counts.

        The error is relative, in the 2-norm, against float64 attention over the same stored values.
        """
        import torch

        heads, kv_heads, head_dim, keys = shape
        q = torch.randn((heads, head_dim), dtype=torch.float16, device="cuda")
        output = torch.empty_like(q)
        tmp = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
        results = {}
        for name, dtype in (("float16", torch.float16), ("float8", torch.float8_e4m3fn)):
            caches = [
                torch.randn((2, kv_heads, keys, head_dim), dtype=torch.float16, device="cuda").to(dtype)
                for _ in range(sets)
            ]

            def call(on_tensor_cores: int, cache: Any, stream: Any) -> None:
                address = torch.cuda.current_stream().cuda_stream if stream is None else stream.cuda_stream
                pointers = (x.data_ptr() for x in (q, cache[0], cache[1], output, tmp))
                is_float8 = int(cache.element_size() == 1)
                sizes = (heads, kv_heads, keys, head_dim**-0.5)
                failed = self._attend(is_float8, on_tensor_cores, head_dim, *pointers, *sizes, address)
                if failed:
                    raise RuntimeError(f"FlashInfer does not take {shape} of {cache.dtype}: error {failed}")

            best: dict[str, float] | None = None
            for on_tensor_cores in (0, 1):
                output.fill_(float("nan"))
                call(on_tensor_cores, caches[0], None)
                error = _error(q, caches[0], output)
                calls = [functools.partial(call, on_tensor_cores, cache) for cache in caches] * -(-min_calls // sets)
                seconds = time_calls(calls)
                if best is None or seconds < best["seconds"]:
                    best = {"seconds": seconds, "error": error}
            assert best is not None
            results[name] = best
            del caches
        return results


def _error(q: Any, cache: Any, output: Any) -> float:
    import torch

    group = q.shape[0] // cache.shape[1]
    rows = []
    for head in range(cache.shape[1]):
        k, v = (side[head].to(torch.float16).double() for side in cache)
        scores = q[head * group : (head + 1) * group].double() @ k.T * q.shape[1] ** -0.5
        rows.append(torch.softmax(scores, -1) @ v)
    want = torch.cat(rows)
    return float((output.double() - want).norm() / want.norm())
