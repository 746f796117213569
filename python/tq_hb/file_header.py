"""The header of a file of saved caches: what it says of each, and the checks that make it believable.

Nothing is taken from a header before it is checked: how long it takes to parse, that it holds exactly what a cache can
be, and that its tensors fill the file. ``docs/format.md`` describes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from tq_hb import _core
from tq_hb.options import CODEBOOKS, PACKINGS, PRECISIONS, norms_shape, one_of

FORMAT = "tq_hb.kv_caches"
VERSION = 1
# All metadata are one string: safetensors writes several in an order that changes from run to run.
METADATA_KEY = "tq_hb"
DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype(np.uint8), "F32": np.dtype(np.float32)}
NO_CHECKSUM = "0" * 64  # holds the checksum's place while it is computed

MAX_BYTES = 1 << 20
# Commas and opening brackets: they bound the time and memory that parsing takes. 500 caches stay below.
_MAX_ITEMS = 1 << 15
_MAX_DIGITS = 99  # of a number; more than a checksum has
_AS_ZERO = bytes.maketrans(b"123456789", b"0" * 9)
_MAX_UINT32 = 2**32 - 1
_MAX_OFFSET = 2**53
_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "bool": (bool,), "str": (str,), "int | None": (int, type(None))}

Arrays = dict[str, npt.NDArray[Any]]


class Refused(Exception):  # noqa: N818
    """A rule that a file or a cache breaks; the caller adds the name of the op and of the file."""

    def __init__(self, field: str, rule: str, value: object) -> None:
        super().__init__(field, rule, value)
        self.field, self.rule, self.value = field, rule, value


def require(holds: bool, field: str, rule: str, value: object) -> None:
    """Refuse ``value`` unless the rule holds."""
    if not holds:
        raise Refused(field, rule, value)


@dataclass(frozen=True)
class Entry:
    """Everything about a cache but its arrays, as it stands in the metadata."""

    num_kv_heads: int
    head_dim: int
    capacity: int
    grows: bool
    k_bits: int
    v_bits: int
    sliding_window: int | None
    codebook: str
    packing: str
    precision: str
    length: int
    offset: int
    ring_start: int
    k_mean: bool

    def check(self, where: str) -> None:
        """Refuse what no cache can be."""

        def demand(holds: bool, field: str, rule: str) -> None:
            require(holds, f"{where}.{field}", rule, getattr(self, field))

        for field in fields(self):
            demand(type(getattr(self, field.name)) in _KINDS[str(field.type)], field.name, f"must be {field.type}")
        demand(1 <= self.num_kv_heads <= _MAX_UINT32, "num_kv_heads", f"must be 1 to {_MAX_UINT32}")
        head_dims = _core.supported_head_dims()
        demand(self.head_dim in head_dims, "head_dim", f"must be {one_of(head_dims)}")
        widths = _core.supported_bits()
        demand(self.k_bits in widths, "k_bits", f"must be {one_of(widths)}")
        demand(self.v_bits in widths, "v_bits", f"must be {one_of(widths)}")
        demand(self.codebook in CODEBOOKS, "codebook", f"must be one of {', '.join(CODEBOOKS)}")
        demand(self.packing in PACKINGS, "packing", f"must be one of {', '.join(PACKINGS)}")
        demand(self.precision in PRECISIONS, "precision", f"must be one of {', '.join(PRECISIONS)}")
        demand(0 <= self.capacity <= _MAX_UINT32, "capacity", f"must be 0 to {_MAX_UINT32}")
        demand(self.capacity > 0 or self.grows, "capacity", "must be >= 1 unless the cache grows")
        demand(0 <= self.length <= self.capacity, "length", f"must be 0 to the capacity {self.capacity}")
        demand(0 <= self.offset <= _MAX_OFFSET, "offset", f"must be 0 to {_MAX_OFFSET}")
        window = self.sliding_window
        if window is None:
            demand(self.offset == self.length, "offset", f"must be the length {self.length} without a window")
            demand(self.ring_start == 0, "ring_start", "must be 0 without a window")
            return
        demand(1 <= window <= self.capacity, "sliding_window", f"must be 1 to the capacity {self.capacity}")
        demand(not self.grows, "grows", "must be false with a window")
        demand(self.length <= self.offset, "length", f"must be at most the offset {self.offset}")
        seen = min(self.offset, window)
        demand(self.length >= seen, "length", f"must be at least the {seen} tokens that a query sees")
        start = (self.offset - self.length) % self.capacity
        demand(self.ring_start == start, "ring_start", f"must be {start} for this offset, length and capacity")

    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the dtype, in safetensors' words, and the shape of each array."""
        lead = (self.num_kv_heads, self.length)
        arrays: dict[str, tuple[str, tuple[int, ...]]] = {}
        for side, bits in (("k", self.k_bits), ("v", self.v_bits)):
            arrays[f"{side}_codes"] = "U8", (*lead, _core.row_bytes(self.packing, bits, self.head_dim))
            arrays[f"{side}_norms"] = "F32", norms_shape(lead, self.head_dim)
        if self.k_mean:
            arrays["k_mean"] = "F32", (self.num_kv_heads, self.head_dim)
        return arrays

    def check_values(self, where: str, arrays: Arrays) -> None:
        """Refuse values that no quantised vector has; dtypes and shapes are right."""
        for side, bits in (("k", self.k_bits), ("v", self.v_bits)):
            if self.packing == "byte":
                largest = int(arrays[f"{side}_codes"].max(initial=0))
                require(largest < 2**bits, f"{where}.{side}_codes", f"must be below 2**{bits}", largest)
            norms = arrays[f"{side}_norms"]
            bad = norms[~(np.isfinite(norms) & (norms >= 0))]
            require(bad.size == 0, f"{where}.{side}_norms", "must be finite and >= 0", bad[:1].tolist())
        if self.k_mean:
            bad = arrays["k_mean"][~np.isfinite(arrays["k_mean"])]
            require(bad.size == 0, f"{where}.k_mean", "must be finite", bad[:1].tolist())


