"""What the attention kernels read, counted: every visible byte as often as the design says, and nothing else."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from cases import Case
from simulator import needs_simulator, run_in_mode

pytestmark = needs_simulator


def case(heads: int, kv_heads: int, head_dim: int, length: int, **more: Any) -> Case:
    fields = {"kv_capacity": length + 3, "nwg": None, **more}
    return Case(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, kv_seq_len=length, **fields)


GROUP_CASES = [
    case(2, 1, 256, 1),
    case(8, 2, 256, 33),
    case(16, 2, 256, 513),
    case(12, 1, 256, 64),
    case(34, 2, 256, 100),
    case(6, 2, 512, 65, k_bits=6, v_bits=5),
    case(16, 1, 512, 40),
    case(8, 1, 256, 200, window=33),
    case(8, 2, 256, 96, kv_capacity=96, ring_start=50, window=70),
    case(8, 2, 64, 70),
    case(4, 1, 128, 41),
    case(8, 1, 64, 45, packing="plane", k_bits=5, v_bits=6),
    case(4, 2, 128, 45, packing="plane", k_bits=6, v_bits=5),
    case(8, 1, 256, 70, packing="plane", k_bits=5, v_bits=8),
    case(4, 1, 512, 33, packing="plane", k_bits=6, v_bits=5),
    case(4, 2, 256, 70, num_queries=4),
    case(12, 2, 128, 100, num_queries=5, window=40, packing="plane", k_bits=5, v_bits=5),
]
HEAD_CASES = [
    case(3, 3, 256, 70, nwg=2, nsg=2),
    case(4, 2, 256, 513, nwg=7),
    case(4, 2, 512, 65, nwg=32, nsg=4),
    case(2, 2, 256, 300, window=32, nwg=3),
    case(2, 2, 64, 70, nwg=2, nsg=2),
    case(3, 1, 128, 41, nwg=2, num_queries=3, window=20),
]
HEAD_PLANE_CASES = [
    case(2, 1, 64, 45, packing="plane", k_bits=5, v_bits=6, nwg=2),
    case(2, 1, 256, 45, packing="plane", k_bits=6, v_bits=5, nwg=2, num_queries=2),
]
EVERY_CASE = GROUP_CASES + HEAD_CASES + HEAD_PLANE_CASES


@pytest.fixture(scope="module")
def counted() -> dict[str, dict]:
    """Statistics of one call of each case, by the case's text."""
    found = run_in_mode("traffic", [asdict(c) for c in EVERY_CASE], METAL_SIM_CHECK="1", TQ_HB_GQA="on")
    return dict(zip(map(str, EVERY_CASE), found, strict=True))


def visible(c: Case, queries: range) -> int:
    """Keys that at least one of these queries sees."""
    ranges = [c.visible.ages()[i] for i in queries]
    return max(end for _, end in ranges) - min(begin for begin, _ in ranges)


def row_bytes(c: Case, bits: int) -> int:
    return c.head_dim if c.packing == "byte" else c.head_dim * bits // 8


def norm_bytes(c: Case) -> int:
    return 8 if c.head_dim == 512 else 4


def reads_of(statistics: dict, prefix: str) -> dict[int, int]:
    """Bytes read per buffer slot by the kernel whose name starts with ``prefix``."""
    (kernel,) = (k for name, k in statistics["kernels"].items() if name.startswith(prefix))
    return {int(name.strip("<>").split()[1]): b["read"] for name, b in kernel["buffers"].items()}


@pytest.mark.parametrize("c", GROUP_CASES, ids=str)
def test_the_group_kernel_reads_a_row_once_for_a_tile(counted, c):
    """A tile holds heads of one query after the other; a key that none of its queries sees is not read."""
    reads = reads_of(counted[str(c)], "flash_attn_vec_tq_hb_gqa")

    group = c.num_heads // c.num_kv_heads
    members = group * (c.num_queries or 1)
    tile = next((t for t in (2, 4, 8) if t >= members), 8)
    tiles = [range(first // group, -(-min(first + tile, members) // group)) for first in range(0, members, tile)]
    rows = c.num_kv_heads * sum(visible(c, queries) for queries in tiles)
    assert reads[2] == rows * row_bytes(c, c.k_bits)
    assert reads[4] == rows * row_bytes(c, c.v_bits)
    assert reads[3] == reads[5] == rows * norm_bytes(c)


def test_several_queries_share_a_decode(counted):
    c = case(4, 2, 256, 70, num_queries=4)
    assert c in GROUP_CASES
    reads = reads_of(counted[str(c)], "flash_attn_vec_tq_hb_gqa")
    assert reads[2] == c.num_kv_heads * c.kv_seq_len * c.head_dim  # 2 heads of 4 queries are one tile of 8


@pytest.mark.parametrize("c", HEAD_CASES + HEAD_PLANE_CASES, ids=str)
def test_the_kernel_for_one_head_reads_what_the_query_sees(counted, c):
    reads = reads_of(counted[str(c)], "flash_attn_vec_tq_hb_dk")

    rows = c.num_heads * sum(visible(c, range(i, i + 1)) for i in range(c.num_queries or 1))
    # Where there are planes, every lane loads two bytes of each, though the high plane has fewer: as many as in bytes.
    assert reads[2] == reads[4] == rows * c.head_dim
    assert reads[3] == reads[5] == rows * norm_bytes(c)


@pytest.mark.parametrize("c", EVERY_CASE, ids=str)
def test_a_call_is_two_dispatches_with_one_barrier_between(counted, c):
    statistics = counted[str(c)]
    assert statistics["dispatches"] == statistics["batches"] == 2
    assert all(k["threadgroup_bytes"] <= 32768 for k in statistics["kernels"].values())
