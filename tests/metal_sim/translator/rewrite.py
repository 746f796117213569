"""Rewrites the tokens that C++ would not take, and appends the tables that the engine reads."""

from __future__ import annotations

import re

from translator.encoders import guard_divisions
from translator.graph import constants_read
from translator.structure import Program, kernel_parameters
from translator.tokens import Source

_VECTOR = re.compile(r"(bool|char|uchar|short|ushort|int|uint|long|ulong|half|bfloat|float)[234]")
_FP_PRAGMA = re.compile(r"\s*#\s*pragma\s+METAL\s+fp\s+(contract\s*\(\s*(?:off|on|fast)\s*\))\s*")


def rewrite(program: Program) -> str:
    source = program.source
    _rewrite_pragmas(source)
    _rewrite_constructors(source)
    _rewrite_constants(program)
    guard_divisions(program)
    for function in program.functions:
        _rewrite_threadgroup_variables(source, function.body, function.is_kernel)
    return '#include "metal_sim.h"\n' + source.output() + _registration(program)


def _rewrite_pragmas(source: Source) -> None:
    for token in source.everything:
        if token.kind == "directive" and "METAL" in token.text:
            match = _FP_PRAGMA.fullmatch(token.text)
            if match is None:
                raise token.error(f"pragma not understood: {token.text.strip()}")
            token.output = f"#pragma clang fp {match[1]}"


def _rewrite_constructors(source: Source) -> None:
    """float4(a, b) becomes metal_sim::make<float4>(a, b)."""
    aliases = _vector_aliases(source)
    for index, token in enumerate(source.code):
        if source.text(index - 1) in ("struct", "class", "using"):
            continue
        end = index
        if token.text == "vec" and source.text(index + 1) == "<":
            end = source.closing(index + 1)
        elif not _VECTOR.fullmatch(token.text) and token.text not in aliases:
            continue
        if source.text(end + 1) != "(" or _is_declarator(source, end + 1):
            continue
        start = index
        if source.text(index - 1) == "::" and source.text(index - 2) == "metal":
            start = index - 2
        source.code[start].output = "::metal_sim::make<" + source.code[start].output
        source.code[end].output += ">"


def _is_declarator(source: Source, index: int) -> bool:
    """Whether `(&name)[` or `(*name)[` starts here: a reference or a pointer to an array."""
    return source.text(index + 1) in ("&", "*") and source.text(index + 3) == ")" and source.text(index + 4) == "["


def _vector_aliases(source: Source) -> set[str]:
    """Names that a `using` or a `typedef` gives to vector types."""
    aliases: set[str] = set()

    def is_vector(index: int) -> bool:
        return source.text(index) in aliases | {"vec"} or _VECTOR.fullmatch(source.text(index)) is not None

    for index, token in enumerate(source.code):
        if token.text == "using" and source.text(index + 2) == "=" and is_vector(index + 3):
            aliases.add(source.text(index + 1))
        elif token.text == "typedef" and is_vector(index + 1):
            end = index
            while source.text(end) != ";":
                end += 1
            aliases.add(source.text(end - 1))
    return aliases


def _rewrite_constants(program: Program) -> None:
    source = program.source
    for constant in program.constants:
        start, end = constant.tokens
        keyword = next(t for t in source.code[start:end] if t.text == "constant")
        if constant.index is not None:
            keyword.output = f"METAL_SIM_CONSTANT bool metal_sim_is_defined_{constant.name}; METAL_SIM_CONSTANT"
        else:
            keyword.output = "METAL_SIM_DERIVED"
            assignment = next(t for t in source.code[start:end] if t.text == "=")
            assignment.output = f"METAL_SIM_ASSIGN({constant.name})"
            source.code[end].output = " METAL_SIM_END;"