def _tables(entries: Iterable[Entry]) -> dict[str, str]:
    """Checksums of the tables that decode the caches: levels, then boundaries."""
    wanted = {(entry.codebook, bits) for entry in entries for bits in (entry.k_bits, entry.v_bits)}
    return {
        f"{name}_{bits}": hashlib.sha256(b"".join(t.tobytes() for t in _core.codebook("files", bits, name))).hexdigest()
        for name, bits in sorted(wanted)
    }


def describe(entries: Sequence[Entry]) -> dict[str, str]:
    """Return the metadata of a header, zeros in the checksum's place."""
    described = {
        "format": FORMAT,
        "version": VERSION,
        "checksum": NO_CHECKSUM,
        "tables": _tables(entries),
        "caches": [asdict(entry) for entry in entries],
    }
    return {METADATA_KEY: json.dumps(described, sort_keys=True, separators=(",", ":"))}


def parse(header: bytes, data_bytes: int) -> tuple[list[Entry], str]:
    """Return what a header says of its caches, all of it checked, and the checksum that it states."""
    check_text(header)
    tensors = _parse_object("header", header.decode("ascii"))
    metadata = tensors.pop("__metadata__", None)
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) and len(metadata) == 1 else None
    if not isinstance(text, str):
        raise Refused("__metadata__", f"must be one string named {METADATA_KEY}, as in saved caches", metadata)
    described = _parse_object("metadata", text)
    require(described.get("format") == FORMAT, "format", f"must be {FORMAT}", described.get("format"))
    version = described.get("version")
    require(type(version) is int and version >= 1, "version", "must be an int from 1", version)
    require(version == VERSION, "version", f"must be {VERSION}: load it with the newer tq_hb that wrote it", version)
    names = {"format", "version", "checksum", "tables", "caches"}
    require(described.keys() == names, "metadata", f"must have exactly the fields {sorted(names)}", sorted(described))

    checksum = described["checksum"]
    if not (isinstance(checksum, str) and re.fullmatch("[0-9a-f]{64}", checksum)):
        raise Refused("checksum", "must be 64 hexadecimal digits", checksum)
    occurrences = header.count(checksum.encode())
    require(occurrences == 1, "checksum", "must occur once in the header", f"{checksum} {occurrences} times")

    listed = described["caches"]
    if not (isinstance(listed, list) and listed):
        raise Refused("caches", "must be a list of at least one", listed)
    entries = [_parse_entry(f"caches[{index}]", value) for index, value in enumerate(listed)]
    tables = _tables(entries)
    require(described["tables"] == tables, "tables", f"must be those of this version, {tables}", described["tables"])
    _check_tensors(tensors, entries, data_bytes)
    return entries, checksum


