"""The table of ``bench.peers_cuda``."""

from __future__ import annotations

from typing import Any

from bench.markdown import Report, source
from tq_hb.cli._markdown import table


def attend(report: Report) -> str:
    """Return attention on an NVIDIA GPU per shape, the best of torch's beside it."""
    rows = [
        (
            f"{result['heads']} / {result['kv_heads']} / {result['head_dim']}",
            f"{result['keys']:,}",
            f"{result['bits']}" + (" in planes" if result["bits"] < 8 else ""),
            f"{1e6 * result['seconds']:.1f} us",
            f"{result['share_of_floor']:.0%}",
            f"{result['error']:.0e}",
            *(f"{seconds / result['seconds']:.2f}" if seconds is not None else "" for seconds in _peers(result)),
        )
        for result in report["results"]
        if "keys" in result
    ]
    peers = ("torch float16 ÷ ours", "FlashInfer float16 ÷ ours", "float8 ÷ ours")
    header = ("heads / KV heads / D", "keys", "bits", "time", "of the floor", "error", *peers)
    # Without the reports that it was given.
    return table(header, rows) + source(report, options=False) + f": {report['results'][0]['gpu']}.\n"


def _peers(result: dict[str, Any]) -> list[float | None]:
    """Seconds of torch, and of FlashInfer over float16 and float8, or None where they were not measured."""
    flashinfer = result["flashinfer"] or {}
    of_flashinfer = (flashinfer.get(name) for name in ("float16", "float8"))
    return [result["sdpa_seconds"], *(row and row["seconds"] for row in of_flashinfer)]