def _rewrite_threadgroup_variables(source: Source, body: tuple[int, int], is_kernel: bool) -> None:
    """They become static, and tell the engine of themselves; pointers to threadgroup memory stay as they are."""
    for index in range(*body):
        token = source.code[index]
        if token.text != "threadgroup" or source.text(index - 1) not in ("{", "}", ";", ")"):
            continue
        if source.text(index - 1) == ")" and not _is_alignas(source, index - 1):
            continue
        first = _skip_type(source, index + 1)
        if source.text(first) in ("*", "&"):
            continue
        if not is_kernel:
            raise token.error("only kernels declare variables in threadgroup memory")
        end = first
        while source.text(end) != ";":
            end += 1
        names = []
        for start, stop in source.split(first, end):
            is_array = source.text(start + 1) == "[" and source.text(stop - 1) == "]"
            if source.code[start].kind != "word" or not (stop == start + 1 or is_array):
                raise token.error("a declaration in threadgroup memory that is not understood")
            names.append(source.text(start))
        token.output = "static threadgroup"
        source.code[end].output = "; " + " ".join(f"METAL_SIM_DECLARE({name});" for name in names)


def _is_alignas(source: Source, index: int) -> bool:
    while source.text(index) != "(":
        index -= 1
    return source.text(index - 1) == "alignas"


def _skip_type(source: Source, index: int) -> int:
    while source.text(index) in ("const", "volatile", "unsigned", "signed", "typename"):
        index += 1
    index += 1
    while source.text(index) == "::":
        index += 2
    if source.text(index) == "<":
        index = source.closing(index) + 1
    while source.text(index) == "const":
        index += 1
    return index


def _registration(program: Program) -> str:
    lines = ["", '# 1 "<registration>"', "#if !defined(METAL_SIM_TYPE_CHECK)", "namespace {"]
    entries = []
    for number, instance in enumerate(program.instances):
        parameters = kernel_parameters(program.source, instance.function)
        needed = constants_read(program, instance.function)
        rows = ", ".join(f"{{metal_sim::abi::Attribute::{p.attribute}, {p.slot}}}" for p in parameters)
        lines.append(f"constexpr metal_sim::abi::Parameter metal_sim_parameters_{number}[] = {{{rows or '{}'}}};")
        lines.append(f"constexpr unsigned metal_sim_needs_{number}[] = {{{', '.join(map(str, needed)) or '0'}}};")
        call = f"metal_sim::Call<&{instance.reference}, metal_sim_parameters_{number}>"
        lines.append(f"static_assert({call}::parameter_count == {len(parameters)});")
        entries.append(
            f'{{"{instance.host_name}", &{call}::call, metal_sim_parameters_{number}, {len(parameters)},'
            f" metal_sim_needs_{number}, {len(needed)}}}"
        )
    lines.append(f"constexpr metal_sim::abi::KernelEntry metal_sim_kernels[] = {{{', '.join(entries) or '{}'}}};")
    constants = [constant for constant in program.constants if constant.index is not None]
    rows = ", ".join(
        f'{{"{c.name}", {c.index}, "{c.type}", sizeof({c.name}), &{c.name}, &metal_sim_is_defined_{c.name}}}'
        for c in constants
    )
    lines.append(f"metal_sim::abi::ConstantEntry metal_sim_constants[] = {{{rows or '{}'}}};")
    updates = " ".join(f"metal_sim_update_{c.name}();" for c in program.constants if c.index is None)
    lines += [
        f"void metal_sim_update_constants() {{ {updates} }}",
        "constexpr metal_sim::abi::Module metal_sim_module = {",
        f"    metal_sim_kernels, {len(entries)}, metal_sim_constants, {len(constants)}, &metal_sim_update_constants}};",
        "}",
        'extern "C" __attribute__((visibility("default"))) METAL_SIM_UNTRACED',
        "const metal_sim::abi::Module* metal_sim_load(const metal_sim::abi::Engine* engine) {",
        "  metal_sim::engine = *engine;",
        "  return &metal_sim_module;",
        "}",
        "#endif",
        "",
    ]
    return "\n".join(lines)
