"""What is compared: one token's attention over a cache, by one library from one kind of storage."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from tq_hb.cli._sampling import buffers_to_stay_cold

Array: TypeAlias = npt.NDArray[np.float32]
T = TypeVar("T")

Pair: TypeAlias = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""K and V."""

# From this size on a buffer evicts its own beginning, and needs no second one to stay cold.
_OWN_EVICTION_BYTES = 512 << 20


class UnavailableError(Exception):
    """A library, or one of its forms, that can't be measured here; the message says why."""


def installed_version(*packages: str) -> str:
    """Return the names and versions of packages.

    Raises
    ------
    UnavailableError
        If one is not installed.
    """
    try:
        return ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    except metadata.PackageNotFoundError as error:
        raise UnavailableError(f"not installed: {error.name}") from error


@dataclass(frozen=True)
class Problem:
    """Queries (heads, D) of one token, and keys and values (kv_heads, tokens, D), all float32."""

    q: Array
    k: Array
    v: Array

    @classmethod
    def random(cls, heads: int, kv_heads: int, head_dim: int, tokens: int) -> Problem:
        """Return standard normal vectors, the same for the same shape."""
        rng = np.random.default_rng(tokens)
        q = rng.standard_normal((heads, head_dim), dtype=np.float32)
        k, v = (rng.standard_normal((kv_heads, tokens, head_dim), dtype=np.float32) for _ in range(2))
        return cls(q, k, v)

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return len(self.q)

    @property
    def kv_heads(self) -> int:
        """The number of KV heads."""
        return len(self.k)

    @property
    def tokens(self) -> int:
        """The number of keys."""
        return int(self.k.shape[1])

    @property
    def head_dim(self) -> int:
        """The head size."""
        return int(self.k.shape[2])

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.head_dim**-0.5)

    @property
    def values(self) -> int:
        """The number of values in K and V together."""
        return 2 * self.k.size


class Rotation(Generic[T]):
    """Copies of a cache that take turns, so many that none is in a processor cache when its turn comes.

    Contenders that read the same storage share one: whoever calls, the next copy's turn it is.
    """

    def __init__(self, first: T, copy: Callable[[T], T], nbytes: int) -> None:
        count = 1 if nbytes >= _OWN_EVICTION_BYTES else buffers_to_stay_cold(nbytes)
        self.copies = [first, *(copy(first) for _ in range(count - 1))]
        self.nbytes = nbytes
        self._turn = 0

    @staticmethod
    def of_arrays(pair: Pair) -> Rotation[Pair]:
        """Return a rotation of plain arrays."""
        return Rotation(pair, lambda pair: (pair[0].copy(), pair[1].copy()), pair[0].nbytes + pair[1].nbytes)

    def next(self) -> T:
        """Return the copy whose turn it is."""
        self._turn = (self._turn + 1) % len(self.copies)
        return self.copies[self._turn]


@dataclass(frozen=True)
class Contender:
    """A call to time."""

    name: str
    nbytes: int
    """Bytes of keys and values that a call reads."""
    call: Callable[[], Any]
    """Attends to the next copy, and returns the output in the library's form."""
    output: Callable[[Any], npt.NDArray[Any]]
    """Makes (heads, D) numbers of what a call returned."""
    error_limit: float
    """The relative L2 error against float64 attention on the unquantised cache that this storage explains."""
    awake: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)
    """Surrounds the calls of a sample: where threads would go on spinning it wakes them and sends them to sleep."""


class Storage:
    """The cache as plain arrays of some number type, shared by those contenders that can read it."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._rotations: dict[str, Rotation[Pair]] = {}

    def arrays(self, dtype: str) -> Rotation[Pair]:
        """Return K and V as float32, float16 or (in 16-bit integers) bfloat16."""
        if dtype not in self._rotations:
            pair = (_as(dtype, self._problem.k), _as(dtype, self._problem.v))
            self._rotations[dtype] = Rotation.of_arrays(pair)
        return self._rotations[dtype]


def _as(dtype: str, x: Array) -> npt.NDArray[Any]:
    if dtype == "float32":
        return x
    if dtype == "float16":
        return x.astype(np.float16)
    if dtype == "bfloat16":
        import ml_dtypes

        rounded: npt.NDArray[np.uint16] = x.astype(ml_dtypes.bfloat16).view(np.uint16)
        return rounded
    raise ValueError(f"Storage.arrays: dtype must be float32, float16 or bfloat16, got {dtype!r}")
