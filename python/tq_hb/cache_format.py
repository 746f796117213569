"""How a cache stores its vectors, what of a caller's vectors fits, and the memory that they go to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tq_hb import _core, gpu_arrays
from tq_hb.device import Device, resolve_device
from tq_hb.encoder import Buffer
from tq_hb.interop import Array, Float32Array, Rows, as_float32
from tq_hb.options import (
    Allocating,
    allocate,
    check_bits,
    check_format,
    check_head_dim,
    check_precision,
    invalid,
    norms_shape,
)
from tq_hb.policy import AttendKernel
from tq_hb.staging import Outstanding, Staging

Slots = slice | npt.NDArray[np.int64]


def positive(op: str, field: str, value: object) -> int:
    """Return ``value`` as a count of at least one."""
    count = _core.to_uint32(op, field, value)
    if count == 0:
        raise invalid(op, field, "must be >= 1", count)
    return count


class AttendedFormat(NamedTuple):
    """What of a format and its device attention is planned by; the same for many caches."""

    num_kv_heads: int
    head_dim: int
    k_bits: int
    offers_group: bool  # whether the device has a kernel that serves query heads of a group together
    num_multiprocessors: int  # of the device; 0 where that is not known


@dataclass(frozen=True, eq=False)
class CacheFormat:
    """What all sequences of a cache have in common."""

    num_kv_heads: int
    head_dim: int
    k_bits: int
    v_bits: int
    codebook: str
    packing: str
    k_mean: Float32Array | None  # (num_kv_heads, head_dim)
    precision: str
    device: Device

    @classmethod
    def check(
        cls,
        op: str,
        num_kv_heads: int,
        head_dim: int,
        k_bits: int,
        v_bits: int,
        codebook: str,
        packing: str,
        k_mean: Array | None,
        precision: str,
        device: str | Device | None,
    ) -> CacheFormat:
        """Make a format of a caller's arguments."""
        heads, size = positive(op, "num_kv_heads", num_kv_heads), check_head_dim(op, head_dim)
        k_bits, v_bits = check_bits(op, "k_bits", k_bits), check_bits(op, "v_bits", v_bits)
        check_format(op, codebook, packing)
        check_precision(op, precision)
        mean = None if k_mean is None else _check_mean(op, k_mean, (heads, size))
        return cls(heads, size, k_bits, v_bits, codebook, packing, mean, precision, resolve_device(op, device))

    def row_bytes(self, bits: int) -> int:
        """Bytes of the codes of one vector."""
        return _core.row_bytes(self.packing, bits, self.head_dim)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of codes and norms of K and V, all heads."""
        norms = 2 * 4 * _core.norms_per_row(self.head_dim)
        return self.num_kv_heads * (self.row_bytes(self.k_bits) + self.row_bytes(self.v_bits) + norms)

    @cached_property
    def core_format(self) -> _core.CacheFormat:
        """What of it the core needs to know for every call."""
        return _core.CacheFormat("KVCache", self.k_bits, self.v_bits, self.codebook, self.packing, self.precision)

    @cached_property
    def attended(self) -> AttendedFormat:
        """What of it attention is planned by."""
        core = self.device._core
        offers_group = core.offers(AttendKernel.GROUP, self.head_dim, self.packing, self.k_bits, self.v_bits)
        return AttendedFormat(self.num_kv_heads, self.head_dim, self.k_bits, offers_group, core.num_multiprocessors)

    def norms_shape(self, capacity: int) -> tuple[int, ...]:
        """Shape of the norms of K, or of V."""
        return norms_shape((self.num_kv_heads, capacity), self.head_dim)

    def check_query(self, op: str, shape: tuple[int, ...], *, batched: bool) -> tuple[int, int]:
        """Accept queries: (H, D) or (N, H, D), behind one more axis if they are for several sequences; return N, H."""
        axes = 3 if batched else 2
        if len(shape) not in (axes, axes + 1) or shape[-1] != self.head_dim:
            lead = "sequences, " if batched else ""
            one, several = (f"({lead}{queries}heads, {self.head_dim})" for queries in ("", "queries, "))
            raise invalid(op, "q", f"must have shape {one} or {several}", shape)
        queries, heads = shape[-3] if len(shape) > axes else 1, shape[-2]
        if queries == 0:
            raise invalid(op, "q", "must hold at least one query", shape)
        if heads == 0 or heads % self.num_kv_heads != 0:
            raise invalid(op, "q", f"must have a multiple of {self.num_kv_heads} heads", heads)
        return queries, heads

    def residual(self, op: str, k: Rows, given: Array) -> Rows:
        """Return what of the keys is encoded; ``given`` is the array that they are of."""
        if self.k_mean is None:
            return k
        if isinstance(k, Buffer):
            left = gpu_arrays.compute(op, "k", k, given, lambda rows, mean: rows - mean, self.k_mean)
            return gpu_arrays.view(op, "k", left, self.device._core)
        with Allocating(op, "k less k_mean"), np.errstate(all="ignore"):
            return k - self.k_mean

    def append(
        self,
        op: str,
        outstanding: Outstanding,
        given: tuple[Array, Array],
        rows: tuple[Rows, Rows],
        runs: list[_core._AppendRun],
        *,
        batched: bool,
    ) -> None:
        """Encode K and V, ``given`` as some arrays, into codes; of arrays on a GPU without waiting for it."""
        core, (k, v) = self.device._core, rows
        if isinstance(k, np.ndarray) and isinstance(v, np.ndarray):
            _core.append(core, op, self.core_format, batched, k, v, runs)
            return
        where = gpu_arrays.stream(*given)
        staging, encoder = Staging(op, core), core.make_encoder(stream=where)
        buffers = staging.read("k", k), staging.read("v", v)
        _core.record_append(encoder, self.core_format, batched, *buffers, runs)
        if all(map(gpu_arrays.is_on_gpu, given)):
            outstanding.run(core, where, encoder)
        else:
            staging.run(encoder)

    def score_bias(self, op: str, q: Rows, given: Array, scale: float) -> Rows:
        """Return what the mean key, which there has to be, adds to every score of a query: (..., H)."""
        assert self.k_mean is not None
        group = q.shape[-2] // self.num_kv_heads
        per_kv_head = q.reshape((*q.shape[:-2], self.num_kv_heads, group, self.head_dim))
        if isinstance(per_kv_head, Buffer):
            scores = gpu_arrays.compute(
                op, "q", per_kv_head, given, lambda rows, mean: (rows * mean).sum(-1) * scale, self.k_mean[:, None]
            )
            return gpu_arrays.view(op, "q", scores, self.device._core).reshape(q.shape[:-1])
        assert isinstance(per_kv_head, np.ndarray)
        with Allocating(op, "the scores of k_mean"), np.errstate(all="ignore"):
            bias = scale * np.einsum("...ghd,gd->...gh", per_kv_head, self.k_mean, dtype=np.float64)
            rounded: Float32Array = bias.reshape(q.shape[:-1]).astype(np.float32)
        finite = np.isfinite(rounded)
        if not finite.all():
            rule = "must have a product with k_mean that, times the scale, fits in float32"
            raise invalid(op, "q", rule, bias.reshape(q.shape[:-1])[~finite][0])
        return rounded


def _check_mean(op: str, k_mean: Array, shape: tuple[int, int]) -> Float32Array:
    mean = as_float32(op, "k_mean", k_mean)
    if mean.shape != shape:
        raise invalid(op, "k_mean", f"must have shape {shape}", mean.shape)
    finite = np.isfinite(mean)
    if not finite.all():
        head, coordinate = np.argwhere(~finite)[0]
        raise invalid(op, "k_mean", "must be finite", f"{mean[head, coordinate]} at head {head}")
    return mean.copy()


@dataclass(frozen=True, eq=False)
class Codes:
    """Codes (num_kv_heads, capacity, bytes per row) and norms (num_kv_heads, capacity) or (..., 2) of one tensor."""

    form: CacheFormat
    bits: int
    capacity: int
    is_ring: bool
    packed: Buffer
    norms: Buffer

    @classmethod
    def allocate(cls, form: CacheFormat, bits: int, capacity: int, *, is_ring: bool) -> Codes:
        """Make room for ``capacity`` tokens."""
        packed = form.device.empty((form.num_kv_heads, capacity, form.row_bytes(bits)), np.uint8)
        return cls(form, bits, capacity, is_ring, packed, form.device.empty(form.norms_shape(capacity)))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.packed.nbytes + self.norms.nbytes

    def read(self, slots: Slots) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return codes and norms of some slots."""
        return self.packed.numpy()[:, slots], self.norms.numpy()[:, slots]

    def write(self, slots: Slots, codes: npt.NDArray[Any], norms: npt.NDArray[Any]) -> None:
        """Replace what is in some slots."""
        for buffer, rows in ((self.packed, codes), (self.norms, norms)):
            contents = buffer.numpy()
            if contents.flags.writeable:
                contents[:, slots] = rows
            else:  # of memory that the host cannot reach
                contents = contents.copy()
                contents[:, slots] = rows
                buffer.copy_from(contents)

    def copy_from(self, other: Codes, count: int) -> None:
        """Take over the first slots of another cache on the same device, which may have another capacity."""
        for mine, its in ((self.packed, other.packed), (self.norms, other.norms)):
            for head in range(self.form.num_kv_heads if count else 0):
                mine[head][:count].copy_from(its[head][:count])

    def params(self, position: int) -> _core.HadamardQuantizeKvHbParams:
        """Params of the ops that write and read vectors from a position on."""
        return self._lasting_params.replace(write_pos=position)

    @cached_property
    def _lasting_params(self) -> _core.HadamardQuantizeKvHbParams:
        return _core.HadamardQuantizeKvHbParams(
            head_dim=self.form.head_dim,
            num_kv_heads=self.form.num_kv_heads,
            write_pos=0,
            cache_capacity=self.capacity,
            is_sliding=int(self.is_ring),
            codebook_bits=self.bits,
        )

    def dequantize(self, op: str, first: int, count: int) -> Float32Array:
        """Rebuild the vectors of ``count`` positions: float32 (count, num_kv_heads, head_dim), not rotated."""
        form = self.form
        result: Float32Array = allocate(op, "the result", (count, form.num_kv_heads, form.head_dim))
        if count == 0:
            return result
        core = form.device._core
        staging, encoder = Staging(op, core), core.make_encoder()
        out = staging.fill("out", result)
        encoder.dequantize(op, self.params(0), first, self.packed, self.norms, out, form.codebook, form.packing)
        encoder.memory_barrier()
        encoder.fwht(op, _core.Fwht.UNDO, out)
        staging.run(encoder)
        return result
