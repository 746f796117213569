"""``tq-hb bench``: how long attending and appending take on this machine, for one shape."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tq_hb import Device
    from tq_hb.cli._cases import Shape

_SAMPLES = range(30, 2**31)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``bench`` to the command line.

    >>> import argparse
    >>> from tq_hb.cli import bench
    >>> parser = argparse.ArgumentParser()
    >>> bench.add_parser(parser.add_subparsers())
    >>> parser.parse_args(["bench", "--kv-len", "100"]).kv_len
    100
    """
    parser = subparsers.add_parser(
        "bench",
        help="time attend and append for one shape",
        description="Times one token's attention over a cache, against torch's over float caches of the same shape, "
        "and appending to a cache. Both are checked before they are timed, on caches that no processor cache holds.",
    )
    parser.add_argument(
        "--op", choices=("attend", "append", "all"), default="all", help="what to time (default all, which is both)"
    )
    parser.add_argument("--heads", type=int, default=16, metavar="H", help="query heads (default 16)")
    parser.add_argument("--kv-heads", type=int, default=8, metavar="G", help="key and value heads (default 8)")
    parser.add_argument("--head-dim", type=int, default=256, metavar="D", help="values per head (default 256)")
    parser.add_argument("--kv-len", type=int, default=4096, metavar="L", help="tokens in the cache (default 4096)")
    parser.add_argument("--k-bits", type=int, default=8, metavar="B", help="bits per value of K (default 8)")
    parser.add_argument("--v-bits", type=int, default=8, metavar="B", help="bits per value of V (default 8)")
    parser.add_argument("--packing", choices=("byte", "plane"), default="byte", help="of the codes (default byte)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: as many as tq_hb uses anyway")
    parser.add_argument("--samples", type=int, default=50, metavar="N", help="per row, at least 30 (default 50)")
    parser.add_argument("--device", metavar="NAME", help="default: auto")
    parser.add_argument("--no-peers", action="store_true", help="leave torch out")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    >>> import argparse
    >>> from tq_hb.cli import bench
    >>> bench.run(argparse.Namespace(samples=1))
    Traceback (most recent call last):
    tq_hb.InvalidArgument: --samples must be at least 30, got 1
    """
    import tq_hb
    from tq_hb.cli import _machine
    from tq_hb.cli._arguments import COUNTS, THREADS, check_numbers
    from tq_hb.cli._cases import Shape
    from tq_hb.cli._output import print_json

    bits = tq_hb.supported_bits()
    check_numbers(args, samples=_SAMPLES, heads=COUNTS, kv_heads=COUNTS, head_dim=tq_hb.supported_head_dims())
    check_numbers(args, kv_len=COUNTS, k_bits=bits, v_bits=bits, threads=THREADS)
    if args.threads is not None:
        tq_hb.set_num_threads(args.threads)
    shape = Shape(args.heads, args.kv_heads, args.head_dim, args.kv_len, args.k_bits, args.v_bits, args.packing)
    device = tq_hb.Device(args.device or "auto")
    report = {
        "machine": _machine.describe(),
        "device": {"backend": device.backend, "name": device.name, "is_simulated": device.is_simulated},
        "results": _measure(shape, device, args),
    }
    if args.json:
        print_json(report)
    else:
        _print_tables(report)
    return 0


def _measure(shape: Shape, device: Device, args: argparse.Namespace) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import track

    from tq_hb.cli._cases import measure_append, measure_attend

    console = Console(stderr=True)

    def progress(rounds: range) -> Iterable[int]:
        return track(rounds, "measuring", console=console, transient=True, disable=not console.is_terminal)

    results = []
    if args.op != "append":
        peers = not args.no_peers
        results.append(measure_attend(shape, samples=args.samples, device=device, peers=peers, track=progress))
    if args.op != "attend":
        results.append(measure_append(shape, samples=args.samples, device=device, track=progress))
    return results


def _print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console

    from tq_hb.cli._machine import threads_in_words
    from tq_hb.cli._output import SIMULATED, print_table, table

    console = Console(markup=False)
    machine, device = report["machine"], report["device"]
    threads = threads_in_words(machine["threads"])
    console.print(f"{machine['processor']}, {machine['isa']}, {threads}; device: {device['name']}")
    if device["is_simulated"]:
        console.print(f"{device['backend']} is {SIMULATED}; these timings mean nothing", soft_wrap=True)
    for result in report["results"]:
        title = f"{result['op']}: " + ", ".join(f"{field} {value}" for field, value in result["shape"].items())
        moved = "floats in" if result["op"] == "append" else "read"
        rows = table("", "median", "quartiles", moved, "GB/s", "of floor")
        for row in result["rows"]:
            rows.add_row(
                row["name"],
                format_us(row["median_us"]),
                f"{format_us(row['lower_us'])} - {format_us(row['upper_us'])}",
                format_bytes(row["nbytes"]),
                f"{row['gb_s']:.3g}",
                f"{row['share_of_read']:.0%}",
            )
        console.print()
        print_table(console, title, rows)
        console.print(f"floor, a plain read: {result['read_gb_s']:.1f} GB/s; {_describe_check(result)}")


def _describe_check(result: dict[str, Any]) -> str:
    error = result["error"]
    if result["op"] == "append":
        return f"checked: relative squared error {error['k']:.1e} of K, {error['v']:.1e} of V"
    return (
        f"checked: {error['same_codes']:.1e} from float64 attention on the same codes, "
        f"{error['unquantised']:.1e} from unquantised attention"
    )


def format_bytes(nbytes: int) -> str:
    """Return a size with its unit and three digits.

    >>> from tq_hb.cli.bench import format_bytes
    >>> format_bytes(4160), format_bytes(17_039_360)
    ('4.16 kB', '17 MB')
    """
    return f"{nbytes / 1e6:.3g} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.3g} kB"


def format_us(microseconds: float) -> str:
    """Return a duration with its unit and three digits.

    >>> from tq_hb.cli.bench import format_us
    >>> format_us(12.34), format_us(1234.5)
    ('12.3 us', '1.23 ms')
    """
    if microseconds < 1e3:
        return f"{microseconds:.3g} us"
    if microseconds < 1e6:
        return f"{microseconds / 1e3:.3g} ms"
    return f"{microseconds / 1e6:.3g} s"
