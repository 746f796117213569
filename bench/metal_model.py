"""Bound how fast the attention kernels can be on Apple's GPUs.

A model, not a measurement: nothing here has run on an Apple GPU. What the kernels read, write and exchange is counted
on the simulated device at lengths that it can run, and compared with formulas; the formulas then give every length,
and published rates of each chip turn them into lower bounds. Writes ``bench/results/metal_model.json`` and ``.png``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import tq_hb
from bench import apple_gpus, harness, metal_counts, metal_tables, plots
from bench.apple_gpus import GPUS, Gpu
from tq_hb import _core, policy
from tq_hb.policy import AttendKernel

BLOCK = 32  # keys
STRIPE = 128  # coordinates that the lanes of a SIMD group share; a shorter row takes some of the lanes
SCORES_STRIDE = BLOCK + 1  # words between the scores of one head and the next
MAX_TILE = 8
ROW_WORDS = 4  # that the group kernel keeps for each row of its tile
JOIN = 9  # full-rate instructions that put a lane's codes together from its bytes of two planes
SIMD_BYTES = 4 * apple_gpus.SIMD_WIDTH  # a word per lane

KEYS = (1024, 4096, 8192, 32768, 104966)
# Whole blocks; a last block of 8 keys; a last block of 31, which neither 4 nor 8 divides.
COUNTED_KEYS = (1056, 1000, 543)
THREADGROUP_BITS = ((8, 8), (6, 6), (5, 5), (8, 6))


@dataclass(frozen=True)
class Shape:
    """The heads of one call, how its cache is stored, and the lengths to look at."""

    heads: int
    kv_heads: int
    head_dim: int
    keys: tuple[int, ...] = KEYS
    k_bits: int = 8
    v_bits: int = 8
    packing: str = "byte"

    @property
    def name(self) -> str:
        """How tables name it."""
        heads = f"{self.heads} / {self.kv_heads} / {self.head_dim}"
        return heads if self.packing == "byte" else f"{heads}, {self.k_bits}/{self.v_bits} bits in planes"

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def stripes(self) -> int:
        """Parts of a row that one SIMD group owns."""
        return max(1, self.head_dim // STRIPE)

    @property
    def lanes(self) -> int:
        """Lanes that share a stripe; the others of the SIMD group have another row."""
        return min(32, self.head_dim // 4)

    @property
    def norms(self) -> int:
        """Norms of one row."""
        return _core.norms_per_row(self.head_dim)

    @property
    def planes(self) -> int:
        """How many of K and V are cut into planes."""
        return sum(self.packing == "plane" and bits < 8 for bits in (self.k_bits, self.v_bits))

    @property
    def code_bytes(self) -> int:
        """Bytes of a row of K and one of V."""
        return sum(_core.row_bytes(self.packing, bits, self.head_dim) for bits in (self.k_bits, self.v_bits))

    def cache_bytes(self, keys: int) -> int:
        """Codes and norms of K and V: what has to come from memory whatever the kernel does."""
        return self.kv_heads * keys * (self.code_bytes + 2 * 4 * self.norms)


SHAPES = (
    Shape(16, 8, 256),
    Shape(32, 8, 256),
    Shape(8, 1, 256),
    Shape(24, 4, 256, (1024, 4096, 8192, 32768, 65536, 104966)),
    Shape(32, 8, 128),
    Shape(16, 2, 512),
    Shape(16, 8, 256, k_bits=5, v_bits=5, packing="plane"),
    Shape(24, 4, 256, k_bits=5, v_bits=5, packing="plane"),
)
# What else is counted: rows that take half the lanes, and every other width of a high plane.
COUNTED_SHAPES = (
    *SHAPES,
    Shape(16, 4, 64),
    Shape(16, 4, 64, k_bits=5, v_bits=6, packing="plane"),
    Shape(16, 4, 128, k_bits=6, v_bits=5, packing="plane"),
    Shape(16, 2, 512, k_bits=8, v_bits=6, packing="plane"),
)
# For what sharing the decode of a key buys: one KV head and 1 to 16 query heads.
GROUPS = tuple(Shape(group, 1, head_dim) for head_dim in (256, 512) for group in (2, 4, 6, 8, 16))

# The reference system's own figures on an M5 Max, in microseconds per call: mlx-native 0.9.0 (16 / 8, four SIMD
# groups where there are several figures) and 0.10.9 and 0.10.10 (24 / 4), from its documents.
REFERENCE_US: Mapping[str, Mapping[int, Mapping[str, float]]] = {
    "16 / 8 / 256": {1024: {"0.9.0": 43.66}, 4096: {"0.9.0": 113.32}, 8192: {"0.9.0": 231.10}},
    "24 / 4 / 256": {
        8192: {"per head": 309.5, "0.10.9, two heads": 209.9},
        32768: {"per head": 579.1, "0.10.9, two heads": 413.9},
        65536: {"per head": 1532.0, "0.10.9, two heads": 1021.8},
        104966: {"per head": 1853.2, "0.10.9, two heads": 1291.9, "0.10.10, two heads": 1140.0},
    },
}


@dataclass(frozen=True)
class Plan:
    """How the policy runs a call. `nsg` is 0 for the group kernel, which has none."""

    kernel: str
    tile: int
    splits: int
    nsg: int


def plan(shape: Shape, keys: int, *, per_head: bool) -> Plan:
    """Return the policy's choice, or its choice of splits for the per-head kernel."""
    params = metal_counts.params(shape.heads, shape.kv_heads, shape.head_dim, keys, k_bits=shape.k_bits)
    nwg = policy.compute_nwg(keys) if per_head else None
    chosen = policy.plan_attention("metal_model", params, offers_group=True, nwg=nwg)
    if chosen.kernel == AttendKernel.GROUP:
        name = f"flash_attn_vec_tq_hb_gqa{chosen.head_tile}_dk{shape.head_dim}"
        return Plan(name, chosen.head_tile, chosen.nwg, 0)
    return Plan(f"flash_attn_vec_tq_hb_dk{shape.head_dim}", 1, chosen.nwg, policy.compute_nsg(keys))


