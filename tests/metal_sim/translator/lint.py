"""Refuses what Metal has not, though C++ has it, and holds the encoders to exact arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

from translator.encoders import check_encoders
from translator.structure import Function, Program, kernel_parameters
from translator.tokens import Source, TranslationError

_BANNED = {
    "double": "Metal has no double",
    "virtual": "Metal has no virtual functions",
    "throw": "Metal has no exceptions",
    "try": "Metal has no exceptions",
    "catch": "Metal has no exceptions",
    "new": "Metal has no new",
    "delete": "Metal has no delete",
    "goto": "Metal has no goto",
    "asm": "Metal has no inline assembly",
    "dynamic_cast": "Metal has no run-time types",
    "typeid": "Metal has no run-time types",
    "thread_local": "Metal has no thread_local",
}
_BEFORE_AN_EXPRESSION = {"(", ",", "=", "{", ";", "}", "return", "&&", "||", "!", "?", ":", "+", "<", "&", "|"}
_ADDRESS_SPACES = {"device", "constant", "threadgroup", "thread"}


def lint(program: Program) -> None:
    findings = [
        *_banned_words(program.source),
        *_lambdas(program.source),
        *_function_pointers(program.source),
        *_local_statics(program),
        *_program_scope_variables(program.source),
        *_recursion(program),
        *_address_space_overloads(program),
        *_kernels(program),
        *check_encoders(program),
    ]
    if findings:
        raise TranslationError("\n".join(str(finding) for finding in findings))


def _banned_words(source: Source) -> Iterator[TranslationError]:
    for index, token in enumerate(source.code):
        if token.text == "long" and source.text(index + 1) == "long":
            yield token.error("Metal has no long long")
        elif token.text == "delete" and source.text(index - 1) == "=":
            continue  # a deleted function
        elif token.text in _BANNED:
            yield token.error(f"{token.text}: {_BANNED[token.text]}")


def _lambdas(source: Source) -> Iterator[TranslationError]:
    for index, token in enumerate(source.code):
        if token.text == "[" and source.text(index - 1) in _BEFORE_AN_EXPRESSION:
            yield token.error("Metal has no lambdas")


def _function_pointers(source: Source) -> Iterator[TranslationError]:
    """Declarations such as void (*name)(int), and calls through one."""
    for index, token in enumerate(source.code):
        if token.text == "(" and source.text(index + 1) == "*":
            name = index + 2 if source.text(index + 2) != ")" else index + 1
            if source.text(name + 1) == ")" and source.text(name + 2) == "(":
                yield token.error("Metal has no function pointers")


def _local_statics(program: Program) -> Iterator[TranslationError]:
    for function in program.functions:
        for token in program.source.code[slice(*function.body)]:
            if token.text == "static":
                yield token.error("Metal has no static variables in functions")


def _program_scope_variables(source: Source) -> Iterator[TranslationError]:
    """Initialised variables outside functions, constexpr ones too, have to name the constant address space."""
    statement: list[int] = []
    index = 0
    while index < len(source.code):
        text = source.text(index)
        words = [source.text(i) for i in statement]
        if text == ";" or (text == "{" and "namespace" in words) or text == "}":
            if "=" in words and not {"constant", "using", "static_assert"} & set(words):
                yield source.code[statement[0]].error("a variable at program scope must be constant")
            statement = []
        elif text in "({" or (text == "<" and words == ["template"]):
            index = source.closing(index)
            if text == "{" and "=" not in words and not {"struct", "class", "enum", "union"} & set(words):
                statement = []  # that was a function
        else:
            statement.append(index)
        index += 1


def _calls(program: Program, function: Function) -> Iterator[tuple[str, int, bool]]:
    """Name, number of arguments and whether template arguments are spelled out, of what a body calls."""
    source = program.source
    names = {other.name for other in program.functions}
    for index in range(*function.body):
        if source.text(index) not in names or source.text(index - 1) in (".", "->"):
            continue
        start, is_explicit = index + 1, source.text(index + 1) == "<"
        if is_explicit:
            start = source.closing(start) + 1
        if source.text(start) == "(":
            arguments = source.split(start + 1, source.closing(start))
            yield source.text(index), len(arguments), is_explicit


def _recursion(program: Program) -> Iterator[TranslationError]:
    """A function is its name and number of parameters; templates may go on to other instances of themselves."""
    graph: dict[tuple[str, int], set[tuple[str, int]]] = {}
    for function in program.functions:
        key = (function.name, len(function.parameters))
        graph.setdefault(key, set()).update(
            (name, count)
            for name, count, is_explicit in _calls(program, function)
            if not (is_explicit and name == function.name)
        )
    for function in program.functions:
        start = (function.name, len(function.parameters))
        seen: set[tuple[str, int]] = set()
        pending = list(graph[start])
        while pending:
            key = pending.pop()
            if key not in seen:
                seen.add(key)
                pending += graph.get(key, ())
        if start in seen:
            yield function.token.error(f"Metal has no recursion, but {function.name} calls itself")


def _address_space_overloads(program: Program) -> Iterator[TranslationError]:
    """Two functions that differ by address spaces only would be one function to the simulator."""
    source = program.source
    seen: dict[tuple[object, ...], Function] = {}
    for function in program.functions:
        types = []
        for start, end in function.parameters:
            words = [source.text(index) for index in range(start, end)]
            if len(words) > 1 and source.code[end - 1].kind == "word":
                words.pop()  # the parameter's name
            types.append(tuple(word for word in words if word not in _ADDRESS_SPACES))
        key = (function.name, function.is_template, function.scope, *types)
        if key in seen and not function.is_specialisation:
            yield function.token.error(f"{function.name} differs from an overload by address spaces only")
        seen.setdefault(key, function)


def _kernels(program: Program) -> Iterator[TranslationError]:
    for function in program.functions:
        if function.is_kernel:
            try:
                kernel_parameters(program.source, function)
            except TranslationError as error:
                yield error
