"""KV cache at 5, 6 or 8 bits per value, and attention that reads it without rebuilding K or V."""

from tq_hb import policy
from tq_hb._core import (
    DeviceError,
    FlashAttnVecTqHbParams,
    HadamardQuantizeKvHbParams,
    InvalidArgument,
    OutOfMemoryError,
    UnsupportedError,
)
from tq_hb.batch import BatchedKVCache
from tq_hb.cache import KVCache, Plan
from tq_hb.codec import (
    boundaries,
    codebook,
    convert_packing,
    dequantize,
    quantize,
    signs,
    supported_bits,
    supported_head_dims,
)
from tq_hb.device import (
    Device,
    DeviceInfo,
    DeviceLimits,
    cpu_isa,
    devices,
    empty,
    num_threads,
    set_num_threads,
    warmup,
)
from tq_hb.encoder import Buffer, CommandEncoder, Node
from tq_hb.files import load_caches, save_caches
from tq_hb.ops import (
    flash_attn_vec_tq_hb,
    flash_attn_vec_tq_hb_with_fused_undo,
    hadamard_quantize_kv_hb,
    hadamard_quantize_kv_hb_dual,
    tmp_buffer_bytes,
    tq_dequantize_hb_kv,
)
from tq_hb.policy import compute_nsg, compute_nwg
from tq_hb.states import merge_states
from tq_hb.transforms import (
    fwht_sign_premult_f32,
    fwht_sign_undo_f32,
    fwht_standalone_f32,
    rotate,
    unrotate,
)

__all__ = [
    "BatchedKVCache",
    "Buffer",
    "CommandEncoder",
    "Device",
    "DeviceError",
    "DeviceInfo",
    "DeviceLimits",
    "FlashAttnVecTqHbParams",
    "HadamardQuantizeKvHbParams",
    "InvalidArgument",
    "KVCache",
    "Node",
    "OutOfMemoryError",
    "Plan",
    "UnsupportedError",
    "boundaries",
    "codebook",
    "compute_nsg",
    "compute_nwg",
    "convert_packing",
    "cpu_isa",
    "dequantize",
    "devices",
    "empty",
    "flash_attn_vec_tq_hb",
    "flash_attn_vec_tq_hb_with_fused_undo",
    "fwht_sign_premult_f32",
    "fwht_sign_undo_f32",
    "fwht_standalone_f32",
    "hadamard_quantize_kv_hb",
    "hadamard_quantize_kv_hb_dual",
    "load_caches",
    "merge_states",
    "num_threads",
    "policy",
    "quantize",
    "rotate",
    "save_caches",
    "set_num_threads",
    "signs",
    "supported_bits",
    "supported_head_dims",
    "tmp_buffer_bytes",
    "tq_dequantize_hb_kv",
    "unrotate",
    "warmup",
]


def __getattr__(name: str) -> str:
    """Look up ``__version__`` when asked: reading package metadata takes longer than all the rest."""
    if name == "__version__":
        from importlib.metadata import version

        return version("tq-hb")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
