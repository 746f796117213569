"""``tq-hb calibrate``: a model's mean keys, measured on texts, into a file for `TqCache` and ``tq-hb gate``."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from tq_hb.integrations.calibration import Calibration

TOKENS = 8192


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``calibrate`` to the command line.

    >>> import argparse
    >>> from tq_hb.cli import calibrate
    >>> parser = argparse.ArgumentParser()
    >>> calibrate.add_parser(parser.add_subparsers())
    >>> parser.parse_args(["calibrate", "tiny", "--out", "means.safetensors"]).tokens
    8192
    """
    parser = subparsers.add_parser(
        "calibrate",
        help="measure a model's mean keys, for more exact caches at the same size",
        description="Measures the mean key of every layer and KV head on a text, its pieces spread over the positions "
        "of a whole context, and writes those that bring other pieces' keys closer to zero. TqCache(config, "
        "k_mean=Calibration.load(FILE)) and tq-hb gate --k-mean FILE use them.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="gemma-3-270m, smollm2-135m, tiny, a folder with a transformers model, or a .gguf",
    )
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        metavar="FILE",
        help="what to measure on (default: documentation and code)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write, a .safetensors")
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help=f"at most (default {TOKENS})")
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="positions that the means shall hold for (default: the model's longest)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: all that this process may use")
    parser.add_argument("--json", action="store_true", help="print JSON; everything else goes to standard error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, show, and write the file.

    >>> from tq_hb.cli import main
    >>> main(["calibrate", "no such model", "--out", "no such folder/means"])  # the reason goes to standard error
    2
    """
    from rich.console import Console

    from tq_hb.cli._arguments import COUNTS, THREADS, check_file, check_numbers
    from tq_hb.cli._models import extras_of, load, require_packages
    from tq_hb.cli._output import print_json, whole
    from tq_hb.cli._torch import set_up

    check_numbers(args, tokens=COUNTS, context=COUNTS, threads=THREADS)
    check_file("--out", args.out)
    require_packages(("torch", "transformers", "safetensors"), extras_of(args.model))
    set_up(args.threads)
    console = Console(stderr=args.json, highlight=False)
    with console.status("loading") as status:
        loaded = load(args.model, lambda step: status.update(f"loading {args.model}: {step}"))
        tokens = _tokens(loaded.tokenizer, args)
    calibration, residuals = _calibrate(loaded.model, loaded.name, tokens, args.context, console)
    with whole(args.out) as file:
        calibration.save(file)
    report = {
        "model": loaded.name,
        "tokens": calibration.tokens,
        "context": calibration.context,
        "text_sha256": calibration.text_sha256,
        "layers": [
            {"layer": i, "residual": residual, "is_centred": mean is not None}
            for i, (residual, mean) in enumerate(zip(residuals, calibration.k_means, strict=True))
        ],
        "file": str(args.out),
    }
    _show(report, console)
    if args.json:
        print_json(report)
    return 0


def _tokens(tokenizer: Any, args: argparse.Namespace) -> torch.Tensor:
    """Return the first tokens of the texts, as many of each, shape (1, tokens)."""
    import torch

    from tq_hb.cli._gate_texts import beginning, own_content, read_text

    contents = (
        [read_text(file) for file in args.text] if args.text else [own_content(n) for n in ("documentation", "code")]
    )
    share = args.tokens // len(contents)
    return torch.cat([beginning(tokenizer, content, share) for content in contents], dim=1)


def _calibrate(
    model: Any, name: str, tokens: torch.Tensor, context: int | None, console: Console
) -> tuple[Calibration, tuple[float | None, ...]]:
    from rich.progress import Progress, TimeElapsedColumn

    from tq_hb.integrations.transformers import calibrate

    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=tokens.shape[1])
        return calibrate(
            model,
            tokens,
            context=context,
            name=name,
            text_sha256=digest,
            on_tokens=lambda n: progress.advance(task, n),
        )


def _show(report: dict[str, Any], console: Console) -> None:
    from tq_hb.cli._output import print_table, table

    rows = table("layer", "keys' energy left", "centred")
    for layer in report["layers"]:
        residual = layer["residual"]
        rows.add_row(
            str(layer["layer"]),
            "no keys of its own" if residual is None else f"{residual:.0%}",
            "yes" if layer["is_centred"] else "no",
        )
    print_table(console, f"{report['model']}: {report['tokens']:,} tokens over {report['context']:,} positions", rows)
    console.print(
        "Energy left: the sum of the keys' squares around a mean that other pieces of the text gave, over that around "
        "zero. A layer for which it is not less gets no mean.",
        style="dim",
    )
    console.print(f"Written: {report['file']}", soft_wrap=True)
