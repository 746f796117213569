"""How calls are split, and what the environment may change about it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tq_hb
from tq_hb import _core, policy
from tq_hb.cli import info


@pytest.mark.parametrize(
    ("kv_len", "nsg"),
    [(1, 1), (64, 1), (256, 1), (1024, 1), (1025, 4), (1536, 4), (2048, 4), (4096, 4), (8192, 4), (16384, 4)],
)
def test_nsg(kv_len, nsg):
    assert tq_hb.compute_nsg(kv_len) == nsg


@pytest.mark.parametrize(("kv_len", "nwg"), [(1, 16), (64, 16), (512, 16), (513, 32), (1024, 32), (100_000, 32)])
def test_nwg(kv_len, nwg):
    assert tq_hb.compute_nwg(kv_len) == nwg


@pytest.mark.parametrize("choose", [tq_hb.compute_nsg, tq_hb.compute_nwg], ids=["nsg", "nwg"])
@pytest.mark.parametrize("kv_len", [-1, 1.5, 2**32, "64", None], ids=repr)
def test_lengths_that_are_none_are_refused(choose, kv_len):
    with pytest.raises(tq_hb.InvalidArgument, match=f"{choose.__name__}.*kv_seq_len.*got"):
        choose(kv_len)


@pytest.mark.parametrize("value", ["1", "2", "4"])
def test_nsg_override(environment, value):
    environment(HF2Q_TQ_NSG=value)
    assert tq_hb.compute_nsg(64) == tq_hb.compute_nsg(4096) == int(value)


@pytest.mark.parametrize("value", ["1", "3", "7", "31", "32"])
def test_nwg_override(environment, value):
    environment(HF2Q_TQ_NWG=value)
    assert tq_hb.compute_nwg(64) == tq_hb.compute_nwg(4096) == int(value)


@pytest.mark.parametrize(
    "value", ["0", "3", "8", "-1", "1.0", "two", "", " ", "4294967297", "9" * 5000, "٤"], ids=lambda text: text[:12]
)
def test_a_bad_nsg_override_is_no_override(environment, value):
    environment(HF2Q_TQ_NSG=value)
    assert tq_hb.compute_nsg(64) == 1
    assert tq_hb.compute_nsg(4096) == 4


@pytest.mark.parametrize(
    "value", ["0", "33", "-1", "16.0", "many", "", "4294967312", "9" * 5000], ids=lambda text: text[:12]
)
def test_a_bad_nwg_override_is_no_override(environment, value):
    environment(HF2Q_TQ_NWG=value)
    assert tq_hb.compute_nwg(64) == 16
    assert tq_hb.compute_nwg(4096) == 32


def test_every_override_has_a_variable_that_the_document_and_info_show():
    assert sorted(field for field, _ in policy.VARIABLES.values()) == sorted(policy.Environment._fields)
    assert list(info.collect()["environment"]) == list(policy.VARIABLES)
    document = Path(__file__).resolve().parents[2] / "docs" / "environment.md"
    assert re.findall(r"^\| `(\w+)` \|", document.read_text(), re.MULTILINE) == list(policy.VARIABLES)


def test_the_environment_is_read_once_until_reload(monkeypatch, environment):
    environment(HF2Q_TQ_NSG="2")
    assert tq_hb.compute_nsg(64) == 2
    monkeypatch.setenv("HF2Q_TQ_NSG", "4")
    assert tq_hb.compute_nsg(64) == 2

    tq_hb.policy.reload()

    assert tq_hb.compute_nsg(64) == 4


def test_a_reload_leaves_the_cpu_backend_as_it_is(environment):
    before = tq_hb.num_threads(), tq_hb.cpu_isa()
    environment(TQ_HB_NUM_THREADS=str(before[0] + 1), TQ_HB_CPU_ISA="portable")
    assert (tq_hb.num_threads(), tq_hb.cpu_isa()) == before


def test_arguments_of_a_call_override_the_environment(environment):
    environment(HF2Q_TQ_NWG="33", HF2Q_TQ_NSG="2")
    p = tq_hb.FlashAttnVecTqHbParams(
        num_heads=1, num_kv_heads=1, head_dim=256, kv_seq_len=1, kv_capacity=1, scale=1.0, nsg=4
    )
    packed, norms = np.zeros((1, 1, 256), np.uint8), np.zeros((1, 1), np.float32)

    got = tq_hb.flash_attn_vec_tq_hb(np.zeros((1, 256), np.float32), packed, norms, packed, norms, p, nwg=7)

    assert got.shape == (1, 256)
    assert p.nsg == 4


def run_python(code: str, **variables: str) -> str:
    """What a fresh interpreter prints; its last line of stderr if it fails."""
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() if run.returncode == 0 else run.stderr.strip().splitlines()[-1]


USE_THE_DEFAULT_DEVICE = "import numpy, tq_hb; print(tq_hb.KVCache(1, 256).device.backend)"
USE_THE_CPU = """
import numpy as np, tq_hb
tq_hb.quantize(np.ones((1, 256), np.float32), 8, device="cpu")
print(tq_hb.num_threads())
"""


def test_the_device_variable_chooses_the_default():
    assert run_python(USE_THE_DEFAULT_DEVICE, TQ_HB_DEVICE="cpu") == "cpu"


@pytest.mark.parametrize("value", ["tpu", "CPU ", "0"])
def test_a_bad_device_variable_is_an_error_at_first_use(value):
    assert run_python("import tq_hb; print('imported')", TQ_HB_DEVICE=value) == "imported"

    message = run_python(USE_THE_DEFAULT_DEVICE, TQ_HB_DEVICE=value)

    assert "InvalidArgument" in message
    assert "TQ_HB_DEVICE" in message
    assert value in message


def test_a_named_device_does_not_read_the_device_variable():
    code = "import tq_hb; print(tq_hb.KVCache(1, 256, device='cpu').device.backend)"
    assert run_python(code, TQ_HB_DEVICE="tpu") == "cpu"


@pytest.mark.parametrize("value", ["1", "3"])
def test_the_thread_variable_sets_the_number_of_threads(value):
    assert run_python(USE_THE_CPU, TQ_HB_NUM_THREADS=value) == value


@pytest.mark.parametrize("value", ["0", "-2", "1.5", "all", "99999999999"])
def test_a_bad_thread_variable_is_an_error_at_first_use(value):
    assert run_python("import tq_hb; print('imported')", TQ_HB_NUM_THREADS=value) == "imported"

    message = run_python(USE_THE_CPU, TQ_HB_NUM_THREADS=value)

    assert "InvalidArgument" in message
    assert "TQ_HB_NUM_THREADS must be from 1 to 1024" in message
    assert value in message


@pytest.mark.parametrize("isa", _core.cpu_isas())
def test_the_isa_variable_forces_an_instruction_set(isa):
    code = USE_THE_CPU + "print(tq_hb.cpu_isa(), tq_hb.Device('cpu').name)"
    assert run_python(code, TQ_HB_CPU_ISA=isa).splitlines()[-1] == f"{isa} cpu ({isa})"


def test_the_fastest_instruction_set_is_the_default():
    code = "import tq_hb; print(tq_hb.cpu_isa())"
    assert run_python(code, TQ_HB_CPU_ISA="") == _core.cpu_isas()[-1]


@pytest.mark.parametrize("value", ["AVX2", "sse9", "avx2 "])
def test_a_bad_isa_variable_is_an_error_at_first_use(value):
    assert run_python("import tq_hb; print('imported')", TQ_HB_CPU_ISA=value) == "imported"

    message = run_python(USE_THE_CPU, TQ_HB_CPU_ISA=value)

    assert "InvalidArgument" in message
    assert f"TQ_HB_CPU_ISA must be one of those this processor runs ({', '.join(_core.cpu_isas())})" in message
    assert repr(value) in message


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", None, 2**40])
def test_set_num_threads_refuses_what_is_no_number_of_threads(value):
    before = tq_hb.num_threads()
    with pytest.raises(tq_hb.InvalidArgument, match=r"^set_num_threads: n must be from 1 to 1024, got "):
        tq_hb.set_num_threads(value)
    assert tq_hb.num_threads() == before


def test_set_num_threads_is_seen_by_the_device_limits():
    before = tq_hb.num_threads()
    try:
        tq_hb.set_num_threads(3)
        assert tq_hb.num_threads() == tq_hb.Device("cpu").limits.num_threads == 3
    finally:
        tq_hb.set_num_threads(before)


def params(group=4, kv_heads=4, kv_len=4096, head_dim=256, window=0):
    return tq_hb.FlashAttnVecTqHbParams(
        num_heads=group * kv_heads, num_kv_heads=kv_heads, head_dim=head_dim, kv_seq_len=kv_len, kv_capacity=kv_len,
        scale=1.0, mask_type=2 if window else 0, sliding_window=window,
    )  # fmt: skip


def plan(*, queries=1, offers_group=True, multiprocessors=0, nwg=None, tmp_bytes=None, **shape):
    dispatch = policy.plan_attention(
        "op", params(**shape), num_queries=queries, offers_group=offers_group, multiprocessors=multiprocessors,
        nwg=nwg, tmp_bytes=tmp_bytes,
    )  # fmt: skip
    is_group = dispatch.kernel is policy.AttendKernel.GROUP
    return (dispatch.head_tile if is_group else "per head", dispatch.nwg)


class TestPlan:
    """Which attention kernel serves a call, and over how many splits."""

    @pytest.mark.parametrize(
        ("group", "tile"), [(2, 2), (3, 4), (4, 4), (5, 8), (6, 8), (7, 8), (8, 8), (9, 8), (16, 8)]
    )
    def test_the_tile_is_the_smallest_that_covers_the_group(self, group, tile):
        assert plan(group=group)[0] == tile

    @pytest.mark.parametrize(
        ("shape", "splits"),
        [
            ({"group": 2, "kv_heads": 8}, 32),  # 256 threadgroups over 8
            ({"group": 4, "kv_heads": 1}, 64),  # no more than 4096 / 64
            ({"group": 4, "kv_heads": 1, "kv_len": 100_000}, 256),
            ({"group": 4, "kv_heads": 3}, 64),
            ({"group": 4, "kv_heads": 5}, 52),  # rounded up
            ({"group": 16, "kv_heads": 8}, 16),  # two tiles per KV head
            ({"group": 9, "kv_heads": 8}, 16),  # the second tile is mostly padding
            ({"group": 2, "kv_heads": 300}, 1),
            ({"group": 4, "kv_heads": 1, "kv_len": 512}, 8),
            ({"group": 4, "kv_heads": 1, "kv_len": 513}, 9),
            ({"group": 4, "kv_heads": 1, "kv_len": 10_000, "window": 600}, 10),
        ],
        ids=str,
    )
    def test_splits(self, shape, splits):
        assert plan(**shape)[1] == splits

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ({"group": 1}, ("per head", 32)),
            ({"kv_len": 511}, ("per head", 16)),
            ({"kv_len": 4096, "window": 511}, ("per head", 32)),
            ({"kv_len": 4096, "window": 512}, (4, 8)),
            ({"offers_group": False}, ("per head", 32)),
            ({"nwg": 7}, ("per head", 7)),
        ],
        ids=str,
    )
    def test_when_the_per_head_kernel_serves(self, shape, expected):
        assert plan(**shape) == expected

    @pytest.mark.parametrize(
        ("variables", "expected"),
        [({"HF2Q_TQ_NWG": "9"}, ("per head", 9)), ({"HF2Q_TQ_NSG": "2"}, ("per head", 32)),
         ({"HF2Q_TQ_NWG": "33"}, (4, 64)), ({"TQ_HB_GQA": "off"}, ("per head", 32)), ({"TQ_HB_GQA": "auto"}, (4, 64))],
        ids=str,
    )  # fmt: skip
    def test_overrides_are_of_the_per_head_kernel(self, environment, variables, expected):
        environment(**variables)
        assert plan() == expected

    def test_on_serves_short_caches_too(self, environment):
        environment(TQ_HB_GQA="on")
        assert plan(kv_len=1) == (4, 1)
        assert plan(kv_len=65) == (4, 2)
        assert plan(kv_len=65, group=1) == ("per head", 16)
        assert plan(kv_len=65, nwg=3) == ("per head", 3)
        assert plan(kv_len=65, offers_group=False) == ("per head", 16)

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ({"group": 1, "queries": 2}, (2, 64)),
            ({"group": 1, "queries": 3}, (4, 64)),
            ({"group": 1, "queries": 8}, (8, 64)),
            ({"group": 2, "queries": 4}, (8, 64)),
            ({"group": 2, "queries": 5}, (8, 32)),  # two tiles per KV head
            ({"group": 4, "queries": 9}, (8, 13)),  # five
            ({"group": 4, "queries": 1024}, (8, 1)),
            ({"group": 4, "queries": 4, "window": 61}, ("per head", 4)),  # 64 keys for four queries are too few
            ({"group": 4, "queries": 8, "window": 57}, (8, 1)),  # for eight they are not
            ({"group": 4, "queries": 8, "window": 58}, (8, 2)),
            ({"group": 1, "queries": 8, "kv_len": 63}, ("per head", 8)),
            ({"group": 1, "queries": 8, "kv_len": 64}, (8, 1)),
        ],
        ids=str,
    )
    def test_queries_share_a_decode_as_heads_do(self, shape, expected):
        assert plan(**shape) == expected

    @pytest.mark.parametrize(
        ("queries", "nwg"), [(1, 32), (2, 8), (3, 6), (8, 2), (16, 1), (10_000, 1)], ids=lambda n: str(n)
    )
    def test_many_queries_need_fewer_workgroups(self, queries, nwg):
        assert plan(queries=queries, offers_group=False) == ("per head", nwg)

    @pytest.mark.parametrize("queries", [1, 8, 512])
    def test_a_number_of_workgroups_that_was_asked_for_is_kept(self, environment, queries):
        assert plan(queries=queries, nwg=31) == ("per head", 31)
        environment(HF2Q_TQ_NWG="30")
        assert plan(queries=queries) == ("per head", 30)

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ({"kv_len": 65536, "group": 2, "kv_heads": 8}, (2, 16)),
            ({"kv_len": 1024, "group": 2, "kv_heads": 8}, (2, 8)),
            ({"kv_len": 1024, "group": 8, "kv_heads": 1, "head_dim": 512}, (8, 16)),
            ({"kv_len": 65536, "group": 1, "kv_heads": 8}, (2, 16)),
            ({"kv_len": 65536, "group": 8, "kv_heads": 200}, (8, 1)),
            ({"kv_len": 65536, "group": 8, "kv_heads": 1, "queries": 3}, (8, 44)),
            ({"kv_len": 127, "group": 8, "kv_heads": 1}, ("per head", 16)),
        ],
        ids=str,
    )
    def test_blocks_that_have_a_multiprocessor_to_themselves(self, shape, expected):
        assert plan(multiprocessors=132, **shape) == expected

    @pytest.mark.parametrize("queries", [1, 2, 9, 4096])
    @pytest.mark.parametrize("offers_group", [False, True])
    def test_working_storage_stays_small(self, queries, offers_group):
        _, splits = plan(queries=queries, offers_group=offers_group, kv_len=100_000, group=2, kv_heads=8)
        rows = 16 * queries
        assert rows * splits <= max(rows, 8 * policy.TARGET_THREADGROUPS + rows)

    def test_the_callers_storage_is_shared_by_the_queries(self):
        held = tq_hb.tmp_buffer_bytes(16, 256, num_queries=2, splits=40)
        assert plan(queries=2, tmp_bytes=held) == (8, 40)
        assert plan(queries=2, tmp_bytes=held - 4) == (8, 39)

    @pytest.mark.parametrize("splits", [32, 33, 64, 500])
    def test_the_callers_storage_limits_the_splits(self, splits):
        held = tq_hb.tmp_buffer_bytes(16, 256, splits=splits)
        assert plan(tmp_bytes=held) == (4, min(splits, 64))
        assert plan(tmp_bytes=held + 1000) == (4, min(splits, 64))
        assert plan(tmp_bytes=held - 4) == (4, min(splits - 1, 64))

    @pytest.mark.parametrize("value", ["yes", "ON", "1", "auto "])
    def test_a_bad_value_of_the_variable_is_an_error(self, environment, device, value):
        environment(TQ_HB_GQA=value)
        cache = tq_hb.KVCache(1, 256, device=device)
        cache.append(np.ones((1, 256), np.float32), np.ones((1, 256), np.float32))
        with pytest.raises(tq_hb.InvalidArgument, match=f"^KVCache.attend: TQ_HB_GQA must.*got '{value}'"):
            cache.attend(np.ones((2, 256), np.float32))

    def test_the_plan_of_a_cache_says_what_ran(self, device):
        cache = tq_hb.KVCache(1, 256, device=device)
        cache.append(*np.ones((2, 600, 1, 256), np.float32))
        cache.attend(np.ones((4, 256), np.float32))
        ran = cache.last_plan
        offers_group = device._core.offers(policy.AttendKernel.GROUP, 256, "byte", 8, 8)
        if device.backend == "cuda" and offers_group:
            assert ran.kernels == ("flash_attn_vec_tq_hb_gqa4_dk256", "flash_attn_vec_merge_tq_hb_undo_dk256")
            assert (ran.nsg, ran.nwg) == (8, 5)
        elif offers_group:
            assert ran.kernels == ("flash_attn_vec_tq_hb_gqa4_dk256", "flash_attn_vec_merge_tq_hb_undo_dk256")
            assert (ran.nsg, ran.nwg) == (4, 10)
        else:
            assert ran.kernels == ("flash_attn_vec_tq_hb_dk256", "flash_attn_vec_reduce_tq_hb_undo_dk256")
            assert (ran.nsg, ran.nwg) == (1, 32)
        assert (ran.threadgroup_bytes > 0) == (device.backend != "cpu")
        # Where 16-bit products are no faster, the fast path is strict.
        has_default = device.backend == "cpu" and tq_hb.cpu_isa() != "portable"
        assert (ran.backend, ran.precision) == (device.backend, "default" if has_default else "strict")

    def test_a_strict_cache_is_served_strictly(self, device):
        cache = tq_hb.KVCache(1, 256, precision="strict", device=device)
        cache.append(*np.ones((2, 6, 1, 256), np.float32))
        cache.attend(np.ones((4, 256), np.float32))
        assert cache.last_plan.precision == "strict"
