"""Finds what a Metal source declares: functions, kernels, instantiations and program-scope constants."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from translator.tokens import Source, Token

ATTRIBUTES = {
    "thread_position_in_grid": "kThreadPositionInGrid",
    "threadgroup_position_in_grid": "kGroupPositionInGrid",
    "thread_position_in_threadgroup": "kThreadPositionInGroup",
    "thread_index_in_threadgroup": "kThreadIndexInGroup",
    "simdgroup_index_in_threadgroup": "kSimdgroupIndexInGroup",
    "thread_index_in_simdgroup": "kThreadIndexInSimdgroup",
    "threads_per_threadgroup": "kThreadsPerGroup",
    "threadgroups_per_grid": "kGroupsPerGrid",
    "threads_per_grid": "kThreadsPerGrid",
    "simdgroups_per_threadgroup": "kSimdgroupsPerGroup",
    "threads_per_simdgroup": "kThreadsPerSimdgroup",
}
_SLOT = re.compile(r"(buffer|threadgroup)\((\d+)\)")
_NOT_A_NAME = ("decltype", "alignas", "__attribute__", "noexcept")


@dataclass
class Function:
    name: str
    token: Token
    is_kernel: bool
    host_name: str | None
    parameters: list[tuple[int, int]]
    body: tuple[int, int]
    """Indices of the braces."""
    scope: str = ""
    is_template: bool = False
    is_specialisation: bool = False


@dataclass
class Parameter:
    attribute: str
    slot: int


@dataclass
class Instance:
    """A kernel under the name that the host asks for."""

    host_name: str
    function: Function
    reference: str


@dataclass
class Constant:
    name: str
    type: str
    index: int | None
    """Of a function constant; None for one computed from function constants."""
    tokens: tuple[int, int]


@dataclass
class Program:
    source: Source
    functions: list[Function] = field(default_factory=list)
    instances: list[Instance] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)

    def kernel(self, name: str, place: Token) -> Function:
        for function in self.functions:
            if function.name == name and function.is_kernel:
                return function
        raise place.error(f"there is no kernel {name}")


def parse(source: Source) -> Program:
    program = Program(source)
    _parse_scope(program, 0, len(source.code), "")
    return program


def _parse_scope(program: Program, index: int, end: int, scope: str) -> None:
    source = program.source
    while index < end:
        text = source.text(index)
        if text in (";", "}"):
            index += 1
        elif text == "namespace":
            while source.text(index) not in ("{", ";"):
                index += 1
            index += 1
        elif text == "template" and source.text(index + 1) != "<":
            index = _parse_instantiation(program, index)
        else:
            index = _parse_declaration(program, index, scope)


def _parse_declaration(program: Program, start: int, scope: str) -> int:
    source = program.source
    index, is_template, is_specialisation = start, False, False
    while source.text(index) == "template":
        is_specialisation = source.text(index + 2) == ">"
        index, is_template = source.closing(index + 1) + 1, True
    first, call, is_initialised = index, None, False
    while index < len(source.code):
        text = source.text(index)
        if text == "(":
            if call is None and source.text(index - 1) not in _NOT_A_NAME:
                call = index
            index = source.closing(index)
        elif text == "[":
            index = source.closing(index)
        elif text == "=" and source.text(index - 1) != "operator":
            is_initialised = True
        elif text == ";":
            _note_constant(program, first, index)
            return index + 1
        elif text == "{":
            close = source.closing(index)
            if call is not None and not is_initialised:
                function = _note_function(program, first, call, (index, close))
                function.scope, function.is_template, function.is_specialisation = scope, is_template, is_specialisation
                if function.is_kernel and not is_template:
                    program.instances.append(Instance(function.host_name or function.name, function, function.name))
                return close + 1
            if source.text(first) in ("struct", "class", "union"):
                _parse_scope(program, index + 1, close, source.text(first + 1))
            index = close
        index += 1
    raise source.code[start].error("a declaration without an end")


def _note_function(program: Program, first: int, call: int, body: tuple[int, int]) -> Function:
    source = program.source
    name = call - 1
    if source.text(name) == ">":
        depth = 0
        while True:
            depth += {">": 1, "<": -1}.get(source.text(name), 0)
            name -= 1
            if depth == 0:
                break
    text = source.text(name)
    before = range(first, call)
    if any(source.text(index) == "operator" for index in before):
        text = "operator" + text
    attributes = [attribute for index in before for attribute in source.code[index].attributes]
    is_kernel = any(source.text(index) == "kernel" for index in before) or "kernel" in attributes
    parameters = source.split(call + 1, source.closing(call))
    function = Function(text, source.code[name], is_kernel, _host_name(attributes), parameters, body)
    program.functions.append(function)
    return function


def _parse_instantiation(program: Program, start: int) -> int:
    source = program.source
    end = start
    while source.text(end) != ";":
        end += 1
    words = [source.text(index) for index in range(start + 1, end)]
    attributes = [attribute for index in range(start, end) for attribute in source.code[index].attributes]
    host_name = _host_name(attributes)
    if host_name is not None:
        place = source.code[start]
        if "decltype" in words:
            open_index = start + 1 + words.index("(")
            reference = [source.text(index) for index in range(open_index + 1, source.closing(open_index))]
        elif "void" in words:
            open_index = start + 1 + words.index("void")
            while source.text(open_index) != "(":
                open_index += 1
            reference = words[words.index("void") + 1 : open_index - start - 1]
        else:
            raise place.error("an instantiation that is not understood")
        program.instances.append(Instance(host_name, program.kernel(reference[0], place), " ".join(reference)))
    return end + 1


def _host_name(attributes: list[str]) -> str | None:
    for attribute in attributes:
        if attribute.startswith("host_name("):
            return attribute[len('host_name("') : -len('")')]
    return None


def _note_constant(program: Program, first: int, end: int) -> None:
    source = program.source
    words = [source.text(index) for index in range(first, end)]
    if "constant" not in words[:3] or "(" in words[: words.index("=") if "=" in words else None]:
        return
    name_end = words.index("=") if "=" in words else len(words)
    name, type_ = words[name_end - 1], words[name_end - 2]
    place = source.code[first]
    indices = [
        int(match[1])
        for index in range(first, end + 1)
        for attribute in source.code[index].attributes
        if (match := re.fullmatch(r"function_constant\((\d+)\)", attribute))
    ]
    if indices:
        if "=" in words:
            raise place.error(f"function constant {name} cannot have an initialiser")
        program.constants.append(Constant(name, type_, indices[0], (first, end)))
        return
    known = {constant.name for constant in program.constants}
    if known.intersection(words[name_end:]):
        if words[name_end - 1] == "]":
            raise place.error("an array cannot depend on function constants")
        program.constants.append(Constant(name, type_, None, (first, end)))


def kernel_parameters(source: Source, function: Function) -> list[Parameter]:
    result = []
    for start, end in function.parameters:
        attributes = [name for index in range(start, end + 1) for name in source.code[index].attributes]
        place = source.code[end]
        name = source.text(end - 1)
        if len(attributes) != 1:
            raise place.error(f"kernel {function.name}: parameter {name} needs exactly one binding attribute")
        if match := _SLOT.fullmatch(attributes[0]):
            result.append(Parameter("kBuffer" if match[1] == "buffer" else "kGroupMemory", int(match[2])))
        elif attributes[0] in ATTRIBUTES:
            result.append(Parameter(ATTRIBUTES[attributes[0]], 0))
        else:
            raise place.error(f"kernel {function.name}: attribute {attributes[0]} of {name} is not understood")
    slots = [
        (parameter.attribute, parameter.slot)
        for parameter in result
        if "Memory" in parameter.attribute or parameter.attribute == "kBuffer"
    ]
    if len(set(slots)) != len(slots):
        raise function.token.error(f"kernel {function.name} binds one slot twice")
    return result
