"""``tq-hb gate``: the smallest widths that a model's keys and values can be held at, measured."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tq_hb

if TYPE_CHECKING:
    from rich.console import Console

    from tq_hb.cli._gate_caches import Widths
    from tq_hb.cli._gate_run import Job, Outcome
    from tq_hb.cli._gate_texts import Text
    from tq_hb.integrations.calibration import Calibration

TOKENS = 2048
WIDTHS = "8/8,8/6,6/8,8/5,5/8,6/6,6/5,5/6,5/5"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``gate`` to the command line.

    >>> import argparse
    >>> from tq_hb.cli import gate
    >>> parser = argparse.ArgumentParser()
    >>> gate.add_parser(parser.add_subparsers())
    >>> parser.parse_args(["gate", "gemma-3-270m"]).tokens
    2048
    """
    parser = subparsers.add_parser(
        "gate",
        help="find the smallest widths that a model's keys and values can be held at",
        description="Replays texts through a model with every layer's keys and values held at each of some widths, "
        "compares attention and predictions with those on float32 keys and values, and names the smallest widths that "
        "pass. What is measured is kept beside the output: the same command goes on where it was interrupted.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="gemma-3-270m, smollm2-135m, tiny, a folder with a transformers model, a .gguf file, or a .safetensors "
        "file that --capture wrote",
    )
    parser.add_argument(
        "--text",
        action="append",
        metavar="FILE|licence|documentation|code",
        help="what to replay, a file or a text of ours (default: all three of ours)",
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help=f"of each text (default {TOKENS})")
    parser.add_argument("--widths", default=WIDTHS, metavar="K/V,...", help=f"bits to try (default {WIDTHS})")
    parser.add_argument(
        "--k-mean",
        action="append",
        metavar="none|prefill|FILE",
        help="what keys are centred on: nothing, the first tokens' mean, or what tq-hb calibrate wrote; repeat it to "
        "compare (default none)",
    )
    parser.add_argument("--no-needles", action="store_true", help="leave out the text with numbers to find again")
    parser.add_argument("--no-exceptions", action="store_true", help="try no setting with its worst layers at 8/8 bits")
    parser.add_argument("--capture", type=Path, metavar="FILE", help="write q, k and v of the first text, and end")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all that this process may use")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: build/gate/MODEL")
    parser.add_argument("--json", action="store_true", help="print JSON; everything else goes to standard error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, show, and write the files.

    >>> from tq_hb.cli import main
    >>> main(["gate", "no such model"])  # the reason goes to standard error
    2
    """
    from rich.console import Console

    from tq_hb.cli._arguments import COUNTS, THREADS, check_file, check_folder, check_numbers
    from tq_hb.cli._models import extras_of, require_packages
    from tq_hb.cli._output import print_json
    from tq_hb.cli._torch import set_up

    check_numbers(args, tokens=COUNTS, threads=THREADS)
    if args.capture is None:
        check_folder("--out", _directory(args))
    else:
        check_file("--capture", args.capture)
    packages = ("torch", "transformers", "matplotlib", "safetensors")
    require_packages(packages, extras_of(args.model, plots=True))
    set_up(args.threads)
    # Where there is no terminal, nothing has to fit into 80 columns.
    width = None if sys.stdout.isatty() else 120
    console = Console(stderr=args.json, highlight=False, width=width)
    begin, cpu_begin = time.perf_counter(), time.process_time()
    _check_texts(args)
    pairs, means = _pairs(args), _means(args)
    job, about = _prepare(args, console)
    if job is None:
        return 0
    outcomes = _measure(job, _settings(pairs, means, job), with_exceptions=not args.no_exceptions, console=console)
    from tq_hb.cli._gate_report import make_report

    report = {
        "command": shlex.join(["tq-hb", "gate", *_shown_arguments(args)]),
        **about,
        **make_report(job, outcomes),
        "took": {
            "seconds": round(time.perf_counter() - begin, 1),
            "cpu_seconds": round(time.process_time() - cpu_begin, 1),
        },
    }
    _show(report, _directory(args), console)
    if args.json:
        print_json(report)
    return 0


def _prepare(args: argparse.Namespace, console: Console) -> tuple[Job | None, dict[str, Any]]:
    """Return what to measure, and what the report says of it; None where a capture was asked for and written."""
    from tq_hb.cli._gate_capture import capture, load_capture, save_capture
    from tq_hb.cli._gate_run import CaptureJob, ModelJob
    from tq_hb.cli._gate_store import Store
    from tq_hb.cli._gate_texts import needle_text
    from tq_hb.cli._machine import describe
    from tq_hb.cli._models import load
    from tq_hb.cli._output import commit, whole

    about: dict[str, Any] = {"machine": {**describe(), "commit": commit(Path.cwd())}}
    store = Store(_directory(args) / "measured")
    path = Path(args.model)
    if path.suffix == ".safetensors" and path.is_file():
        captured = load_capture(path)
        return CaptureJob(captured, store), {**about, "model": captured.model}
    with console.status("loading") as status:
        loaded = load(args.model, lambda step: status.update(f"loading {args.model}: {step}"))
        tokenizer = loaded.tokenizer
        texts = _texts(tokenizer, args)
        if args.capture is not None:
            status.update("capturing")
            captured = capture(loaded.model, loaded.name, texts[0].tokens, lambda _: None)
            with whole(args.capture) as file:
                save_capture(file, captured)
            console.print(f"Written: {args.capture}", soft_wrap=True)
            return None, about
        if not args.no_needles:
            texts.append(needle_text(tokenizer, args.tokens))
        status.update("reading every weight")
        job = ModelJob(loaded, texts, store)
    return job, {
        **about,
        "model": loaded.name,
        "texts": [
            {"name": text.name, "source": text.source, "tokens": text.tokens.shape[1], "sha256": text.sha256}
            for text in texts
        ],
        "needle_depths": None if args.no_needles else texts[-1].depths,
    }


def _check_texts(args: argparse.Namespace) -> None:
    """Refuse texts of one name, under which only the last one's figures would be kept."""
    names = [str(Path(text)) for text in args.text or ()]
    for name in names:
        if names.count(name) > 1:
            raise tq_hb.InvalidArgument(f"--text must name every text once, got {name} {names.count(name)} times")


def _texts(tokenizer: Any, args: argparse.Namespace) -> list[Text]:
    from tq_hb.cli._gate_texts import KINDS, own_texts, user_text

    names = args.text or list(KINDS)
    own = {text.name: text for text in own_texts(tokenizer, args.tokens)} if KINDS.keys() & set(names) else {}
    return [own[name] if name in own else user_text(tokenizer, Path(name), args.tokens) for name in names]


def _pairs(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Return the pairs of bits, none of them twice."""
    pairs = []
    for text in args.widths.split(","):
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or not {int(bits) for bits in match.groups()} <= set(tq_hb.supported_bits()):
            known = ", ".join(map(str, tq_hb.supported_bits()))
            raise tq_hb.InvalidArgument(f"widths must be K/V pairs of {known}, got {text.strip()!r}")
        pairs.append((int(match[1]), int(match[2])))
    return list(dict.fromkeys(pairs))


def _means(args: argparse.Namespace) -> dict[str, Calibration | None]:
    """Return what to centre keys on, and what is in the one file among it."""
    from tq_hb.integrations.calibration import Calibration

    choices = list(dict.fromkeys(args.k_mean or ["none"]))
    if len(set(choices) - {"none", "prefill"}) > 1:
        raise tq_hb.InvalidArgument(f"k-mean must name one file at most, got {', '.join(choices)}")
    return {choice: None if choice in ("none", "prefill") else Calibration.load(choice) for choice in choices}


def _settings(pairs: list[tuple[int, int]], means: Mapping[str, Calibration | None], job: Job) -> list[Widths]:
    """Return the settings in the order of their bytes."""
    from tq_hb.cli._gate_caches import Widths

    settings = []
    for choice, calibration in means.items():
        k_mean: Any = None
        centring = ""
        if calibration is not None:
            try:
                job.check_means(calibration)
            except tq_hb.InvalidArgument as error:
                raise tq_hb.InvalidArgument(
                    f"--k-mean must be of the model that is measured, got {choice} ({error})"
                ) from error
            k_mean, centring = calibration.k_means, "centred"
        elif choice == "prefill":
            k_mean, centring = "prefill", "prefill mean"
        settings += [Widths(k, v, k_mean=k_mean, centring=centring) for k, v in pairs]
    return sorted(settings, key=lambda setting: -(setting.k_bits + setting.v_bits))


def _measure(job: Job, settings: list[Widths], *, with_exceptions: bool, console: Console) -> list[Outcome]:
    """Measure the settings, then those with exceptions that may be smaller than the smallest one that passes."""
    from rich.progress import Progress, TimeElapsedColumn

    from tq_hb.cli._gate_run import with_worst_layers_excepted

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:

        def measure(chosen: Sequence[Widths]) -> list[Outcome]:
            task = progress.add_task("", total=job.steps(chosen))
            outcomes = job.measure(chosen, lambda what, n: progress.update(task, description=what, advance=n))
            progress.remove_task(task)
            return outcomes

        outcomes = measure(settings)
        more = list(with_worst_layers_excepted(job, outcomes)) if with_exceptions else []
        return sorted([*outcomes, *(measure(more) if more else ())], key=lambda outcome: -outcome.bytes_per_token)


def _show(report: dict[str, Any], directory: Path, console: Console) -> None:
    from tq_hb.cli._gate_report import limits, markdown, plot_error, plot_layers, rich_table, sentences, title
    from tq_hb.cli._output import print_table, write_whole

    print_table(console, title(report), rich_table(report))
    for gate in report["gates"]:
        console.print(f"{gate['name']}: {limits(gate)}", style="dim")
    console.print("In brackets: an interval reaches over a limit. KL in nats.", style="dim")
    for sentence in sentences(report):
        console.print(sentence, style="bold")
    plots = {"error against size": "gate.png", "error of every layer": "layers.png"}
    files = {
        "gate.json": (json.dumps(report, indent=1) + "\n").encode(),
        "gate.md": markdown(report, plots).encode(),
        "gate.png": plot_error(report),
        "layers.png": plot_layers(report),
    }
    for name, content in files.items():
        write_whole(directory / name, content)
    console.print(f"Written: {', '.join(str(directory / name) for name in files)}", soft_wrap=True)


def _directory(args: argparse.Namespace) -> Path:
    out: Path | None = args.out
    return Path("build/gate") / Path(args.model).stem if out is None else out


def _shown_arguments(args: argparse.Namespace) -> list[str]:
    """Return the arguments that the results depend on."""
    shown = [args.model, *(part for text in args.text or () for part in ("--text", text))]
    if args.tokens != TOKENS:
        shown += ["--tokens", str(args.tokens)]
    if args.widths != WIDTHS:
        shown += ["--widths", args.widths]
    for choice in args.k_mean or ():
        shown += ["--k-mean", choice]
    shown += [
        option
        for option, is_set in {"--no-needles": args.no_needles, "--no-exceptions": args.no_exceptions}.items()
        if is_set
    ]
    return shown