@dataclass(frozen=True)
class Work:
    """What one block of 32 keys costs one tile of query heads: instructions of a SIMD group, and bytes."""

    multiply_adds: float
    other_full_rate: float  # adds, selects, comparisons
    special: float  # bytes taken out of words, exponentials
    shuffles: float
    reductions: float
    threadgroup_bytes: float
    load_bytes: float

    def clocks(self) -> dict[str, float]:
        """Clocks of one core per resource, each as if nothing else ran and none ever waited."""
        per_clock = apple_gpus.LANES_PER_CORE / apple_gpus.SIMD_WIDTH
        exchange = self.shuffles * apple_gpus.SHUFFLE_CLOCKS + self.reductions * apple_gpus.REDUCTION_CLOCKS
        return {
            "arithmetic": (self.multiply_adds + self.other_full_rate) / per_clock,
            "special": self.special * apple_gpus.SPECIAL_CLOCKS / per_clock,
            "exchange": exchange / per_clock,
            "threadgroup": self.threadgroup_bytes / apple_gpus.THREADGROUP_BYTES_PER_CLOCK,
            "load": self.load_bytes / apple_gpus.LOAD_BYTES_PER_CLOCK,
        }


def softmax_instructions(norms: int) -> int:
    """Full-rate instructions of one head's softmax over a block, per SIMD group, the reduction and exponentials apart.

    3 per norm for the product; scale, ldexp (2), bias, clamp (2), softcap, two selects and two maxima; difference and
    scaling before each exponential (4); the sum, and the weight times the value's factor.
    """
    return 3 * norms + 17


def scatter_shuffles(sums: int, lanes: int) -> int:
    """Shuffles, and additions, of simd_sum_scatter."""
    return sums - 1 + int(math.log2(lanes / sums))


