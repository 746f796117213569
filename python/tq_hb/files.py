"""Saved caches: one file for one cache, or for all layers of a model.

The container is safetensors, written and read by its library; ``docs/format.md`` says what is in it. A file is never
trusted: what its header says is checked against the rules of a cache and against the size of the file before memory
is taken for it, and one checksum covers every other byte.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import reprlib
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from tq_hb import _core
from tq_hb.device import Device, resolve_device
from tq_hb.options import CODEBOOKS, PACKINGS, PRECISIONS, invalid, norms_shape, one_of

if TYPE_CHECKING:
    from tq_hb import KVCache

FORMAT = "tq_hb.kv_caches"
VERSION = 1

# All metadata are one string: safetensors writes several in an order that changes from run to run.
_METADATA_KEY = "tq_hb"
_SIZE_BYTES = 8  # the length of the header, before the header
_MAX_HEADER_BYTES = 1 << 20
# Commas and opening brackets: they bound the time and memory that parsing takes. 500 caches stay below.
_MAX_HEADER_ITEMS = 1 << 15
_MAX_DIGITS = 99  # of a number; more than a checksum has
_AS_ZERO = bytes.maketrans(b"123456789", b"0" * 9)
_MAX_UINT32 = 2**32 - 1
_MAX_OFFSET = 2**63 - 1
_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype(np.uint8), "F32": np.dtype(np.float32)}
_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "bool": (bool,), "str": (str,), "int | None": (int, type(None))}
_NO_CHECKSUM = "0" * 64  # holds the checksum's place while it is computed

_Array = npt.NDArray[Any]

_shortened = reprlib.Repr()  # a message quotes no more of a file than this
_shortened.maxstring = _shortened.maxother = 120


@dataclass(frozen=True, eq=False)
class SavedCache:
    """A cache as a file holds it: how it was made, how many tokens it has seen, and the held ones, oldest first.

    ``k_codes`` and ``v_codes`` are uint8 (num_kv_heads, tokens, bytes per row); ``k_norms`` and ``v_norms`` float32
    (num_kv_heads, tokens), with a last axis of 2 where a row has two norms; ``k_mean`` float32 (num_kv_heads,
    head_dim). ``grows`` says that no capacity was asked for; ``offset`` counts the tokens seen.
    """

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
    offset: int
    k_mean: npt.NDArray[np.float32] | None
    k_codes: npt.NDArray[np.uint8]
    k_norms: npt.NDArray[np.float32]
    v_codes: npt.NDArray[np.uint8]
    v_norms: npt.NDArray[np.float32]


class _Refused(Exception):  # noqa: N818
    """A rule that a file or a cache breaks; the caller adds the name of the op and of the file."""

    def __init__(self, field: str, rule: str, value: object) -> None:
        super().__init__(field, rule, value)
        self.field, self.rule, self.value = field, rule, value


def _require(holds: bool, field: str, rule: str, value: object) -> None:
    if not holds:
        raise _Refused(field, rule, value)


@contextlib.contextmanager
def _naming(op: str, name: str) -> Iterator[None]:
    try:
        yield
    except _Refused as refused:
        raise invalid(op, f"{refused.field} of {name!r}", refused.rule, _shortened.repr(refused.value)) from None


# -- for callers -------------------------------------------------------------------------------------------


def save_caches(path: str | os.PathLike[str], caches: Iterable[KVCache]) -> None:
    """Write several caches, the layers of a model say, to one file.

    The file is replaced in one step, after everything is on the disk: it is never half-written. Each cache is saved
    as it is at one moment; append to none of them meanwhile if they belong together.

    Parameters
    ----------
    path : str or os.PathLike
    caches : KVCache objects, at least one
        About 500 fit; more, and the header would be refused on loading.

    Raises
    ------
    InvalidArgument
        If there is no cache, or something that is not one.
    OSError
        If the file cannot be written; one that was there is untouched.

    Examples
    --------
    >>> import tempfile, numpy as np, tq_hb
    >>> layers = [tq_hb.KVCache(2, 256), tq_hb.KVCache(2, 256, sliding_window=4)]
    >>> for layer in layers:
    ...     layer.append(np.ones((6, 2, 256), np.float32), np.ones((6, 2, 256), np.float32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tq_hb.save_caches(f"{folder}/model.safetensors", layers)
    ...     loaded = tq_hb.load_caches(f"{folder}/model.safetensors")
    >>> [(len(layer), layer.offset) for layer in loaded]
    [(6, 6), (4, 6)]
    """
    from tq_hb import KVCache

    op = "save_caches"
    layers = list(caches) if isinstance(caches, Iterable) else [caches]
    if not layers or isinstance(caches, KVCache) or not all(isinstance(layer, KVCache) for layer in layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none"
        raise invalid(op, "caches", "must be a sequence of one or more KVCache objects", kinds)
    write_caches(op, path, [layer._saved() for layer in layers])


def load_caches(path: str | os.PathLike[str], device: str | Device | None = None) -> list[KVCache]:
    """Read all the caches of a file, in the order in which they were saved.

    Nothing in the file is believed: it is checked whole, by a checksum and by the rules of a cache. ``capacity`` alone
    has nothing in the file to be held against; its memory is taken as the constructor of a cache would take it.

    Parameters
    ----------
    path : str or os.PathLike
    device : str or Device, optional
        Where the caches are put; it need not be where they were.

    Returns
    -------
    list of KVCache

    Raises
    ------
    InvalidArgument
        If anything in the file is not as :func:`save_caches` makes it.
    OSError
        If the file cannot be opened or read.

    Examples
    --------
    >>> import tempfile, tq_hb
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tq_hb.KVCache(2, 256, 1024, k_bits=6).save(f"{folder}/cache.safetensors")
    ...     (cache,) = tq_hb.load_caches(f"{folder}/cache.safetensors", device="cpu")
    >>> cache.capacity, cache.k_bits, cache.device.backend
    (1024, 6, 'cpu')
    """
    from tq_hb import KVCache

    op = "load_caches"
    resolved = resolve_device(op, device)
    return [KVCache._restore(saved, resolved) for saved in read_caches(op, path)]


# -- what the header says of a cache -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
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

    @classmethod
    def of(cls, saved: SavedCache) -> _Entry:
        values = {f.name: getattr(saved, f.name) for f in fields(cls) if hasattr(saved, f.name)}
        length = saved.k_codes.shape[1]
        ring_start = 0 if saved.sliding_window is None else (saved.offset - length) % saved.capacity
        return cls(**values | {"length": length, "ring_start": ring_start, "k_mean": saved.k_mean is not None})

    def check(self, where: str) -> None:
        """Refuse what no cache can be."""

        def require(holds: bool, field: str, rule: str) -> None:
            _require(holds, f"{where}.{field}", rule, getattr(self, field))

        for field in fields(self):
            require(type(getattr(self, field.name)) in _KINDS[str(field.type)], field.name, f"must be {field.type}")
        require(1 <= self.num_kv_heads <= _MAX_UINT32, "num_kv_heads", f"must be 1 to {_MAX_UINT32}")
        head_dims = _core.supported_head_dims()
        require(self.head_dim in head_dims, "head_dim", f"must be {one_of(head_dims)}")
        widths = _core.supported_bits()
        require(self.k_bits in widths, "k_bits", f"must be {one_of(widths)}")
        require(self.v_bits in widths, "v_bits", f"must be {one_of(widths)}")
        require(self.codebook in CODEBOOKS, "codebook", f"must be one of {', '.join(CODEBOOKS)}")
        require(self.packing in PACKINGS, "packing", f"must be one of {', '.join(PACKINGS)}")
        require(self.precision in PRECISIONS, "precision", f"must be one of {', '.join(PRECISIONS)}")
        require(0 <= self.capacity <= _MAX_UINT32, "capacity", f"must be 0 to {_MAX_UINT32}")
        require(self.capacity > 0 or self.grows, "capacity", "must be >= 1 unless the cache grows")
        require(0 <= self.length <= self.capacity, "length", f"must be 0 to the capacity {self.capacity}")
        require(0 <= self.offset <= _MAX_OFFSET, "offset", f"must be 0 to {_MAX_OFFSET}")
        window = self.sliding_window
        if window is None:
            require(self.offset == self.length, "offset", f"must be the length {self.length} without a window")
            require(self.ring_start == 0, "ring_start", "must be 0 without a window")
            return
        require(1 <= window <= self.capacity, "sliding_window", f"must be 1 to the capacity {self.capacity}")
        require(not self.grows, "grows", "must be false with a window")
        require(self.length <= self.offset, "length", f"must be at most the offset {self.offset}")
        seen = min(self.offset, window)
        require(self.length >= seen, "length", f"must be at least the {seen} tokens that a query sees")
        start = (self.offset - self.length) % self.capacity
        require(self.ring_start == start, "ring_start", f"must be {start} for this offset, length and capacity")

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

    def check_values(self, where: str, arrays: dict[str, _Array]) -> None:
        """Refuse values that no quantised vector has; dtypes and shapes are right."""
        for side, bits in (("k", self.k_bits), ("v", self.v_bits)):
            if self.packing == "byte":
                largest = int(arrays[f"{side}_codes"].max(initial=0))
                _require(largest < 2**bits, f"{where}.{side}_codes", f"must be below 2**{bits}", largest)
            norms = arrays[f"{side}_norms"]
            bad = norms[~(np.isfinite(norms) & (norms >= 0))]
            _require(bad.size == 0, f"{where}.{side}_norms", "must be finite and >= 0", bad[:1].tolist())
        if self.k_mean:
            bad = arrays["k_mean"][~np.isfinite(arrays["k_mean"])]
            _require(bad.size == 0, f"{where}.k_mean", "must be finite", bad[:1].tolist())


def _tables(entries: Iterable[_Entry]) -> dict[str, str]:
    """Checksums of the tables that decode the caches: levels, then boundaries."""
    wanted = {(entry.codebook, bits) for entry in entries for bits in (entry.k_bits, entry.v_bits)}
    return {
        f"{name}_{bits}": hashlib.sha256(b"".join(t.tobytes() for t in _core.codebook("files", bits, name))).hexdigest()
        for name, bits in sorted(wanted)
    }


# -- writing -----------------------------------------------------------------------------------------------


def write_caches(op: str, path: str | os.PathLike[str], caches: Sequence[SavedCache]) -> None:
    """Write caches to a file, whole or not at all.

    An existing file is replaced in one step, after everything is on the disk; it is untouched if that fails.
    """
    name = _file_name(op, path)
    with _naming(op, name):
        parts = _serialise(caches)
    _replace_file(name, parts)


def _serialise(caches: Sequence[SavedCache]) -> tuple[bytes, memoryview]:
    """Return what is up to the end of the header, checksum included, and the data after it."""
    from safetensors.numpy import save

    _require(len(caches) > 0, "caches", "must be at least one", len(caches))
    entries: list[_Entry] = []
    tensors: dict[str, _Array] = {}
    for index, saved in enumerate(caches):
        where = f"caches[{index}]"
        entry = _Entry.of(saved)
        entry.check(where)
        arrays = {name: np.ascontiguousarray(getattr(saved, name)) for name in entry.arrays()}
        for name, (dtype, shape) in entry.arrays().items():
            found = arrays[name].dtype, arrays[name].shape
            _require(found == (_DTYPES[dtype], shape), f"{where}.{name}", f"must be {_DTYPES[dtype]} {shape}", found)
        entry.check_values(where, arrays)
        entries.append(entry)
        tensors |= {f"{index}.{name}": array for name, array in arrays.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "checksum": _NO_CHECKSUM,
        "tables": _tables(entries),
        "caches": [asdict(entry) for entry in entries],
    }
    content = save(tensors, {_METADATA_KEY: json.dumps(metadata, sort_keys=True, separators=(",", ":"))})
    start = _SIZE_BYTES + int.from_bytes(content[:_SIZE_BYTES], "little")
    head, data = content[:start], memoryview(content)[start:]
    _check_header(head[_SIZE_BYTES:])
    return head.replace(_NO_CHECKSUM.encode(), _checksum(head, data).encode()), data


def _checksum(head: bytes, data: memoryview) -> str:
    """Return the SHA-256 of a whole file in which zeros hold the checksum's place."""
    digest = hashlib.sha256(head)
    digest.update(data)
    return digest.hexdigest()


def _replace_file(name: str, parts: Iterable[bytes | memoryview]) -> None:
    target = Path(os.path.realpath(name))  # a symbolic link stays one
    temporary = target.with_name(f".{secrets.token_hex(8)}.tq_hb.tmp")
    file = temporary.open("xb")
    try:
        with file:
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(target, temporary)
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            temporary.replace(target)
            _sync_folder(folder)
        finally:
            os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: int) -> None:
    """Make the new name last; file systems that cannot do that for a folder say so, and are left to themselves."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _file_name(op: str, path: object) -> str:
    if not isinstance(path, str | os.PathLike):
        raise invalid(op, "path", "must be a str or an os.PathLike", type(path).__name__)
    name = os.fsdecode(path)
    if "\0" in name:
        raise invalid(op, "path", "must not contain a NUL character", repr(name))
    # Opening a pipe would wait for its other end, and replacing a device would remove it; a folder raises by itself.
    with contextlib.suppress(OSError):
        mode = Path(name).stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise invalid(op, "path", "must name a regular file", repr(name))
    return name


# -- reading -----------------------------------------------------------------------------------------------


def read_caches(op: str, path: str | os.PathLike[str]) -> list[SavedCache]:
    """Read the caches of a file.

    Raises
    ------
    InvalidArgument
        If anything in the file is not as :func:`write_caches` makes it.
    OSError
        If the file cannot be opened or read.
    """
    name = _file_name(op, path)
    with Path(name).open("rb") as file, _naming(op, name):
        return _read(file)


def _read(file: BinaryIO) -> list[SavedCache]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    size = os.fstat(file.fileno()).st_size
    _require(size >= _SIZE_BYTES, "size", f"must be at least {_SIZE_BYTES} bytes", size)
    header_bytes = int.from_bytes(file.read(_SIZE_BYTES), "little")
    start = _SIZE_BYTES + header_bytes
    _require(start <= size, "header length", f"must be at most the {size - _SIZE_BYTES} bytes after it", header_bytes)
    _require(header_bytes <= _MAX_HEADER_BYTES, "header length", f"must be at most {_MAX_HEADER_BYTES}", header_bytes)
    header = file.read(header_bytes)
    entries, checksum = _parse(header, size - start)

    # Read, not mapped: a mapped file that somebody shortens ends the process. The header must still be the one checked.
    file.seek(0)
    content = file.read(size)
    unchanged = len(content) == size and content[:start] == header_bytes.to_bytes(_SIZE_BYTES, "little") + header
    _require(unchanged, "content", "must not change while it is read", f"{len(content)} bytes")
    actual = _checksum(content[:start].replace(checksum.encode(), _NO_CHECKSUM.encode()), memoryview(content)[start:])
    _require(checksum == actual, "checksum", f"must be {actual}, that of the content: the file is damaged", checksum)
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise _Refused("content", "must be readable by safetensors", str(error)) from None

    caches = []
    for index, entry in enumerate(entries):
        arrays = {name: tensors[f"{index}.{name}"] for name in entry.arrays()}
        entry.check_values(f"caches[{index}]", arrays)
        choices = {f.name: getattr(entry, f.name) for f in fields(SavedCache) if hasattr(entry, f.name)}
        caches.append(SavedCache(**choices | {"k_mean": None} | arrays))
    return caches


def _parse(header: bytes, data_bytes: int) -> tuple[list[_Entry], str]:
    """Return what a header says of its caches, all of it checked, and the checksum that it states."""
    _check_header(header)
    tensors = _parse_object("header", header.decode("ascii"))
    metadata = tensors.pop("__metadata__", None)
    text = metadata.get(_METADATA_KEY) if isinstance(metadata, dict) and len(metadata) == 1 else None
    if not isinstance(text, str):
        raise _Refused("__metadata__", f"must be one string named {_METADATA_KEY}, as in saved caches", metadata)
    described = _parse_object("metadata", text)
    _require(described.get("format") == FORMAT, "format", f"must be {FORMAT}", described.get("format"))
    version = described.get("version")
    _require(type(version) is int and version >= 1, "version", "must be an int from 1", version)
    _require(version == VERSION, "version", f"must be {VERSION}: load it with the newer tq_hb that wrote it", version)
    names = {"format", "version", "checksum", "tables", "caches"}
    _require(described.keys() == names, "metadata", f"must have exactly the fields {sorted(names)}", sorted(described))

    checksum = described["checksum"]
    if not (isinstance(checksum, str) and re.fullmatch("[0-9a-f]{64}", checksum)):
        raise _Refused("checksum", "must be 64 hexadecimal digits", checksum)
    occurrences = header.count(checksum.encode())
    _require(occurrences == 1, "checksum", "must occur once in the header", f"{checksum} {occurrences} times")

    listed = described["caches"]
    if not (isinstance(listed, list) and listed):
        raise _Refused("caches", "must be a list of at least one", listed)
    entries = [_parse_entry(f"caches[{index}]", value) for index, value in enumerate(listed)]
    tables = _tables(entries)
    _require(described["tables"] == tables, "tables", f"must be those of this version, {tables}", described["tables"])
    _check_tensors(tensors, entries, data_bytes)
    return entries, checksum


def _check_header(header: bytes) -> None:
    """Refuse a header that would take long to parse, before it is parsed."""
    size = len(header)
    _require(size <= _MAX_HEADER_BYTES, "header length", f"must be at most {_MAX_HEADER_BYTES}", size)
    _require(header.isascii() and b"\\u" not in header, "header", "must be ASCII without \\u escapes", header)
    items = sum(map(header.count, (b",", b"{", b"[")))
    _require(items <= _MAX_HEADER_ITEMS, "header", f"must hold at most {_MAX_HEADER_ITEMS} values", items)
    long_numbers = header.translate(_AS_ZERO).count(b"0" * (_MAX_DIGITS + 1))
    _require(long_numbers == 0, "header", f"must have no number of more than {_MAX_DIGITS} digits", long_numbers)


def _parse_object(field: str, text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise _Refused(field, "must not repeat a name", [name for name, _ in pairs])
        return result

    def refuse(number: str) -> NoReturn:
        raise _Refused(field, "must have whole numbers only", number)

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_float=refuse, parse_constant=refuse)
    except RecursionError:
        raise _Refused(field, "must not be nested deeply", text) from None
    except ValueError as error:
        raise _Refused(field, "must be JSON", str(error)) from None
    if not isinstance(value, dict):
        raise _Refused(field, "must be a JSON object", value)
    return value


def _parse_entry(where: str, value: object) -> _Entry:
    names = {field.name for field in fields(_Entry)}
    if not (isinstance(value, dict) and value.keys() == names):
        raise _Refused(where, f"must have exactly the fields {sorted(names)}", value)
    entry = _Entry(**value)
    entry.check(where)
    return entry


def _check_tensors(tensors: dict[str, Any], entries: Sequence[_Entry], data_bytes: int) -> None:
    """Refuse tensors that are not exactly those of the caches, end to end and filling the file."""
    expected = {f"{i}.{name}": array for i, entry in enumerate(entries) for name, array in entry.arrays().items()}
    odd = sorted(tensors.keys() ^ expected.keys())
    _require(not odd, "tensors", f"must be the {len(expected)} of its caches", f"missing or unknown: {odd}")
    spans: list[tuple[int, int, str]] = []
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        if not (isinstance(tensor, dict) and tensor.keys() == {"dtype", "shape", "data_offsets"}):
            raise _Refused(name, "must have dtype, shape and data_offsets", tensor)
        _require(tensor["dtype"] == dtype, f"{name}.dtype", f"must be {dtype}", tensor["dtype"])
        _require(_integers(tensor["shape"]) == list(shape), f"{name}.shape", f"must be {list(shape)}", tensor["shape"])
        nbytes = _DTYPES[dtype].itemsize * math.prod(shape)
        offsets = _integers(tensor["data_offsets"])
        fits = len(offsets) == 2 and offsets[1] - offsets[0] == nbytes
        _require(fits, f"{name}.data_offsets", f"must span {nbytes} bytes", tensor["data_offsets"])
        spans.append((offsets[0], offsets[1], name))
    position = 0
    for begin, end, name in sorted(spans):
        _require(
            begin == position, f"{name}.data_offsets", f"must begin where the tensor before ends, {position}", begin
        )
        position = end
    _require(position == data_bytes, "size", f"must be {position} bytes after the header", data_bytes)


def _integers(value: object) -> list[int]:
    return value if isinstance(value, list) and all(type(item) is int for item in value) else []
