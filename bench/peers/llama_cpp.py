"""llama.cpp: ``ggml_flash_attn_ext`` of its CPU backend, over the types that its KV cache can have.

``python -m bench.peers.llama_cpp`` builds it for this machine, in build/peers/: ggml from the source package of
llama-cpp-python in the version that constraints.txt names, and ``ggml_attention.cpp`` on top. A second run builds only
what has changed, and needs no network.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import harness
from bench.peers.contender import Contender, Pair, Problem, Rotation, Storage, UnavailableError

_PACKAGE = "llama-cpp-python"
_FOLDER = harness.ROOT / "build" / "peers"
_LIBRARY = _FOLDER / "ggml" / "ggml_attention.so"
_SETUP = "python -m bench.peers.llama_cpp"

# ggml's name of the type, and the error that it explains. Outputs of f16 are summed in f16.
_TYPES = {"f32": 1e-5, "f16": 1e-2, "bf16": 2e-2, "q8_0": 3e-2, "q5_0": 0.15, "q4_0": 0.3}
_PLAIN = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def setup() -> Path:
    """Build the library, and return its path."""
    name = f"llama_cpp_python-{_pinned_version()}"
    source = _FOLDER / name / "vendor" / "llama.cpp" / "ggml"
    if not source.is_dir():
        _download()
        _unpack(_FOLDER / f"{name}.tar.gz")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}"]
    options = ["-DCMAKE_BUILD_TYPE=Release", f"-DGGML_SOURCE={source}"]
    build = _LIBRARY.parent
    subprocess.run([_tool("cmake"), "-S", Path(__file__).parent, "-B", build, *generator, *options], check=True)
    subprocess.run([_tool("cmake"), "--build", build], check=True)
    return _LIBRARY


def _pinned_version() -> str:
    pins = (line.partition("==") for line in (harness.ROOT / "constraints.txt").read_text().splitlines())
    return next(version for package, _, version in pins if package == _PACKAGE)


def _download() -> None:
    options = ["--no-deps", "--no-build-isolation", "--no-binary", _PACKAGE, "-d", str(_FOLDER)]
    package = f"{_PACKAGE}=={_pinned_version()}"
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", *options, package], check=True)


def _unpack(archive: Path) -> None:
    """Take ggml and its license out of the source package, and remove the package."""
    top = f"{archive.name.removesuffix('.tar.gz')}/vendor/llama.cpp"
    with tarfile.open(archive) as package:
        members = [member for member in package if member.name.startswith((f"{top}/ggml/", f"{top}/LICENSE"))]
        package.extractall(_FOLDER, members, filter="data")
    archive.unlink()


def _tool(name: str) -> str:
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise SystemExit(f"{_SETUP}: {name} is missing")
    return path


def version() -> str:
    """Return ggml's version.

    Raises
    ------
    UnavailableError
        If the library has not been built.
    """
    text: bytes = _library().tq_ggml_version()
    return f"ggml {text.decode()}"


@cache
def _library() -> ctypes.CDLL:
    if not _LIBRARY.exists():
        raise UnavailableError(f"not built, run `{_SETUP}`")
    library = ctypes.CDLL(str(_LIBRARY))
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "version": (ctypes.c_char_p, []),
        "type": (integer, [ctypes.c_char_p]),
        "row_bytes": (ctypes.c_size_t, [integer, size]),
        "convert": (None, [integer, pointer, pointer, size, size]),
        "threads_new": (pointer, [integer]),
        "threads_resume": (None, [pointer]),
        "threads_pause": (None, [pointer]),
        "attention_new": (pointer, [integer, *[pointer] * 4, *[size] * 4, ctypes.c_float, integer, pointer]),
        "attention_compute": (integer, [pointer]),
        "attention_free": (None, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"tq_ggml_{name}")
        function.restype, function.argtypes = result, arguments
    return library


@cache
def _threads(count: int) -> int:
    """Return ggml's pool of that many threads, which lives as long as this process."""
    pool: int = _library().tq_ggml_threads_new(count)
    return pool


@contextmanager
def _awake(pool: int) -> Iterator[None]:
    _library().tq_ggml_threads_resume(pool)
    try:
        yield
    finally:
        _library().tq_ggml_threads_pause(pool)


class _Attention:
    """A graph over one copy of K and V."""

    def __init__(self, ggml_type: int, problem: Problem, arrays: Pair, threads: int) -> None:
        self.out = np.empty_like(problem.q)
        self._arrays = (problem.q, *arrays, self.out)
        shape = (problem.heads, problem.kv_heads, problem.head_dim, problem.tokens)
        addresses = (array.ctypes.data for array in self._arrays)
        self._library = _library()
        self._handle = self._library.tq_ggml_attention_new(
            ggml_type, *addresses, *shape, problem.scale, threads, _threads(threads)
        )

    def compute(self) -> npt.NDArray[np.float32]:
        status = self._library.tq_ggml_attention_compute(self._handle)
        if status != 0:
            raise RuntimeError(f"ggml_graph_compute: status must be 0, got {status}")
        return self.out

    def __del__(self) -> None:
        self._library.tq_ggml_attention_free(self._handle)


class LlamaCpp:
    """The contenders of llama.cpp over one cache."""

    def __init__(self, problem: Problem, storage: Storage) -> None:
        self._problem = problem
        self._rotations = {
            name: storage.arrays(_PLAIN[name]) if name in _PLAIN else _quantised(name, problem) for name in _TYPES
        }

    def contenders(self, threads: int) -> list[Contender]:
        """Return a call per type of cache."""
        return [self._contender(name, threads) for name in _TYPES]

    def _contender(self, name: str, threads: int) -> Contender:
        rotation = self._rotations[name]
        ggml_type = _library().tq_ggml_type(name.encode())
        graphs = {id(pair): _Attention(ggml_type, self._problem, pair, threads) for pair in rotation.copies}
        return Contender(
            name=f"llama.cpp {name}",
            nbytes=rotation.nbytes,
            call=lambda: graphs[id(rotation.next())].compute(),
            output=lambda out: out,
            error_limit=_TYPES[name],
            awake=partial(_awake, _threads(threads)),
        )


def _quantised(name: str, problem: Problem) -> Rotation[Pair]:
    library = _library()
    ggml_type = library.tq_ggml_type(name.encode())
    row_bytes = library.tq_ggml_row_bytes(ggml_type, problem.head_dim)

    def convert(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        rows = problem.kv_heads * problem.tokens
        blocks = np.empty((rows, row_bytes), np.uint8)
        library.tq_ggml_convert(ggml_type, x.ctypes.data, blocks.ctypes.data, rows, problem.head_dim)
        return blocks

    return Rotation.of_arrays((convert(problem.k), convert(problem.v)))


if __name__ == "__main__":
    harness.parser("bench.peers.llama_cpp", __doc__).parse_args()
    print(setup())