def group_sums(tile: int) -> int:
    """Return how many sums the group kernel has in flight while it scores."""
    return min(16, 4 * tile)


def group_work(shape: Shape, tile: int) -> Work:
    """Return a block's cost in flash_attn_vec_tq_hb_gqa*, both halves of the threadgroup together."""
    keys = shape.lanes  # that each row's lanes see of the block
    sums = group_sums(tile)
    scatters = keys * tile // sums
    shuffles = scatter_shuffles(sums, shape.lanes)
    steps = keys // 4  # 4 shuffles and 12 selects for 4 keys, of K and of V; 2 shuffles more for a high plane
    score_words = shape.stripes * BLOCK * tile
    # The accumulator's rescaling; two comparisons, their conjunction and a select for what a row sees.
    softmax = softmax_instructions(shape.norms) + 4 + 4
    per_stripe_other = steps * 2 * 12 + keys // 2 * JOIN * shape.planes  # of two keys at once
    per_stripe_other += scatters * (shuffles + 2 * (sums - 1)) + tile * softmax
    return Work(
        multiply_adds=shape.stripes * 2 * 4 * tile * keys,
        other_full_rate=shape.stripes * per_stripe_other,
        special=shape.stripes * (2 * keys * 3 + tile * 2),
        shuffles=shape.stripes * (steps * (8 + 2 * shape.planes) + scatters * shuffles + keys * tile),
        reductions=shape.stripes * tile,
        threadgroup_bytes=shape.stripes * 2 * keys * 4 * SIMD_BYTES + 4 * score_words * (1 + shape.stripes),
        load_bytes=BLOCK * (shape.code_bytes + 2 * 4 * shape.norms),
    )


def per_head_work(shape: Shape) -> Work:
    """Return a block's cost in flash_attn_vec_tq_hb_dk*, for its one head."""
    keys = shape.lanes  # that each row's lanes see of the block
    steps = keys // 8
    shuffles = scatter_shuffles(8, shape.lanes)
    softmax = softmax_instructions(shape.norms) + 4 * shape.stripes
    dot_additions = keys * shape.stripes  # stripes to a norm's sum, norms to the key's
    joins = keys * shape.stripes * JOIN * shape.planes
    second_norm = keys * 2 if shape.norms == 2 else 0
    return Work(
        multiply_adds=2 * 4 * shape.stripes * keys,
        other_full_rate=dot_additions + joins + steps * (shuffles + 14) + softmax,
        special=shape.stripes * 2 * keys * 3 + 2,
        shuffles=steps * shuffles + second_norm + keys * shape.norms,
        reductions=1,
        threadgroup_bytes=shape.stripes * 2 * keys * 4 * SIMD_BYTES,
        # Two pairs of bytes per lane, also where lanes share those of a high plane.
        load_bytes=2 * BLOCK * (shape.head_dim + 4 * shape.norms),
    )


def work(shape: Shape, chosen: Plan) -> Work:
    """Return a block's cost in the kernel that was chosen."""
    return per_head_work(shape) if chosen.nsg else group_work(shape, chosen.tile)


