"""The encoders' arithmetic is part of a file format: nothing in it may depend on the compiler's liberties."""

from __future__ import annotations

import re
from collections.abc import Iterator

from translator.graph import reachable
from translator.structure import Function, Program
from translator.tokens import TranslationError

_ENCODER = "hadamard_quantize"


def encoder_functions(program: Program) -> list[Function]:
    """The encoding kernels and everything that they reach."""
    found: list[Function] = []
    for kernel in program.functions:
        if kernel.is_kernel and _ENCODER in kernel.name:
            found += [function for function in reachable(program, kernel) if function not in found]
    return found


def check_encoders(program: Program) -> Iterator[TranslationError]:
    """Division and contraction need types; see guard_divisions and contracted_sums."""
    source = program.source
    for function in encoder_functions(program):
        where = f"{function.name} is part of an encoder:"
        for index in range(*function.body):
            token = source.code[index]
            qualifier = source.text(index - 2) if source.text(index - 1) == "::" else ""
            if token.text in ("rsqrt", "fast"):
                yield token.error(f"{where} {token.text} is not exactly rounded")
            elif token.text in ("sqrt", "divide") and qualifier != "precise":
                yield token.error(f"{where} write precise::{token.text}")


def guard_divisions(program: Program) -> None:
    """a / b becomes a / metal_sim::integers / b, which only integers compile in."""
    for function in encoder_functions(program):
        for token in program.source.code[slice(*function.body)]:
            if token.text in ("/", "/="):
                token.output = f"{token.text} ::metal_sim::integers /"


def contracted_sums(llvm: str) -> list[str]:
    """Places of the additions that may fuse with a product, in encoders and what they call.

    `llvm` is unoptimised LLVM assembly with debug information, compiled with contraction wherever no pragma
    forbids it.
    """
    bodies = dict(re.findall(r"^define [^\n]*?@([\w.$]+)\([^\n]*\{\n(.*?)^\}", llvm, re.MULTILINE | re.DOTALL))
    debug = dict(re.findall(r"^(!\d+) = (.*)$", llvm, re.MULTILINE))
    pending = [name for name in bodies if _ENCODER in name]
    seen = set(pending)
    places: set[str] = set()
    for name in pending:
        for line in bodies[name].splitlines():
            if re.search(r" (?:fadd|fsub) (?:\w+ )*contract |@llvm\.fmuladd", line):
                location = re.search(r"!dbg (!\d+)", line)
                places.add(_place(debug, location[1]) if location else name)
            for callee in re.findall(r"@([\w.$]+)", line):
                if callee in bodies and callee not in seen:
                    seen.add(callee)
                    pending.append(callee)
    return sorted(places)


def _place(debug: dict[str, str], location: str) -> str:
    line = re.search(r"line: (\d+)", debug[location])
    while "DIFile" not in debug[location]:
        parent = re.search(r"file: (!\d+)", debug[location]) or re.search(r"scope: (!\d+)", debug[location])
        assert parent is not None
        location = parent[1]
    name = re.search(r'filename: "([^"]*)"', debug[location])
    return f"{name[1] if name else '?'}:{line[1] if line else '?'}"
