"""Tokens of preprocessed Metal source, each with its place in the file it came from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""(?P<directive>^[ \t]*\#[^\n]*)
      | (?P<space>\s+)
      | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      | (?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
      | (?P<word>[A-Za-z_]\w*)
      | (?P<operator>\[\[|\]\]|::|->|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|\+\+|--|.)""",
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)
_LINE_MARKER = re.compile(r'\s*#\s*(?:line\s+)?(\d+)\s+"((?:\\.|[^"\\])*)"')


class TranslationError(Exception):
    """The source holds something that Metal has not, or that the translator does not understand."""


@dataclass
class Token:
    kind: str
    text: str
    file: str
    line: int
    output: str
    attributes: list[str] = field(default_factory=list)
    """Names of the [[attributes]] that stand directly before this token."""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    def error(self, message: str) -> TranslationError:
        return TranslationError(f"{self.place}: error: {message}")


@dataclass
class Source:
    everything: list[Token]
    code: list[Token]
    """The tokens without space, directives and attributes."""

    def text(self, index: int) -> str:
        return self.code[index].text if 0 <= index < len(self.code) else ""

    def closing(self, start: int) -> int:
        """The index of the bracket that closes the one at `start`; angle brackets belong to templates here."""
        opening = self.text(start)
        pairs = {"(": ")", "[": "]", "{": "}"} if opening != "<" else {"(": ")", "[": "]", "{": "}", "<": ">"}
        stack: list[str] = []
        for index in range(start, len(self.code)):
            text = self.text(index)
            if text in pairs:
                stack.append(pairs[text])
            elif text == stack[-1]:
                stack.pop()
                if not stack:
                    return index
        raise self.code[start].error(f"'{opening}' is never closed")

    def split(self, start: int, end: int) -> list[tuple[int, int]]:
        """The ranges between the commas of [start, end); none if it is empty."""
        if start == end:
            return []
        parts, first, depth = [], start, 0
        for index in range(start, end):
            text = self.text(index)
            if text in "([{<":
                depth += 1
            elif text in ")]}>":
                depth -= 1
            elif text == "," and depth == 0:
                parts.append((first, index))
                first = index + 1
        return [*parts, (first, end)]

    def output(self) -> str:
        return "".join(token.output for token in self.everything)


def read(text: str) -> Source:
    everything: list[Token] = []
    code: list[Token] = []
    file, line = "", 1
    attributes: list[str] | None = None  # the words of an attribute being read
    pending: list[str] = []
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or ""
        token = Token(kind, match.group(), file, line, match.group())
        everything.append(token)
        if kind == "directive" and (marker := _LINE_MARKER.match(token.text)):
            file, line = marker[2], int(marker[1]) - 1
        line += token.text.count("\n")
        if kind in ("space", "directive"):
            continue
        if token.text == "[[" and attributes is None:
            attributes = []
            token.output = ""
        elif attributes is None:
            token.attributes, pending = pending, []
            code.append(token)
        elif token.text == "]]":
            names = _split_attribute("".join(attributes))
            pending += names
            attributes = None
            token.output = "kernel" if "kernel" in names else ""
        else:
            attributes.append(token.text)
            token.output = ""
    return Source(everything, code)


def _split_attribute(text: str) -> list[str]:
    return re.split(r",(?![^()]*\))", text)
