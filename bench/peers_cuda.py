"""How close attention over the cache comes to the memory limit of an NVIDIA GPU, and to attention over float16.

``python -m bench.peers_cuda`` on a machine with a GPU, torch and cupy writes bench/results/peers_cuda.json, and with
matplotlib the plot beside it. ``--checks`` names reports of test runs on that machine that the file shall mention.

Counters come from Nsight Compute, a shape at a time, and ``--counters`` names what it wrote::

    ncu --set full --csv --page raw -k regex:attend_group -c 1 python -m bench.peers_cuda --once 16 8 256 4096 8 > 1.csv

* A call is the partial kernel and the merge with the un-rotation, as recorded by an encoder and captured in a CUDA
  graph. The graph holds a dozen calls or more on different buffers, together at least 256 MB, so that no call finds its
  data in a cache; its replays are timed by events, and the median is divided by the calls.
* The floor is the bytes of codes and norms over the bandwidth at which a kernel reads a gibibyte, measured in the same
  run. Peers read 2 bytes per value.
* The peers are the fastest of torch's attention kernels, over float16, and the faster of FlashInfer's two, over float16
  and over float8. FlashInfer needs its package, for the headers, and nvcc; without them the file says so.
* Every shape is compared with float64 attention over what the codes stand for.
"""

from __future__ import annotations

import csv
import functools
import re
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np

import tq_hb
from bench import cuda_tables, harness, plots
from bench.flashinfer_peer import HEAD_DIMS, FlashInfer
from tq_hb.options import norms_shape

ROTATION_BYTES = 256 << 20
MIN_CALLS = 12
REPLAYS = 9

# Query heads, KV heads, head size, keys.
SHAPES = [
    (heads, kv_heads, head_dim, keys)
    for heads, kv_heads, head_dim in ((16, 8, 256), (32, 8, 128), (16, 2, 512), (8, 1, 256))
    for keys in (1024, 4096, 16384, 65536, 262144)
]
# Those that are measured with 5 and 6 bits too, which are packed in planes.
PLANES = [(16, 8, 256, 65536), (16, 8, 256, 262144), (32, 8, 128, 262144), (16, 2, 512, 262144)]

READ_KERNEL = r"""
extern "C" __global__ void read_all(const uint4* data, size_t count, unsigned* out) {
  unsigned sum = 0;
  const size_t stride = (size_t)gridDim.x * blockDim.x;
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += 8 * stride) {
    uint4 parts[8];
    #pragma unroll
    for (int j = 0; j < 8; ++j) {
      parts[j] = i + j * stride < count ? __ldcs(data + i + j * stride) : make_uint4(0, 0, 0, 0);
    }
    #pragma unroll
    for (int j = 0; j < 8; ++j) sum ^= parts[j].x ^ parts[j].y ^ parts[j].z ^ parts[j].w;
  }
  if (sum == 0x12345678u) *out = sum;
}
"""


