"""What the attention kernels read, counted: every visible byte as often as the design says, and nothing else."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from cases import Case
from simulator import needs_simulator, run_in_mode

pytestmark = needs_simulator


def case(heads: int, kv_heads: int, head_dim: int, length: int, **more: int) -> Case:
    return Case(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, kv_seq_len=length, kv_capacity=length + 3, **more
    )


GROUP_CASES = [
    case(2, 1, 256, 1),
    case(8, 2, 256, 33),
    case(16, 2, 256, 513),
    case(12, 1, 256, 64),
    case(34, 2, 256, 100),
    case(6, 2, 512, 65, k_bits=6, v_bits=5),
    case(16, 1, 512, 40),
    case(8, 1, 256, 200, window=33),
    Case(num_heads=8, num_kv_heads=2, kv_seq_len=96, kv_capacity=96, ring_start=50, window=70),
]
HEAD_CASES = [
    case(3, 3, 256, 70, nwg=2, nsg=2),
    case(4, 2, 256, 513, nwg=7),
    case(4, 2, 512, 65, nwg=32, nsg=4),
    case(2, 2, 256, 300, window=32, nwg=3),
]


@pytest.fixture(scope="module")
def counted() -> dict[str, dict]:
    """Statistics of one call of each case, by the case's text."""
    mode = {"METAL_SIM_CHECK": "1", "TQ_HB_GQA": "on"}
    found = run_in_mode("traffic", [asdict(c) for c in GROUP_CASES], **mode)
    found += run_in_mode("traffic", [asdict(c) for c in HEAD_CASES], METAL_SIM_CHECK="1")
    return dict(zip(map(str, GROUP_CASES + HEAD_CASES), found, strict=True))


def visible(c: Case) -> int:
    return min(c.window or c.kv_seq_len, c.kv_seq_len)


def reads_of(statistics: dict, prefix: str) -> dict[int, int]:
    """Bytes read per buffer slot by the kernel whose name starts with ``prefix``."""
    (kernel,) = (k for name, k in statistics["kernels"].items() if name.startswith(prefix))
    return {int(name.strip("<>").split()[1]): b["read"] for name, b in kernel["buffers"].items()}


@pytest.mark.parametrize("c", GROUP_CASES, ids=str)
def test_the_group_kernel_reads_a_row_once_for_a_tile_of_heads(counted, c):
    reads = reads_of(counted[str(c)], "flash_attn_vec_tq_hb_gqa")

    group = c.num_heads // c.num_kv_heads
    tile = next((t for t in (2, 4, 8) if t >= group), 8)
    rows = -(-group // tile) * c.num_kv_heads * visible(c)
    assert reads[2] == reads[4] == rows * c.head_dim
    assert reads[3] == reads[5] == rows * c.head_dim // 256 * 4


@pytest.mark.parametrize("c", HEAD_CASES, ids=str)
def test_the_kernel_for_one_head_reads_what_the_query_sees(counted, c):
    reads = reads_of(counted[str(c)], "flash_attn_vec_tq_hb_dk")

    rows = c.num_heads * visible(c)
    assert reads[2] == reads[4] == rows * c.head_dim
    assert reads[3] == reads[5] == rows * c.head_dim // 256 * 4


@pytest.mark.parametrize("c", GROUP_CASES + HEAD_CASES, ids=str)
def test_a_call_is_two_dispatches_with_one_barrier_between(counted, c):
    statistics = counted[str(c)]
    assert statistics["dispatches"] == statistics["batches"] == 2
    assert all(k["threadgroup_bytes"] <= 32768 for k in statistics["kernels"].values())
