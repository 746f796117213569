"""The kernels under the simulator's other modes: flushed denormals, contraction, other schedules, full checks."""

from __future__ import annotations

from dataclasses import asdict

import pytest

import modes
from cases import Case
from simulator import needs_simulator, run_in_mode

pytestmark = needs_simulator

KERNELS = {"tq_dequantize_hb_kv"} | {
    stem + head_dim
    for head_dim in ("64", "128", "256", "512")
    for stem in (
        "fwht_sign_premult_f32_d",
        "fwht_sign_undo_f32_d",
        "fwht_standalone_f32_d",
        "hadamard_quantize_kv_hb_d",
        "hadamard_quantize_kv_hb_dual_d",
        "flash_attn_vec_tq_hb_dk",
        "flash_attn_vec_reduce_dk",
        "flash_attn_vec_reduce_tq_hb_undo_dk",
        "flash_attn_vec_tq_hb_gqa2_dk",
        "flash_attn_vec_tq_hb_gqa4_dk",
        "flash_attn_vec_tq_hb_gqa8_dk",
        "flash_attn_vec_merge_tq_hb_dk",
        "flash_attn_vec_merge_tq_hb_undo_dk",
    )
}

SCHEDULED = [
    Case(num_heads=4, num_kv_heads=2, kv_seq_len=100, kv_capacity=100, ring_start=50, nsg=4, nwg=5),
    Case(num_heads=4, num_kv_heads=2, head_dim=512, kv_seq_len=65, kv_capacity=70, nsg=2, nwg=3, v_bits=5),
    Case(num_heads=2, head_dim=64, nsg=4, nwg=3, k_bits=6, v_bits=5, packing="plane", num_queries=3, sinks="finite"),
    Case(num_heads=8, num_kv_heads=1, kv_seq_len=200, kv_capacity=200, fuse_fwht_pre=1, nwg=None),
    Case(num_heads=8, head_dim=512, kv_seq_len=150, kv_capacity=150, window=90, k_bits=6, nwg=None),
    Case(num_heads=4, head_dim=64, k_bits=5, packing="plane", num_queries=3, return_lse=True, window=40, nwg=None),
    Case(num_heads=6, head_dim=128, k_bits=6, v_bits=5, packing="plane", num_queries=4, sinks="finite", nwg=None),
]
# Rows per head size: 3 widths, 2 codebooks, 2 packings and 4 head sizes make 2.8 million values.
ENCODED_ROWS = 240


@pytest.fixture(scope="module")
def cpu_bytes() -> dict[str, str]:
    return modes.encode_on("cpu", ENCODED_ROWS)


@pytest.mark.parametrize("lane", ["", "ftz", "contract", "ftz,contract"], ids=lambda lane: lane or "plain")
def test_encoding_gives_the_cpus_bytes(cpu_bytes, lane):
    assert run_in_mode("encoding_digests", ENCODED_ROWS, METAL_SIM_LANE=lane) == cpu_bytes


def test_every_schedule_gives_the_same_bits():
    cases = [asdict(case) for case in SCHEDULED]
    first_in_first_out = run_in_mode("attention_digests", cases, TQ_HB_GQA="on")
    for seed in ("1", "2", "3"):
        assert run_in_mode("attention_digests", cases, TQ_HB_GQA="on", METAL_SIM_SEED=seed) == first_in_first_out


def test_every_kernel_passes_every_check():
    """No access out of bounds, no race, no use of threadgroup memory that nobody wrote."""
    ran = set(run_in_mode("every_op", None, METAL_SIM_CHECK="1", TQ_HB_GQA="auto"))
    ran |= set(run_in_mode("every_op", None, METAL_SIM_CHECK="1", TQ_HB_GQA="on", METAL_SIM_SEED="7"))

    assert ran == KERNELS


def test_without_the_barrier_the_merge_races_with_the_partials():
    cases = [asdict(case) for case in SCHEDULED]
    messages = run_in_mode("attention_errors", cases, TQ_HB_GQA="on", METAL_SIM_CHECK="1", METAL_SIM_DROP_BARRIERS="1")
    assert all("race" in message for message in messages), messages
    assert not any(run_in_mode("attention_errors", cases, TQ_HB_GQA="on", METAL_SIM_CHECK="1"))


def test_without_the_barrier_some_order_gives_other_numbers():
    cases = [asdict(case) for case in SCHEDULED]
    right = run_in_mode("attention_digests", cases, TQ_HB_GQA="on")
    results = [
        run_in_mode("attention_digests", cases, TQ_HB_GQA="on", METAL_SIM_SEED=seed, METAL_SIM_DROP_BARRIERS="1")
        for seed in ("1", "2", "3")
    ]
    assert any(result != right for result in results)