def check_text(header: bytes) -> None:
    """Refuse a header that would take long to parse, before it is parsed; its length is checked before it is read."""
    require(header.isascii() and b"\\u" not in header, "header", "must be ASCII without \\u escapes", header)
    items = sum(map(header.count, (b",", b"{", b"[")))
    require(items <= _MAX_ITEMS, "header", f"must hold at most {_MAX_ITEMS} values", items)
    long_numbers = header.translate(_AS_ZERO).count(b"0" * (_MAX_DIGITS + 1))
    require(long_numbers == 0, "header", f"must have no number of more than {_MAX_DIGITS} digits", long_numbers)


def _parse_object(field: str, text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise Refused(field, "must not repeat a name", [name for name, _ in pairs])
        return result

    def refuse(number: str) -> NoReturn:
        raise Refused(field, "must have whole numbers only", number)

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_float=refuse, parse_constant=refuse)
    except RecursionError:
        raise Refused(field, "must not be nested deeply", text) from None
    except ValueError as error:
        raise Refused(field, "must be JSON", str(error)) from None
    if not isinstance(value, dict):
        raise Refused(field, "must be a JSON object", value)
    return value


def _parse_entry(where: str, value: object) -> Entry:
    names = {field.name for field in fields(Entry)}
    if not (isinstance(value, dict) and value.keys() == names):
        raise Refused(where, f"must have exactly the fields {sorted(names)}", value)
    entry = Entry(**value)
    entry.check(where)
    return entry


def _check_tensors(tensors: dict[str, Any], entries: Sequence[Entry], data_bytes: int) -> None:
    """Refuse tensors that are not exactly those of the caches, end to end and filling the file."""
    expected = {f"{i}.{name}": array for i, entry in enumerate(entries) for name, array in entry.arrays().items()}
    odd = sorted(tensors.keys() ^ expected.keys())
    require(not odd, "tensors", f"must be the {len(expected)} of its caches", f"missing or unknown: {odd}")
    spans: list[tuple[int, int, str]] = []
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        if not (isinstance(tensor, dict) and tensor.keys() == {"dtype", "shape", "data_offsets"}):
            raise Refused(name, "must have dtype, shape and data_offsets", tensor)
        require(tensor["dtype"] == dtype, f"{name}.dtype", f"must be {dtype}", tensor["dtype"])
        require(_integers(tensor["shape"]) == list(shape), f"{name}.shape", f"must be {list(shape)}", tensor["shape"])
        nbytes = DTYPES[dtype].itemsize * math.prod(shape)
        offsets = _integers(tensor["data_offsets"])
        fits = len(offsets) == 2 and offsets[1] - offsets[0] == nbytes
        require(fits, f"{name}.data_offsets", f"must span {nbytes} bytes", tensor["data_offsets"])
        spans.append((offsets[0], offsets[1], name))
    position = 0
    for begin, end, name in sorted(spans):
        require(
            begin == position, f"{name}.data_offsets", f"must begin where the tensor before ends, {position}", begin
        )
        position = end
    require(position == data_bytes, "size", f"must be {position} bytes after the header", data_bytes)


def _integers(value: object) -> list[int]:
    return value if isinstance(value, list) and all(type(item) is int for item in value) else []
