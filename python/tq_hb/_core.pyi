import enum
from typing import Any, Self

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float32]
_Array = npt.NDArray[Any]
_Size3 = tuple[int, int, int]
_Node = tuple[str, str, _Size3, _Size3, int]

GQA_MAX_TILE: int
GQA_MAX_SPLITS: int

class InvalidArgument(ValueError): ...
class UnsupportedError(NotImplementedError): ...
class DeviceError(RuntimeError): ...
class OutOfMemoryError(DeviceError, MemoryError): ...

class FlashAttnVecTqHbParams:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_seq_len: int
    kv_capacity: int
    scale: float
    mask_type: int
    sliding_window: int
    softcap: float
    ring_start: int
    scale_factor_d512: float
    codebook_bits: int
    fuse_fwht_pre: int
    nsg: int
    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kv_seq_len: int,
        kv_capacity: int,
        scale: float,
        mask_type: int = ...,
        sliding_window: int = ...,
        softcap: float = ...,
        ring_start: int = ...,
        scale_factor_d512: float = ...,
        codebook_bits: int = ...,
        fuse_fwht_pre: int = ...,
        nsg: int = ...,
    ) -> None: ...
    def replace(self, **kwargs: float) -> Self: ...
    def validate(self, op: str = ...) -> None: ...
    def __eq__(self, other: object) -> bool: ...

class HadamardQuantizeKvHbParams:
    head_dim: int
    num_kv_heads: int
    write_pos: int
    cache_capacity: int
    is_sliding: int
    scale_factor_d512: float
    codebook_bits: int
    def __init__(
        self,
        *,
        head_dim: int,
        num_kv_heads: int,
        write_pos: int,
        cache_capacity: int,
        is_sliding: int = ...,
        scale_factor_d512: float = ...,
        codebook_bits: int = ...,
    ) -> None: ...
    def replace(self, **kwargs: float) -> Self: ...
    def validate(self, op: str = ...) -> None: ...
    def __eq__(self, other: object) -> bool: ...

class Buffer:
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def ndim(self) -> int: ...
    def reshape(self, shape: int | tuple[int, ...]) -> Buffer: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def offset(self) -> int: ...
    def numpy(self) -> _Array: ...
    def copy_from(self, x: object) -> None: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: int | slice) -> Buffer: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __dlpack__(
        self,
        *,
        stream: object = ...,
        max_version: tuple[int, int] | None = ...,
        dl_device: tuple[int, int] | None = ...,
        copy: bool | None = ...,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class AttendKernel(enum.Enum):
    PER_HEAD = 0
    GROUP = 1

class Fwht(enum.Enum):
    PREMULT = 0
    UNDO = 1
    PLAIN = 2

class CommandEncoder:
    def hadamard_quantize(
        self,
        op: str,
        hp: HadamardQuantizeKvHbParams,
        targets: list[tuple[str, Buffer, Buffer, Buffer, int]],
        codebook: str,
        packing: str = ...,
    ) -> None: ...
    def dequantize(
        self,
        op: str,
        hp: HadamardQuantizeKvHbParams,
        first_position: int,
        packed: Buffer,
        norms: Buffer,
        output: Buffer,
        codebook: str,
        packing: str = ...,
    ) -> None: ...
    def flash_attn_vec(
        self,
        op: str,
        q: Buffer,
        k_packed: Buffer,
        k_norms: Buffer,
        v_packed: Buffer,
        v_norms: Buffer,
        output: Buffer,
        tmp: Buffer | None,
        p: FlashAttnVecTqHbParams,
        kernel: AttendKernel,
        head_tile: int,
        nwg: int,
        v_bits: int,
        codebook: str,
        fused_undo: bool,
        packing: str = ...,
        query_position: int | None = ...,
        sinks: Buffer | None = ...,
        score_bias: Buffer | None = ...,
        lse: Buffer | None = ...,
        precision: str = ...,
    ) -> None: ...
    def fwht(self, op: str, kind: Fwht, data: Buffer) -> None: ...
    def memory_barrier(self) -> None: ...
    def commit(self) -> None: ...
    def wait(self) -> None: ...
    @property
    def is_done(self) -> bool: ...
    @property
    def gpu_time(self) -> float: ...
    @property
    def kernels(self) -> tuple[str, ...]: ...
    @property
    def nodes(self) -> tuple[_Node, ...]: ...

class CacheBuffers:
    def __init__(self, k_packed: Buffer, k_norms: Buffer, v_packed: Buffer, v_norms: Buffer) -> None: ...

class AttendPlan:
    def __init__(
        self, params: FlashAttnVecTqHbParams, kernel: AttendKernel, head_tile: int, nwg: int, query_position: int
    ) -> None: ...

# Name in errors, place in the arrays, number of tokens, where the first goes, and into what.
_AppendRun = tuple[str, int, int, HadamardQuantizeKvHbParams, CacheBuffers]
# Place in the arrays, what is attended to, and how.
_AttentionRun = tuple[int, CacheBuffers, AttendPlan]

class CacheFormat:
    def __init__(self, op: str, k_bits: int, v_bits: int, codebook: str, packing: str, precision: str) -> None: ...

class Launched:
    @property
    def nodes(self) -> tuple[_Node, ...]: ...
    @property
    def precision(self) -> str: ...

class Device:
    @property
    def name(self) -> str: ...
    @property
    def backend(self) -> str: ...
    @property
    def is_simulated(self) -> bool: ...
    @property
    def max_buffer_bytes(self) -> int: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def max_threadgroup_bytes(self) -> int: ...
    @property
    def max_threads_per_threadgroup(self) -> int: ...
    @property
    def num_multiprocessors(self) -> int: ...
    def offers(self, kernel: AttendKernel, head_dim: int, packing: str, k_bits: int, v_bits: int) -> bool: ...
    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], op: str, field: str) -> Buffer: ...
    def wrap(self, op: str, field: str, array: _Array) -> Buffer | None: ...
    def copy_in(self, op: str, field: str, array: _Array) -> Buffer: ...
    def borrow(self, op: str, field: str, producer: Any, stream: int) -> Buffer: ...
    def is_capturing(self, stream: int) -> bool: ...
    def make_encoder(self, auto_barrier: bool = ..., stream: int | None = ...) -> CommandEncoder: ...
    def warm_up(self, bits: list[int]) -> None: ...

