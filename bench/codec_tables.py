"""The tables of ``bench.codec`` and ``bench.rate_distortion``."""

from __future__ import annotations

import math
from typing import Any

from bench.markdown import Report, source
from tq_hb.cli._markdown import table

_DATA = {
    "normal": "normal",
    "student_t": "Student's t",
    "outliers": "outlier channels",
    "outliers_rotated": "these rotated first",
}


def memory(report: Report) -> str:
    """Return what the default codebook takes and loses at each width, for D = 256."""
    header = ("bits", "bytes per token and KV head", "in planes", "squared error", "attention error")
    rows = [
        (
            str(result["bits"]),
            *_bytes(result),
            f"{result['squared_error']:.1e}",
            f"{result['attention_error']:.1e}",
        )
        for result in report["results"]
        if result["codebook"] == "lloyd_max" and result["head_dim"] == 256
    ]
    return table(header, rows) + source(report) + ".\n"


def codec(report: Report) -> str:
    """Return what every codebook and head size takes and loses."""
    header = (
        *("codebook", "D", "bits", "bytes", "in planes"),
        *("squared error", "in theory", "attention error", "of the kernel"),
    )
    rows = [
        (
            f"`{result['codebook']}`",
            str(result["head_dim"]),
            str(result["bits"]),
            *_bytes(result),
            f"{result['squared_error']:.3e}",
            f"{result['squared_error_in_theory']:.3e}",
            f"{result['attention_error']:.1e}",
            f"{result['attention_error_on_the_same_codes']:.1e}",
        )
        for result in report["results"]
    ]
    return table(header, rows) + source(report) + ".\n"


def _bytes(result: dict[str, Any]) -> tuple[str, str]:
    """Return what a token takes with byte packing and with plane packing."""
    nbytes = result["bytes_per_token_and_kv_head"]
    return str(nbytes["byte"]), str(nbytes["plane"])


def rate_distortion(report: Report) -> str:
    """Return every format's size and loss, a table per head size."""
    header = ("format", "bits per value", "above the bound", *_DATA.values())
    tables = []
    for head_dim in dict.fromkeys(result["head_dim"] for result in report["results"]):
        rows = [
            (
                result["format"],
                f"{result['bits_per_value']:.3f}",
                f"{result['bits_per_value'] + math.log2(result['nmse']['normal']) / 2:.2f}",
                *(f"{result['nmse'][data]:.2e}" if data in result["nmse"] else "" for data in _DATA),
            )
            for result in report["results"]
            if result["head_dim"] == head_dim
        ]
        tables.append(f"D = {head_dim}:\n\n{table(header, rows)}")
    return "\n".join(tables) + source(report) + ".\n"
