"""What the tests run in a process of its own; takes and returns JSON."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np

import reference
import tq_hb
from cases import Case, make_problem
from simulator import Statistics


def attend(case: Case, device: str = "metal", *, unrotated: bool = True) -> tuple[np.ndarray, tuple[str, ...]]:
    """Run a case with the split that the policy chooses; the output and the kernels that made it."""
    dev = tq_hb.Device(device)
    problem = make_problem(case)
    output, encoder = dev.empty(problem.q.shape), dev.encoder()
    record = encoder.flash_attn_vec_tq_hb_with_fused_undo if unrotated else encoder.flash_attn_vec_tq_hb
    lse = {"lse": dev.empty(problem.q.shape[:-1])} if case.return_lse else {}
    sinks = None if problem.sinks is None else dev.array(problem.sinks)
    keywords = {**case.keywords(), "sinks": sinks, **lse}
    record(*(dev.array(a) for a in problem.buffers()), output, None, case.params(), **keywords)
    encoder.commit_and_wait()
    return output.numpy().copy(), encoder.kernels


def traffic(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Statistics of one attention call each."""
    statistics = Statistics()
    found = []
    for fields in cases:
        statistics.reset()
        attend(Case(**fields))
        found.append(statistics.read())
    return found


def attention_digests(cases: list[dict[str, Any]]) -> list[str]:
    """A digest of each case's output."""
    return [hashlib.sha256(attend(Case(**fields))[0].tobytes()).hexdigest() for fields in cases]


def attention_errors(cases: list[dict[str, Any]]) -> list[str]:
    """The message of each case's DeviceError, or "" where there is none."""
    messages = []
    for fields in cases:
        try:
            attend(Case(**fields))
            messages.append("")
        except tq_hb.DeviceError as error:
            messages.append(str(error))
    return messages


def encoding_digests(rows: int) -> dict[str, str]:
    """A digest of codes and norms for each head size, width, codebook and packing."""
    return encode_on("metal", rows)


def encode_on(device: str, rows: int) -> dict[str, str]:
    digests = {}
    for head_dim in tq_hb.supported_head_dims():
        rng = np.random.default_rng(head_dim)
        magnitudes = 10.0 ** rng.uniform(-25, 15, (rows, 1))
        magnitudes[::2] = 1.0
        x = (rng.standard_normal((rows, head_dim)) * magnitudes).astype(np.float32)
        formats = itertools.product(("lloyd_max", "mlx_native"), tq_hb.supported_bits(), ("byte", "plane"))
        for codebook, bits, packing in formats:
            codes, norms = tq_hb.quantize(x, bits, codebook=codebook, packing=packing, device=device)
            name = f"{head_dim} {codebook} {bits} {packing}"
            digests[name] = hashlib.sha256(codes.tobytes() + norms.tobytes()).hexdigest()
    return digests


def every_op(_: None) -> list[str]:
    """Run every kind of kernel on a small shape; the names of the kernels."""
    dev = tq_hb.Device("metal")
    ran: list[str] = []
    rng = np.random.default_rng(0)
    for head_dim, packing in itertools.product(tq_hb.supported_head_dims(), ("byte", "plane")):
        norms = reference.norms_shape(head_dim, 3, 5)
        k, v = rng.standard_normal((2, 7, 3, head_dim)).astype(np.float32)
        row_bytes = head_dim if packing == "byte" else head_dim * 6 // 8
        k_packed, v_packed = (dev.empty((3, 5, row_bytes), np.uint8) for _ in range(2))
        k_norms, v_norms = dev.empty(norms), dev.empty(norms)
        rows, plain = dev.array(k[0]), dev.empty((7, 3, head_dim))
        hp = tq_hb.HadamardQuantizeKvHbParams(
            head_dim=head_dim, num_kv_heads=3, write_pos=3, cache_capacity=5, is_sliding=1, codebook_bits=6
        )
        enc = dev.encoder()
        enc.hadamard_quantize_kv_hb(k, k_packed, k_norms, hp, packing=packing)
        enc.memory_barrier()
        enc.hadamard_quantize_kv_hb_dual(k, v, k_packed, v_packed, k_norms, v_norms, hp, packing=packing)
        enc.memory_barrier()
        enc.tq_dequantize_hb_kv(k_packed, k_norms, plain[0], hp, pos=4, packing=packing)
        for op in (enc.fwht_sign_premult_f32, enc.fwht_sign_undo_f32, enc.fwht_standalone_f32):
            op(rows)
            enc.memory_barrier()
        enc.commit_and_wait()
        ran += enc.kernels
        for heads, nwg, nsg, unrotated in ((3, 3, 4, True), (3, 1, 2, False), (3, 5, 1, False)):
            case = Case(
                head_dim=head_dim, num_heads=heads, num_kv_heads=3, kv_seq_len=65, kv_capacity=65, ring_start=40,
                nwg=nwg, nsg=nsg, k_bits=6, v_bits=5, packing=packing, num_queries=nwg, window=41,
                sinks="some" if unrotated else "none", return_lse=nsg == 1,
            )  # fmt: skip
            ran += attend(case, unrotated=unrotated)[1]
        for group in (2, 4, 8):
            case = Case(
                head_dim=head_dim, num_heads=2 * group, num_kv_heads=2, kv_seq_len=65, kv_capacity=70,
                fuse_fwht_pre=1, k_bits=5 if group == 4 else 8, v_bits=6, packing=packing, nwg=None,
                num_queries=3 if group == 8 else 1, sinks="finite", return_lse=group == 8,
            )  # fmt: skip
            ran += attend(case, unrotated=group == 2)[1]
    return ran
