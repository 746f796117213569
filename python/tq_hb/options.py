"""Keyword arguments that several functions share, checked in one place."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tq_hb import _core

CODEBOOKS = _core.codebook_names()
PACKINGS = ("byte", "plane")
PRECISIONS = ("default", "strict")
_BOOLS = (bool, np.bool_)


def invalid(op: str, field: str, rule: str, value: object) -> _core.InvalidArgument:
    """Return the error for an argument that breaks a rule: ``op: field rule, got value``."""
    return _core.InvalidArgument(f"{op}: {field} {rule}, got {value}")


class Allocating:
    """Where memory is taken for ``what``, a call says so as :class:`OutOfMemoryError` if there is none.

    numpy says in its own words how many bytes there were to be.
    """

    def __init__(self, op: str, what: str) -> None:
        self._op, self._what = op, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, MemoryError) and not isinstance(error, _core.OutOfMemoryError):
            reason = str(error) or "no memory is left"
            raise _core.OutOfMemoryError(f"{self._op}: could not allocate {self._what}: {reason}") from error


def allocate(op: str, what: str, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """Return an array for ``what`` a call computes, with anything in it."""
    try:
        return np.empty(shape, dtype)
    except MemoryError as error:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        raise _core.OutOfMemoryError(f"{op}: could not allocate {size} bytes for {what}") from error


def one_of(choices: tuple[int, ...]) -> str:
    """Spell out alternatives: "5, 6 or 8"."""
    return f"{', '.join(map(str, choices[:-1]))} or {choices[-1]}"


def norms_shape(lead: tuple[int, ...], head_dim: int) -> tuple[int, ...]:
    """Return the shape of the norms of vectors with the leading shape ``lead``."""
    count = _core.norms_per_row(head_dim)
    return (*lead, count) if count > 1 else lead


def integer(op: str, field: str, value: object) -> int | None:
    """Return ``value`` as an integer of 32 bits, None if it is none: for callers whose own rule says more."""
    try:
        return _core.to_uint32(op, field, value)
    except _core.InvalidArgument:
        return None


def check_bits(op: str, field: str, value: object) -> int:
    """Return ``value`` as an index width."""
    bits = integer(op, field, value)
    if bits not in _core.supported_bits():
        raise invalid(op, field, "must be " + one_of(_core.supported_bits()), repr(value) if bits is None else bits)
    return bits


def check_head_dim(op: str, value: object) -> int:
    """Return ``value`` as a head size."""
    head_dim = _core.to_uint32(op, "head_dim", value)
    _core.check_head_dim(op, head_dim)
    return head_dim


def check_params(op: str, field: str, value: object, kind: type) -> None:
    """Accept a params object of the right class."""
    if not isinstance(value, kind):
        raise invalid(op, field, f"must be a {kind.__name__}", type(value).__name__)


def check_choice(op: str, field: str, value: object, choices: tuple[str, ...]) -> None:
    """Accept one of a few strings."""
    if not isinstance(value, str) or value not in choices:
        raise invalid(op, field, f"must be one of {', '.join(choices)}", repr(value))


def check_format(op: str, codebook: str, packing: str) -> None:
    """Accept the names of codebooks and of layouts."""
    check_choice(op, "codebook", codebook, CODEBOOKS)
    check_choice(op, "packing", packing, PACKINGS)


def check_precision(op: str, precision: str) -> None:
    """Accept the two accuracy classes."""
    check_choice(op, "precision", precision, PRECISIONS)


def check_bool(op: str, field: str, value: object) -> None:
    """Accept a boolean."""
    if not isinstance(value, _BOOLS):
        raise invalid(op, field, "must be True or False", repr(value))
