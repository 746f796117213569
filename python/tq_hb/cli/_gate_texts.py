"""The texts that the gate replays: three kinds that every Python with numpy has, and one with things to find in it."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import torch

import tq_hb


@dataclass(frozen=True)
class Text:
    """Tokens to replay, shape (1, tokens).

    `answers` are the places of the tokens that answer the needle text's questions, `depths` those of the needles, as
    shares of the text between them.
    """

    name: str
    source: str
    tokens: torch.Tensor
    answers: tuple[tuple[int, ...], ...] = ()
    depths: tuple[float, ...] = ()

    @property
    def sha256(self) -> str:
        """Of the tokens, as 64-bit integers."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()


def own_texts(tokenizer: Any, length: int) -> list[Text]:
    """Return the first `length` tokens of a licence, of documentation and of code."""
    return [_cut(tokenizer, name, source, read(), length) for name, (source, read) in KINDS.items()]


def user_text(tokenizer: Any, path: Path, length: int) -> Text:
    """Return the first `length` tokens of a file, which its path names.

    Raises
    ------
    tq_hb.InvalidArgument
        If it can't be read or has fewer.
    """
    return _cut(tokenizer, str(path), "a file", read_text(path), length)


def read_text(path: Path) -> str:
    """Return what is in a file.

    Raises
    ------
    tq_hb.InvalidArgument
        If it can't be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise tq_hb.InvalidArgument(f"text must be a readable text file, got {path} ({error})") from error


def own_content(kind: str) -> str:
    """Return all of our text of a kind: "licence", "documentation" or "code"."""
    return KINDS[kind][1]()


def beginning(tokenizer: Any, content: str, length: int) -> torch.Tensor:
    """Return up to `length` tokens, shape (1, tokens)."""
    # Far more characters than the tokens can take, without reading megabytes.
    return torch.tensor([tokenizer(content[: 40 * length]).input_ids[:length]])


def needle_text(tokenizer: Any, length: int) -> Text:
    """Return documentation with numbers hidden in it, and the questions for them at the end: ten, if they fit.

    The questions are followed by the right answers, since the text is fixed: what counts is whether each token of an
    answer was the likeliest one.

    Raises
    ------
    tq_hb.InvalidArgument
        If not even one fits into half of `length` tokens, or there is not that much documentation.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    end_of_line = encode("\n")
    facts = [(encode(f"The pass number of {place} is"), encode(f" {number}.")) for place, number in _FACTS]
    # Each is there twice: as a needle, and as a question.
    sizes = np.cumsum([2 * (len(question) + len(answer) + len(end_of_line)) for question, answer in facts])
    count = int(np.searchsorted(sizes, length / 2, side="right"))
    start = list(tokenizer("").input_ids)
    hay_length = length - len(start) - int(sizes[count - 1])
    hay = encode(_documentation())[:hay_length]
    if count == 0 or len(hay) < hay_length:
        raise tq_hb.InvalidArgument(f"tokens must be some hundreds to some ten thousands for needles, got {length}")
    depths = tuple((0.5 + i) / count for i in range(count))
    cuts = [round(depth * len(hay)) for depth in depths]
    tokens = list(start)
    for begin, end, (question, answer) in zip([0, *cuts], cuts, facts, strict=False):
        tokens += [*hay[begin:end], *question, *answer, *end_of_line]
    tokens += hay[cuts[-1] :]
    answers = []
    for question, answer in facts[:count]:
        tokens += question
        # The last token is the full stop.
        answers.append(tuple(range(len(tokens), len(tokens) + len(answer) - 1)))
        tokens += [*answer, *end_of_line]
    return Text("needles", KINDS["documentation"][0], torch.tensor([tokens]), tuple(answers), depths)


_FACTS = (
    ("Lisbon", 7351),
    ("Oslo", 2908),
    ("Cairo", 6147),
    ("Quito", 8532),
    ("Perth", 4769),
    ("Kyoto", 9284),
    ("Dakar", 3615),
    ("Turin", 5190),
    ("Sofia", 1846),
    ("Denver", 7023),
)


def _licence() -> str:
    files = metadata.files("numpy") or ()
    texts = [file.read_text() for file in files if re.search(r"licen[cs]e", file.name, re.IGNORECASE)]
    return max(texts, key=len)


def _documentation() -> str:
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def _code() -> str:
    spec = importlib.util.find_spec("argparse")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


KINDS: dict[str, tuple[str, Callable[[], str]]] = {
    "licence": ("numpy's licences, with those of what its wheels contain", _licence),
    "documentation": ("the Python language's help topics", _documentation),
    "code": ("the source of Python's argparse", _code),
}
"""Our texts: what each is, for reports, and what reads it."""


def _cut(tokenizer: Any, name: str, source: str, content: str, length: int) -> Text:
    tokens = beginning(tokenizer, content, length)
    if tokens.shape[1] < length:
        raise tq_hb.InvalidArgument(f"text must have at least {length} tokens, got {tokens.shape[1]} in {name}")
    return Text(name, source, tokens)