def expected_counts(shape: Shape, keys: int, chosen: Plan) -> dict[str, int]:
    """Return what the simulated device should count for the attention kernel of one call."""
    blocks = -(-keys // BLOCK)
    heads, stripes, norms = shape.heads, shape.stripes, shape.norms
    state_bytes = 4 * chosen.splits * heads * (shape.head_dim + 2)
    row_bytes = 4 * heads * shape.head_dim
    load_query = 2  # reductions: is it finite, and its largest value
    # Keys of each block that the first row's lanes see; other rows' lanes go along.
    counts = [min(shape.lanes, keys - first) for first in range(0, keys, BLOCK)]
    over_rows = int(math.log2(32 / shape.lanes))  # shuffles that add up a sum of several rows' lanes
    if chosen.nsg:
        simd = sum(-(-n // 8) * scatter_shuffles(8, shape.lanes) + n * norms for n in counts) + blocks
        simd += 2 * keys if norms == 2 else 0
        simdgroups = chosen.splits * chosen.nsg * (1 + stripes * over_rows)
        return {
            "code_bytes": 2 * heads * keys * shape.head_dim,
            "norm_bytes": 2 * heads * keys * 4 * norms,
            "query_bytes": chosen.splits * row_bytes,
            "written_bytes": state_bytes,
            "simd_operations": heads * (simd + chosen.splits * load_query + simdgroups),
            "threadgroup_barriers": heads * chosen.splits * (2 if chosen.nsg > 1 else 1),
            "threadgroup_bytes": 4 * (table_words(shape, copies=False) + (1 + chosen.nsg) * (shape.head_dim + 4)),
        }
    tiles = shape.kv_heads * -(-shape.group // chosen.tile)
    sums = group_sums(chosen.tile)
    per_step = 8 + 2 * shape.planes + 4 * chosen.tile // sums * scatter_shuffles(sums, shape.lanes) + 4 * chosen.tile
    simd = stripes * (sum(-(-n // 4) for n in counts) * per_step + blocks * chosen.tile)
    per_split = -(-blocks // chosen.splits)
    passes = sum(max(0, min(per_split, blocks - s * per_split)) + 1 for s in range(chosen.splits))
    return {
        "code_bytes": tiles * keys * shape.code_bytes,
        "norm_bytes": 2 * tiles * keys * 4 * norms,
        "query_bytes": chosen.splits * row_bytes,
        "written_bytes": state_bytes,
        "simd_operations": tiles * simd + chosen.splits * heads * (load_query + stripes * (1 + over_rows)),
        "threadgroup_barriers": tiles * (passes + 3 * chosen.splits),
        "threadgroup_bytes": threadgroup_bytes(shape, chosen.tile),
    }


def busiest_core_blocks(shape: Shape, keys: int, chosen: Plan, cores: int) -> float:
    """Return a lower bound on the blocks of the core that has the most: threadgroups do not move between cores."""
    blocks = -(-keys // BLOCK)
    if chosen.nsg:
        rows = shape.heads
        full, per_threadgroup = chosen.splits, blocks // (chosen.splits * chosen.nsg) * chosen.nsg
    else:
        rows = shape.kv_heads * -(-shape.group // chosen.tile)
        per_threadgroup = -(-blocks // chosen.splits)
        full = blocks // per_threadgroup
    return max(rows * blocks / cores, -(-rows * full // cores) * per_threadgroup)


def bounds_us(shape: Shape, keys: int, chosen: Plan, gpu: Gpu) -> dict[str, float]:
    """Return a lower bound in microseconds per resource; the largest bounds the call."""
    blocks = busiest_core_blocks(shape, keys, chosen, gpu.cores)
    times = {name: blocks * clocks / gpu.clock_ghz / 1e3 for name, clocks in work(shape, chosen).clocks().items()}
    compulsory = shape.cache_bytes(keys) + 2 * 4 * shape.heads * shape.head_dim
    return {"memory": compulsory / gpu.bandwidth_gb_s / 1e3, **times}


def table_words(shape: Shape, *, copies: bool) -> int:
    """Words of the tables of levels, one for both K and V where their widths agree."""
    return sum((min(32, 2048 >> bits) if copies else 1) << bits for bits in {shape.k_bits, shape.v_bits})


def threadgroup_bytes(shape: Shape, tile: int) -> int:
    """Threadgroup memory of the group kernel, as csrc/metal/kernels/attend_layout.h has it."""
    scores = shape.stripes * tile * SCORES_STRIDE
    norms = 2 * shape.norms * BLOCK
    working = table_words(shape, copies=True) + 2 * (scores + norms)
    return 4 * (MAX_TILE * ROW_WORDS + max(tile * shape.head_dim, working))


def count(device: tq_hb.Device, shape: Shape, keys: int, *, per_head: bool) -> dict[str, Any]:
    """Run one call on the simulated device, and require that it counts what the formulas say."""
    chosen = plan(shape, keys, per_head=per_head)
    params = metal_counts.params(shape.heads, shape.kv_heads, shape.head_dim, keys, k_bits=shape.k_bits)
    nwg = chosen.splits if per_head else None
    counted = metal_counts.run(
        device, params, kernel=chosen.kernel, nwg=nwg, v_bits=shape.v_bits, packing=shape.packing
    )
    expected = expected_counts(shape, keys, chosen)
    wrong = {name: (counted[name], want) for name, want in expected.items() if counted[name] != want}
    if wrong:
        raise RuntimeError(f"{shape.name}, {keys} keys, {chosen}: (counted, expected) differ: {wrong}")
    return {"kind": "counts", "shape": shape.name, "keys": keys, "plan": asdict(chosen), **counted}


def cost(shape: Shape, chosen: Plan) -> dict[str, Any]:
    """Return what 32 keys of one KV head cost all its query heads, in clocks of one core."""
    repeats = shape.group if chosen.nsg else -(-shape.group // chosen.tile)
    clocks = {name: repeats * value for name, value in work(shape, chosen).clocks().items()}
    return {"kind": "cost", "shape": shape.name, "group": shape.group, "plan": asdict(chosen), "clocks": clocks}


def bound(shape: Shape, keys: int, *, per_head: bool) -> dict[str, Any]:
    """Return every chip's bound for one call, and what sets it."""
    chosen = plan(shape, keys, per_head=per_head)
    times = {gpu.name: bounds_us(shape, keys, chosen, gpu) for gpu in GPUS}
    return {
        "kind": "bound",
        "shape": shape.name,
        "keys": keys,
        "per_head": per_head,
        "plan": asdict(chosen),
        "us": {name: round(max(by.values()), 2) for name, by in times.items()},
        "set_by": {name: max(by, key=by.__getitem__) for name, by in times.items()},
        "reference_us": REFERENCE_US.get(shape.name, {}).get(keys, {}),
    }


def main() -> None:
    """Count, compare, and write the bounds."""
    args = harness.parse(harness.measuring_parser("bench.metal_model", __doc__))
    device = metal_counts.simulated_device()
    if device is None:
        raise tq_hb.UnsupportedError("the metal device must be the simulated one (build with -DTQ_HB_METAL=simulator)")
    counts = []
    cases = list(itertools.product(COUNTED_SHAPES, COUNTED_KEYS, (False, True)))
    for shape, keys, per_head in harness.track(cases, lambda case: f"{case[0].name}, {case[1]:,} keys"):
        counts.append(count(device, shape, keys, per_head=per_head))
    sizes = [
        {"kind": "threadgroup", "head_dim": head_dim, "tile": tile, "k_bits": k_bits, "v_bits": v_bits}
        | {"bytes": threadgroup_bytes(Shape(1, 1, head_dim, k_bits=k_bits, v_bits=v_bits), tile)}
        for head_dim, tile, (k_bits, v_bits) in itertools.product((64, 128, 256, 512), (2, 4, 8), THREADGROUP_BITS)
    ]
    costs = [cost(shape, plan(shape, 4096, per_head=per_head)) for shape in GROUPS for per_head in (False, True)]
    bounds = [
        bound(shape, keys, per_head=per_head) for shape in SHAPES for per_head in (False, True) for keys in shape.keys
    ]
    gpus = [{"kind": "gpu", **asdict(gpu), "fp32_tflops": round(gpu.fp32_tflops, 2)} for gpu in GPUS]
    harness.finish(
        "metal_model", [*gpus, *sizes, *counts, *costs, *bounds], args.out, metal_tables.bounds, plot=plots.metal_model
    )


if __name__ == "__main__":
    harness.run("bench.metal_model", main)
