"""Which function calls which, by name."""

from __future__ import annotations

from translator.structure import Function, Program


def callees(program: Program, function: Function) -> list[Function]:
    """Functions of the program that the body of `function` names."""
    source = program.source
    names = {source.text(index) for index in range(*function.body)}
    return [other for other in program.functions if other.name in names]


def reachable(program: Program, function: Function) -> list[Function]:
    found = [function]
    for current in found:
        found += [other for other in callees(program, current) if not any(other is known for known in found)]
    return found


def constants_read(program: Program, kernel: Function) -> list[int]:
    """Indices of the function constants that a kernel needs: read, and never asked whether they are defined."""
    source = program.source
    indices = {constant.name: constant.index for constant in program.constants}
    ranges = [function.body for function in reachable(program, kernel)]
    needed: set[int] = set()
    optional: set[int] = set()
    pending = list(ranges)
    visited: set[str] = set()
    for start, end in pending:
        for position in range(start, end):
            name = source.text(position)
            if name not in indices:
                continue
            index = indices[name]
            if index is None:
                if name not in visited:
                    visited.add(name)
                    pending.append(next(c.tokens for c in program.constants if c.name == name))
            elif source.text(position - 2) == "is_function_constant_defined":
                optional.add(index)
            else:
                needed.add(index)
    return sorted(needed - optional)
