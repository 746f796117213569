"""The tables of ``tq-hb generate``."""

from __future__ import annotations

import textwrap

from bench import harness
from bench.markdown import Report, machine, source
from tq_hb.cli._markdown import table


def replay(report: Report) -> str:
    """Return what every width does to a real model's predictions."""
    header = ("K/V bits", "bytes per token", "decode ms per token", "mean KL", "top-1 agreement", "perplexity")
    rows = [
        (
            row["setting"],
            f"{row['bytes_per_token']:,}",
            f"{row['decode_ms']:.1f}",
            f"{row['mean_kl']:.1e}" if row["mean_kl"] else "0",
            f"{row['top1_agreement']:.1%}",
            f"{row['perplexity']:.2f}",
        )
        for row in report["replay"]["settings"]
    ]
    # A report that names no command was written by this one.
    named = {"command": "tq-hb generate --out bench/results", **report}
    return table(header, rows) + source(named) + machine(report)


def demo(report: Report) -> str:
    """Return what a real model wrote, behind the last sentence of its prompt, and what that took."""
    made = report["generated"]
    prompt = (harness.ROOT / "python" / "tq_hb" / "cli" / "data" / "prompt.txt").read_text(encoding="utf-8").rstrip()
    text = f"[...] {prompt.rsplit('. ', 1)[-1]}\n{made['text']}"
    quoted = "\n".join(textwrap.fill(line, 120) for line in text.split("\n"))
    # The last token is never fed back, so the cache does not see it.
    seen = made["prompt_tokens"] + made["new_tokens"] - 1
    kernels = ", ".join(f"`{kernel}`" for kernel in made["kernels"])
    return (
        f"```\n{quoted}\n```\n\n{report['model']}: {made['new_tokens']} tokens in {made['seconds']:.1f} s, the prompt "
        f"of {made['prompt_tokens']} tokens included, at {made['k_bits']}/{made['v_bits']} bits. The cache has seen "
        f"{seen} tokens and takes {made['cache_nbytes'] / 2**20:.1f} MiB. Attended on the codes by {kernels} "
        "(`bench/results/generate.json`).\n"
    )