def append(
    device: Device,
    op: str,
    form: CacheFormat,
    batched: bool,
    k: _Floats,
    v: _Floats,
    runs: list[_AppendRun],
    /,
) -> None: ...
def record_append(
    encoder: CommandEncoder,
    form: CacheFormat,
    batched: bool,
    k: Buffer,
    v: Buffer,
    runs: list[_AppendRun],
    /,
) -> None: ...
def attend(
    device: Device,
    op: str,
    form: CacheFormat,
    batched: bool,
    q: _Floats,
    output: _Floats,
    sinks: _Floats | Buffer | None,
    score_bias: _Floats | None,
    lse: _Floats | None,
    runs: list[_AttentionRun],
    /,
) -> list[Launched]: ...
def record_attention(
    encoder: CommandEncoder,
    op: str,
    form: CacheFormat,
    batched: bool,
    q: Buffer,
    output: Buffer,
    sinks: Buffer | None,
    score_bias: Buffer | None,
    lse: Buffer | None,
    runs: list[_AttentionRun],
    /,
) -> list[Launched]: ...
def open_device(backend: str) -> Device: ...
def backend_names() -> tuple[str, ...]: ...
def backend_statuses() -> list[tuple[str, Device | None, str]]: ...
def copy_beside(buffer: Buffer, op: str, field: str, array: _Array) -> Buffer: ...
def require_rows(op: str, field: str, rows: _Floats) -> None: ...
def require_queries(op: str, batched: bool, q: _Floats) -> None: ...
def from_dlpack(op: str, field: str, producer: Any, rule: str) -> tuple[_Array, bool]: ...
def to_uint32(op: str, field: str, value: object) -> int: ...
def to_float32(op: str, field: str, value: object) -> float: ...
def check_head_dim(op: str, head_dim: int) -> None: ...
def tmp_buffer_bytes(num_heads: int, head_dim: int, num_queries: int, splits: int) -> int: ...
def supported_head_dims() -> tuple[int, ...]: ...
def norms_per_row(head_dim: int) -> int: ...
def row_bytes(packing: str, cbits: int, head_dim: int, /) -> int: ...
def convert_packing(
    op: str, codes: npt.NDArray[np.uint8], bits: int, head_dim: int, source: str, target: str
) -> npt.NDArray[np.uint8]: ...
def codebook_names() -> tuple[str, ...]: ...
def supported_bits() -> tuple[int, ...]: ...
def codebook(op: str, cbits: int, name: str) -> tuple[_Floats, _Floats]: ...
def signs(head_dim: int) -> _Floats: ...
def cpu_isa() -> str: ...
def cpu_isas() -> tuple[str, ...]: ...
def set_cpu_isa(op: str, field: str, isa: str) -> None: ...
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