def time_calls(calls: Sequence[Callable[[Any], None]]) -> float:
    """Median seconds of a call; each records itself on the stream that it is given."""
    import torch

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call(stream)
    times = []
    for _ in range(REPLAYS + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(1e-3 * start.elapsed_time(stop) / len(calls))
    return float(statistics.median(times[2:]))


def read_bandwidth() -> float:
    """Bytes per second at which a kernel reads a gibibyte."""
    import cupy

    kernel = cupy.RawKernel(READ_KERNEL, "read_all")
    data = cupy.random.randint(0, 2**31, 1 << 28, dtype=cupy.uint32)
    out = cupy.zeros(1, cupy.uint32)
    blocks = 16 * cupy.cuda.Device().attributes["MultiProcessorCount"]
    times = []
    for _ in range(REPLAYS + 2):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        kernel((blocks,), (512,), (data, np.uint64(data.nbytes // 16), out))
        stop.record()
        stop.synchronize()
        times.append(1e-3 * cupy.cuda.get_elapsed_time(start, stop))
    return float(data.nbytes / statistics.median(times[2:]))


def copy_bandwidth() -> float:
    """Bytes per second read and written by a copy of a gibibyte."""
    import torch

    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return float(2 * source.nbytes / time_calls([lambda _: target.copy_(source)]))


class Cache:
    """K and V of random vectors on the GPU, and the query and output of a call."""

    def __init__(self, device: tq_hb.Device, shape: tuple[int, int, int, int], bits: int, seed: int) -> None:
        import torch

        self.bits = bits
        self.heads, self.kv_heads, self.head_dim, self.keys = shape
        generator = torch.Generator("cuda").manual_seed(seed)
        self.packed = [device.empty((self.kv_heads, self.keys, self.head_dim * bits // 8), np.uint8) for _ in range(2)]
        self.norms = [device.empty(norms_shape((self.kv_heads, self.keys), self.head_dim)) for _ in range(2)]
        run = 16384
        for first in range(0, self.keys, run):
            tokens = min(run, self.keys - first)
            source = device.empty((tokens, self.kv_heads, self.head_dim))
            for packed, lengths in zip(self.packed, self.norms, strict=True):
                torch.from_dlpack(source).normal_(generator=generator)
                hp = tq_hb.HadamardQuantizeKvHbParams(
                    head_dim=self.head_dim,
                    num_kv_heads=self.kv_heads,
                    write_pos=first,
                    cache_capacity=self.keys,
                    codebook_bits=bits,
                )
                encoder = device.encoder()
                encoder.hadamard_quantize_kv_hb(source, packed, lengths, hp, packing="plane")
                encoder.commit_and_wait()
        self.q, self.output = device.empty((self.heads, self.head_dim)), device.empty((self.heads, self.head_dim))
        torch.from_dlpack(self.q).normal_(generator=generator)
        self.tmp = device.empty(tq_hb.tmp_buffer_bytes(self.heads, self.head_dim, splits=256) // 4)
        self.params = tq_hb.FlashAttnVecTqHbParams(
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            kv_seq_len=self.keys,
            kv_capacity=self.keys,
            scale=self.head_dim**-0.5,
            fuse_fwht_pre=1,
            codebook_bits=bits,
        )
        self.encoders: list[tq_hb.CommandEncoder] = []

    @property
    def nbytes(self) -> int:
        """Bytes of codes and norms."""
        return sum(buffer.nbytes for buffer in (*self.packed, *self.norms))

    def attend(self, device: tq_hb.Device, stream: Any) -> None:
        """Launch a call on a stream."""
        encoder = device.encoder(stream=stream)
        sides = (self.packed[0], self.norms[0], self.packed[1], self.norms[1])
        encoder.flash_attn_vec_tq_hb_with_fused_undo(
            self.q, *sides, self.output, self.tmp, self.params, packing="plane"
        )
        encoder.commit()
        self.encoders.append(encoder)  # which holds what a graph of its launches uses

    def error(self) -> float:
        """Relative error of the output in the 2-norm, against float64 over the same codes."""
        import torch

        levels = torch.from_numpy(tq_hb.codebook(self.bits)).cuda().double()
        codes = [
            tq_hb.convert_packing(packed.numpy(), self.bits, head_dim=self.head_dim, source="plane", target="byte")
            for packed in self.packed
        ]
        q = torch.from_numpy(tq_hb.rotate(self.q.numpy())).cuda().double()
        group = self.heads // self.kv_heads
        outputs = []
        for head in range(self.kv_heads):
            k, v = (
                levels[torch.from_numpy(rows[head]).cuda().int()].view(self.keys, -1, min(self.head_dim, 256))
                * torch.from_dlpack(norms)[head].double().view(self.keys, -1, 1)
                * (1.0 if self.head_dim == 512 else self.head_dim**-0.5)
                for rows, norms in zip(codes, self.norms, strict=True)
            )
            scores = q[head * group : (head + 1) * group] @ k.reshape(self.keys, -1).T * self.params.scale
            outputs.append(torch.softmax(scores, -1) @ v.reshape(self.keys, -1))
        want = torch.cat(outputs)
        got = torch.from_numpy(tq_hb.rotate(self.output.numpy())).cuda().double()
        return float((got - want).norm() / want.norm())


def sdpa(shape: tuple[int, int, int, int], sets: int) -> float | None:
    """Seconds of torch's fastest attention over float16, or None where none takes the shape."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, kv_heads, head_dim, keys = shape
    caches = [torch.randn((2, 1, kv_heads, keys, head_dim), dtype=torch.float16, device="cuda") for _ in range(sets)]
    q = torch.randn((1, heads, 1, head_dim), dtype=torch.float16, device="cuda")
    packed = q.view(1, kv_heads, heads // kv_heads, head_dim)
    best: float | None = None
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        for query, enable_gqa in ((q, True), (packed, False)):

            def call(cache: Any, _: Any, query: Any = query, enable_gqa: bool = enable_gqa) -> None:
                torch.nn.functional.scaled_dot_product_attention(query, cache[0], cache[1], enable_gqa=enable_gqa)

            calls = [functools.partial(call, cache) for cache in caches] * -(-MIN_CALLS // sets)
            try:
                # Which of them do not take the shape is no news.
                with warnings.catch_warnings(action="ignore"), sdpa_kernel(backend):
                    calls[0](None)
                    seconds = time_calls(calls)
            except RuntimeError:
                continue
            best = seconds if best is None else min(best, seconds)
    return best


def measure(
    device: tq_hb.Device, shape: tuple[int, int, int, int], bits: int, bandwidth: float, flashinfer: FlashInfer | None
) -> dict[str, Any]:
    """Time a shape at a width, and the peers at 8 bits."""
    caches = [Cache(device, shape, bits, 0)]
    sets = max(1, min(64, -(-ROTATION_BYTES // caches[0].nbytes)))
    caches += [Cache(device, shape, bits, seed) for seed in range(1, sets)]
    calls = [functools.partial(cache.attend, device) for cache in caches] * -(-MIN_CALLS // sets)
    seconds = time_calls(calls)
    kernels = caches[0].encoders[0].kernels
    result = {
        "heads": shape[0],
        "kv_heads": shape[1],
        "head_dim": shape[2],
        "keys": shape[3],
        "bits": bits,
        "bytes": caches[0].nbytes,
        "seconds": seconds,
        "share_of_floor": caches[0].nbytes / bandwidth / seconds,
        "error": caches[0].error(),
        "kernels": kernels,
    }
    del caches, calls
    result["sdpa_seconds"] = sdpa(shape, sets) if bits == 8 else None
    has_peer = flashinfer is not None and bits == 8 and shape[2] in HEAD_DIMS
    result["flashinfer"] = flashinfer.measure(shape, sets, time_calls, MIN_CALLS) if flashinfer and has_peer else None
    return result


def encode(device: tq_hb.Device, tokens: int, bandwidth: float) -> dict[str, Any]:
    """Time the encoding of a run of tokens, K and V together."""
    import torch

    kv_heads, head_dim = 8, 256
    sets = max(1, ROTATION_BYTES // (2 * tokens * kv_heads * head_dim * 5))
    hp = tq_hb.HadamardQuantizeKvHbParams(head_dim=head_dim, num_kv_heads=kv_heads, write_pos=0, cache_capacity=tokens)
    encoders = []

    def call(buffers: list[Any], stream: Any) -> None:
        encoder = device.encoder(stream=stream)
        src_k, src_v, k_packed, v_packed, k_norms, v_norms = buffers
        encoder.hadamard_quantize_kv_hb_dual(src_k, src_v, k_packed, v_packed, k_norms, v_norms, hp)
        encoder.commit()
        encoders.append(encoder)

    calls = []
    for _ in range(min(sets, 64)):
        sources = [device.empty((tokens, kv_heads, head_dim)) for _ in range(2)]
        for source in sources:
            torch.from_dlpack(source).normal_()
        packed = [device.empty((kv_heads, tokens, head_dim), np.uint8) for _ in range(2)]
        norms = [device.empty((kv_heads, tokens)) for _ in range(2)]
        calls.append(functools.partial(call, [*sources, *packed, *norms]))
    seconds = time_calls(calls * -(-MIN_CALLS // len(calls)))
    moved = 2 * tokens * kv_heads * (head_dim * 5 + 4)
    return {"tokens": tokens, "bytes": moved, "seconds": seconds, "share_of_copy": moved / bandwidth / seconds}


def check_of(report: Path) -> dict[str, Any]:
    """Sum up a JUnit file, and the log of the same name beside it, if a tool of compute-sanitizer watched the run."""
    suite = ET.parse(report).getroot()[0]
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    log = report.with_suffix(".log")
    summaries = re.findall(r"[A-Z]+ SUMMARY: .*", log.read_text()) if log.exists() else []
    return {"check": report.stem, "when": suite.attrib["timestamp"], **counts, "summary": summaries}


# Of a kernel: what Nsight Compute calls it, and what the results do.
COUNTERS = {
    "gpu__time_duration.sum": "duration",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed": "shared_memory_pipe_percent",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_slots_percent",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active": "integer_pipe_percent",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor_pipe_percent",
    "smsp__warps_active.avg.per_cycle_active": "warps_of_a_scheduler",
    "smsp__warps_eligible.avg.per_cycle_active": "warps_that_can_issue",
}


def counters_of(report: Path) -> dict[str, Any]:
    """Take the counters out of what Nsight Compute wrote of a run with --once, whose shape is the file's name."""
    lines = report.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    header, units, values = csv.reader(lines[start : start + 3])
    found = {
        name: (value if unit in ("", "%") else f"{value} {unit}")
        for metric, unit, value in zip(header, units, values, strict=True)
        if (name := COUNTERS.get(metric))
    }
    return {"shape": report.stem, "kernel": values[header.index("Kernel Name")], **found}


def describe(result: dict[str, Any]) -> str:
    """Say what was measured in a line."""
    shape = tuple(result[name] for name in ("heads", "kv_heads", "head_dim", "keys"))
    peers = {"SDPA f16": result["sdpa_seconds"]}
    for name, row in (result["flashinfer"] or {}).items():
        peers[f"FlashInfer {name}"] = row["seconds"]
    against = "".join(f", {name} {s / result['seconds']:.2f} x" for name, s in peers.items() if s)
    return (
        f"{shape}, {result['bits']} bits: {1e6 * result['seconds']:.1f} us, "
        f"{100 * result['share_of_floor']:.0f} % of the floor, error {result['error']:.1e}{against}"
    )


def main() -> None:
    parser = harness.measuring_parser("bench.peers_cuda", __doc__)
    parser.add_argument("--checks", type=Path, nargs="*", default=[], help="JUnit files of test runs on this machine")
    parser.add_argument("--counters", type=Path, nargs="*", default=[], help="what Nsight Compute wrote of such runs")
    parser.add_argument(
        "--once", type=int, nargs=5, metavar="N", help="one call: heads, KV heads, head size, keys, bits"
    )
    options = harness.parse(parser)
    device = tq_hb.Device("cuda")
    if options.once:
        *shape, bits = options.once
        cache = Cache(device, tuple(shape), bits, 0)
        cache.attend(device, None)
        cache.encoders[0].wait()
        return
    bandwidth, copying = read_bandwidth(), copy_bandwidth()
    print(f"{device.name}: reads {bandwidth / 1e9:.0f} GB/s, copies {copying / 1e9:.0f} GB/s")
    flashinfer, version = None, ""
    try:
        flashinfer = FlashInfer()
        version = flashinfer.version
    except RuntimeError as error:
        version = f"not measured: {error}"
    print(f"FlashInfer {version}")
    results: list[dict[str, Any]] = [
        {
            "gpu": device.name,
            "read_bandwidth": bandwidth,
            "copy_bandwidth": copying,
            "flashinfer": version,
            "checks": [check_of(report) for report in options.checks],
            "counters": [counters_of(report) for report in options.counters],
        }
    ]
    cases = [*((shape, 8) for shape in SHAPES), *((shape, bits) for shape in PLANES for bits in (5, 6))]
    for shape, bits in harness.track(cases, "{0[0]}, {0[1]} bits".format):
        results.append(measure(device, shape, bits, bandwidth, flashinfer))
        print(describe(results[-1]), flush=True)
    for tokens in (1, 4096, 32768):
        result = encode(device, tokens, copying)
        results.append(result)
        print(f"encode {tokens}: {1e6 * result['seconds']:.1f} us, {100 * result['share_of_copy']:.0f} % of a copy")
    harness.finish("peers_cuda", results, options.out, cuda_tables.attend, plot=plots.peers_cuda)


if __name__ == "__main__":
    harness.run("bench.peers_cuda", main)
