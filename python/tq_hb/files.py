"""Saved caches: one file for one cache, or for all layers of a model.

The container is safetensors, written and read by its library; ``docs/format.md`` says what is in it. A file is never
trusted: what its header says is checked against the rules of a cache and against the size of the file before memory
is taken for it, and one checksum covers every other byte.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import reprlib
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tq_hb import file_header
from tq_hb.device import Device, resolve_device
from tq_hb.file_header import Entry, Refused, require
from tq_hb.options import Allocating, invalid

if TYPE_CHECKING:
    from tq_hb import KVCache

_SIZE_BYTES = 8  # the length of the header, before the header

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


@contextlib.contextmanager
def _naming(op: str, name: str) -> Iterator[None]:
    try:
        yield
    except Refused as refused:
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
        About 500 fit: loading takes no longer header, so saving writes none.

    Raises
    ------
    InvalidArgument
        If there is no cache, something that is not one, or more caches than fit.
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
    # A scalar of numpy is an Iterable by its class.
    is_sequence = isinstance(caches, Iterable) and getattr(caches, "ndim", 1) > 0
    layers: list[Any] = list(caches) if is_sequence else [caches]
    if not layers or isinstance(caches, KVCache) or not all(isinstance(layer, KVCache) for layer in layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none"
        raise invalid(op, "caches", "must be a sequence of one or more KVCache objects", kinds)
    write_caches(op, path, [layer._saved(op) for layer in layers])


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
    ...     tq_hb.KVCache(2, 256, 1024, v_bits=6, packing="plane").save(f"{folder}/cache.safetensors")
    ...     (cache,) = tq_hb.load_caches(f"{folder}/cache.safetensors", device="cpu")
    >>> cache.capacity, cache.v_bits, cache.device.backend
    (1024, 6, 'cpu')
    """
    from tq_hb import KVCache

    op = "load_caches"
    resolved = resolve_device(op, device)
    return [KVCache._restore(op, saved, resolved) for saved in read_caches(op, path)]


# -- writing -----------------------------------------------------------------------------------------------


def write_caches(op: str, path: str | os.PathLike[str], caches: Sequence[SavedCache]) -> None:
    """Write caches to a file, whole or not at all.

    An existing file is replaced in one step, after everything is on the disk; it is untouched if that fails.
    """
    name = _file_name(op, path)
    with _naming(op, name), Allocating(op, "the content of the file"):
        parts = _serialise(caches)
    try:
        _replace_file(name, parts)
    except OSError as error:  # of the temporary file, which the caller knows nothing of
        raise OSError(error.errno, error.strerror, name) from error


def _serialise(caches: Sequence[SavedCache]) -> tuple[bytes, memoryview]:
    """Return what is up to the end of the header, checksum included, and the data after it."""
    from safetensors.numpy import save

    require(len(caches) > 0, "caches", "must be at least one", len(caches))
    entries = []
    tensors: file_header.Arrays = {}
    for index, saved in enumerate(caches):
        where = f"caches[{index}]"
        entry = _entry(saved)
        entry.check(where)
        arrays = {name: np.ascontiguousarray(getattr(saved, name)) for name in entry.arrays()}
        for name, (code, shape) in entry.arrays().items():
            dtype, found = file_header.DTYPES[code], (arrays[name].dtype, arrays[name].shape)
            require(found == (dtype, shape), f"{where}.{name}", f"must be {dtype} {shape}", found)
        entry.check_values(where, arrays)
        entries.append(entry)
        tensors |= {f"{index}.{name}": array for name, array in arrays.items()}
    # safetensors makes two copies, and ends the process where it finds no memory.
    np.empty(2 * sum(array.nbytes for array in tensors.values()) + file_header.MAX_BYTES, np.uint8)
    content = save(tensors, file_header.describe(entries))
    start = _SIZE_BYTES + int.from_bytes(content[:_SIZE_BYTES], "little")
    head, data = content[:start], memoryview(content)[start:]
    try:
        file_header.check_text(head[_SIZE_BYTES:])
    except Refused as refused:
        raise Refused("caches", f"must be fewer (their header {refused.rule})", len(caches)) from None
    return head.replace(file_header.NO_CHECKSUM.encode(), _checksum(head, data).encode()), data


def _entry(saved: SavedCache) -> Entry:
    values = {f.name: getattr(saved, f.name) for f in fields(Entry) if hasattr(saved, f.name)}
    length = saved.k_codes.shape[1]
    ring_start = 0 if saved.sliding_window is None else (saved.offset - length) % saved.capacity
    return Entry(**values | {"length": length, "ring_start": ring_start, "k_mean": saved.k_mean is not None})


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
    with (
        Path(name).open("rb") as file,
        _naming(op, name),
        Allocating(op, f"{os.fstat(file.fileno()).st_size} bytes and what is made of them"),
    ):
        return _read(file)


def _read(file: BinaryIO) -> list[SavedCache]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    size = os.fstat(file.fileno()).st_size
    require(size >= _SIZE_BYTES, "size", f"must be at least the {_SIZE_BYTES} bytes that safetensors begin with", size)
    beginning = file.read(_SIZE_BYTES + 1)
    header_bytes = int.from_bytes(beginning[:_SIZE_BYTES], "little")
    start = _SIZE_BYTES + header_bytes
    # What has an object where the header should be is rather a damaged file than one of another kind.
    is_safetensors = start <= size or beginning.endswith(b"{")
    require(is_safetensors, "content", "must be that of a safetensors file", beginning)
    require(start <= size, "header length", f"must be at most the {size - _SIZE_BYTES} bytes after it", header_bytes)
    limit = file_header.MAX_BYTES
    require(header_bytes <= limit, "header length", f"must be at most {limit}", header_bytes)
    file.seek(_SIZE_BYTES)
    header = file.read(header_bytes)
    entries, checksum = file_header.parse(header, size - start)

    # Read, not mapped: a mapped file that somebody shortens ends the process. The header must still be the one checked.
    file.seek(0)
    content = file.read(size)
    unchanged = len(content) == size and content[:start] == header_bytes.to_bytes(_SIZE_BYTES, "little") + header
    require(unchanged, "content", "must not change while it is read", f"{len(content)} bytes")
    zeroed = content[:start].replace(checksum.encode(), file_header.NO_CHECKSUM.encode())
    actual = _checksum(zeroed, memoryview(content)[start:])
    require(checksum == actual, "checksum", f"must be {actual}, that of the content: the file is damaged", checksum)
    try:
        np.empty(size + file_header.MAX_BYTES, np.uint8)  # safetensors panics where it finds no memory
        tensors = load(content)
    except SafetensorError as error:
        raise Refused("content", "must be readable by safetensors", str(error)) from None

    caches = []
    for index, entry in enumerate(entries):
        arrays = {name: tensors[f"{index}.{name}"] for name in entry.arrays()}
        entry.check_values(f"caches[{index}]", arrays)
        choices = {f.name: getattr(entry, f.name) for f in fields(SavedCache) if hasattr(entry, f.name)}
        caches.append(SavedCache(**choices | {"k_mean": None} | arrays))
    return caches
