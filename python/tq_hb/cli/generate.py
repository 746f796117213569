"""``tq-hb generate``: a real model writes on a quantised KV cache; then what each width costs and changes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tq_hb

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from tq_hb.cli._models import LoadedModel
    from tq_hb.cli._replay import Result

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Workload:
    """How much is done. Characters are those taken of the texts that come with the package; None takes all.

    >>> from tq_hb.cli import generate
    >>> generate.QUICK.new_tokens, generate.FULL.new_tokens
    (32, 96)
    """

    prompt_characters: int | None
    text_characters: int | None
    fewest_text_tokens: int
    prefill_tokens: int
    new_tokens: int


# In both, the prompt and the prefill are longer than the window, so that the sliding layers' rings have wrapped. The
# tiny model reads bytes.
FULL = Workload(None, None, fewest_text_tokens=1024, prefill_tokens=640, new_tokens=96)
QUICK = Workload(200, 224, fewest_text_tokens=128, prefill_tokens=96, new_tokens=32)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``generate`` to the command line.

    >>> import argparse
    >>> from tq_hb.cli import generate
    >>> parser = argparse.ArgumentParser()
    >>> generate.add_parser(parser.add_subparsers())
    >>> parser.parse_args(["generate", "--quick"]).quick
    True
    """
    parser = subparsers.add_parser(
        "generate",
        help="generate text with Gemma 3 270M on a quantised KV cache, and measure every width",
        description="Generates text with Gemma 3 270M, every layer's KV cache held by tq_hb. Then replays a fixed text "
        "with the full-precision cache and with every width, and shows memory, speed and how the predictions change.",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny random model instead: no weights, seconds")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="what to continue (default: a text of ours)")
    parser.add_argument("--text-file", type=Path, metavar="FILE", help="what to replay (default: a text of ours)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help=f"default {FULL.new_tokens}")
    parser.add_argument("--k-bits", type=int, default=8, metavar="B", help="bits of K while generating (default 8)")
    parser.add_argument("--v-bits", type=int, default=8, metavar="B", help="bits of V while generating (default 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), metavar="DIR", help="default: build/demo")
    parser.add_argument("--json", action="store_true", help="print JSON; everything else goes to standard error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate, measure, show, and write the files.

    >>> from tq_hb.cli import main
    >>> main(["generate", "--quick", "--json", "--text-file", "no such file"])  # the reason goes to standard error
    2
    """
    from rich.console import Console

    from tq_hb.cli._arguments import COUNTS, SEEDS, check_folder, check_numbers
    from tq_hb.cli._generate_plot import plot_replay
    from tq_hb.cli._machine import describe
    from tq_hb.cli._models import extras_of, require_packages
    from tq_hb.cli._output import commit, print_json, write_whole
    from tq_hb.cli._torch import set_up

    bits = tq_hb.supported_bits()
    check_numbers(args, max_new_tokens=COUNTS, k_bits=bits, v_bits=bits, seed=SEEDS)
    check_folder("--out", args.out)
    _check_out(args)
    packages = ("torch", "transformers", "matplotlib")
    require_packages(packages, extras_of("tiny" if args.quick else "gemma-3-270m", plots=True))
    set_up(None)
    console = Console(stderr=args.json, highlight=False)
    workload = QUICK if args.quick else FULL
    prompt = _read(args.prompt_file, "prompt.txt", workload.prompt_characters)
    if not prompt:
        raise tq_hb.InvalidArgument(f"--prompt-file must not be empty, got {args.prompt_file}")
    text = _read(args.text_file, "replay.txt", workload.text_characters)
    loaded = _load(args.quick, console)
    text_tokens = _text_tokens(loaded, text, workload)

    generated = _generate(loaded, prompt, workload, args, console)
    results = _replay(loaded, text_tokens, workload, console)
    report = {
        "command": args.command_line,
        "load_average": os.getloadavg(),
        "machine": {**describe(), "omp_wait_policy": os.environ["OMP_WAIT_POLICY"], "commit": commit(Path.cwd())},
        "model": loaded.name,
        "window": loaded.model.config.sliding_window,
        "generated": generated,
        "replay": {
            "text_tokens": text_tokens.shape[1],
            "prefill_tokens": workload.prefill_tokens,
            "scored_tokens": text_tokens.shape[1] - 1 - workload.prefill_tokens,
            "settings": [{**dataclasses.asdict(result), "setting": str(result.setting)} for result in results],
        },
    }
    _print_results(report, console)
    files = {"generate.json": (json.dumps(report, indent=2) + "\n").encode(), "generate.png": plot_replay(report)}
    for name, content in files.items():
        write_whole(args.out / name, content)
    console.print(f"Written: {', '.join(str(args.out / name) for name in files)}", soft_wrap=True)
    if args.json:
        print_json(report)
    return 0


def _check_out(args: argparse.Namespace) -> None:
    """Keep the results that the documents show from being replaced by those of another workload."""
    from tq_hb.cli._output import has_results_of_documents

    changes = ("quick", "prompt_file", "text_file", "max_new_tokens")
    given = [f"--{name.replace('_', '-')}" for name in changes if getattr(args, name)]
    if given and has_results_of_documents(args.out):
        raise tq_hb.InvalidArgument(
            f"--out must be another folder than the results that the documents show, with {given[0]}, got {args.out}"
        )


def _load(quick: bool, console: Console) -> LoadedModel:
    from tq_hb.cli._models import load_gemma, make_tiny

    with console.status("loading") as status:
        return make_tiny() if quick else load_gemma(lambda step: status.update(f"loading Gemma 3 270M: {step}"))


def _read(path: Path | None, name: str, characters: int | None) -> str:
    """Return the file's text, or without one the beginning of the text of that name in the package."""
    from tq_hb.cli._gate_texts import read_text

    if path is not None:
        return read_text(path)
    return (resources.files("tq_hb.cli") / "data" / name).read_text(encoding="utf-8").rstrip()[:characters]


def _text_tokens(loaded: LoadedModel, text: str, workload: Workload) -> torch.Tensor:
    tokens: torch.Tensor = loaded.tokenizer(text, return_tensors="pt").input_ids
    if tokens.shape[1] < workload.fewest_text_tokens:
        raise tq_hb.InvalidArgument(
            f"--text-file must have at least {workload.fewest_text_tokens} tokens, got {tokens.shape[1]}"
        )
    return tokens


def _generate(
    loaded: LoadedModel, prompt: str, workload: Workload, args: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Write on, showing the tokens as they come."""
    import torch
    from transformers import TextStreamer

    from tq_hb.integrations.transformers import TqCache, enable

    class Stream(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            console.print(text, end="\n" if stream_end else "", markup=False, soft_wrap=True)

    enable(loaded.model)
    cache = TqCache(loaded.model.config, k_bits=args.k_bits, v_bits=args.v_bits, packing="plane")
    inputs = loaded.tokenizer(prompt, return_tensors="pt")
    prompt_tokens = inputs.input_ids.shape[1]
    console.rule(f"{loaded.name} goes on from {prompt_tokens} tokens, KV cache at {args.k_bits}/{args.v_bits} bits")
    console.print(f"[...] {prompt.rsplit(chr(10), 1)[-1]}", style="dim", markup=False, soft_wrap=True)
    torch.manual_seed(args.seed)
    begin = time.perf_counter()
    tokens = loaded.model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        cache=cache,
        max_new_tokens=workload.new_tokens if args.max_new_tokens is None else args.max_new_tokens,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        streamer=Stream(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )[0, prompt_tokens:]
    seconds = time.perf_counter() - begin
    kernels = sorted({kernel for plan in cache.last_plans if plan for kernel in plan.kernels})
    console.print(
        f"\n{len(tokens)} tokens in {seconds:.1f} s, prompt included. The cache has seen {cache.get_seq_length()} "
        f"tokens and takes {cache.nbytes / MIB:.1f} MiB. Attended on the codes by {', '.join(kernels)}.",
        style="dim",
    )
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(tokens),
        "k_bits": args.k_bits,
        "v_bits": args.v_bits,
        "seed": args.seed,
        "seconds": seconds,
        "cache_nbytes": cache.nbytes,
        "kernels": kernels,
        "text": loaded.tokenizer.decode(tokens, skip_special_tokens=True),
    }


def _replay(loaded: LoadedModel, tokens: torch.Tensor, workload: Workload, console: Console) -> list[Result]:
    from rich.progress import Progress, TimeElapsedColumn

    from tq_hb.cli._replay import SETTINGS, replay, steps_in_all

    console.rule(f"replay of {tokens.shape[1]} tokens with {len(SETTINGS)} caches")
    prefill = workload.prefill_tokens
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("decoding and scoring", total=steps_in_all(tokens.shape[1], prefill))
        return replay(loaded.model, tokens, prefill, on_steps=lambda steps: progress.advance(task, steps))


def _print_results(report: dict[str, Any], console: Console) -> None:
    from tq_hb.cli._output import print_table, table

    replay = report["replay"]
    rows = table(
        "K/V bits",
        "bytes\nper token",
        "MiB\nin all",
        "decode\nms/token",
        "mean\nKL",
        "top-1\nagreement",
        "perplexity",
    )
    for row in replay["settings"]:
        rows.add_row(
            row["setting"],
            f"{row['bytes_per_token']:,}",
            f"{row['nbytes'] / MIB:.2f}",
            f"{row['decode_ms']:.1f}",
            f"{row['mean_kl']:.1e}" if row["mean_kl"] else "0",
            f"{row['top1_agreement']:.1%}",
            f"{row['perplexity']:.2f}",
        )
    title = f"{report['model']}: {replay['scored_tokens']} tokens decoded after {replay['prefill_tokens']} of prefill"
    print_table(console, title, rows)
    console.print(
        "Bytes are of all layers, float32 in the first row; codes are plane packed. KL is that of the "
        "next-token distributions from the first row's, in nats. Time is the median of whole steps, taken in turns.",
        style="dim",
    )
