"""The type stubs of the extension module say what the built module has."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tq_hb
from tq_hb import _core

STUB = Path(tq_hb.__file__).resolve().parent / "_core.pyi"


def stub_members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Names that a module or class of the stub defines."""
    members: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            members[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            members[node.target.id] = node
        elif isinstance(node, ast.Assign):
            members.update({target.id: node for target in node.targets if isinstance(target, ast.Name)})
    return members


def is_public(name: str) -> bool:
    return not name.startswith("_")


STUBBED = stub_members(ast.parse(STUB.read_text()).body)
CLASSES = sorted(name for name, value in vars(_core).items() if is_public(name) and inspect.isclass(value))


def test_the_package_is_marked_as_typed():
    assert (STUB.parent / "py.typed").exists()


def test_every_name_of_the_module_is_stubbed_and_the_other_way_round():
    built = {name for name in vars(_core) if is_public(name)}
    aliases = {name for name, node in STUBBED.items() if isinstance(node, ast.Assign)}
    assert built == {name for name in STUBBED if is_public(name)} - (aliases - built)


@pytest.mark.parametrize("name", CLASSES)
def test_every_member_of_a_class_is_stubbed_and_the_other_way_round(name):
    built = {member for member in vars(getattr(_core, name)) if is_public(member)}
    stubbed = {member for member in stub_members(STUBBED[name].body) if is_public(member)}
    assert built == stubbed


def parameters_of(function) -> list[str] | None:
    """Parameter names as pybind11 writes them in the first line of a docstring; None if it does not name them."""
    signature = re.match(r"\w+\((.*)\) ->", function.__doc__ or "")
    if signature is None or "arg0" in signature[1]:
        return None
    names = re.findall(r"(?:^|, )\*{0,2}(\w+)(?=[:,]|$)", re.sub(r"\[[^\[\]]*\]", "", signature[1]))
    return [name for name in names if name != "self"]


def stubbed_parameters(node: ast.FunctionDef) -> list[str]:
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.kwarg]
    return [a.arg for a in every if a is not None and a.arg != "self"]


def functions_with_named_parameters() -> list:
    found = []
    owners = [
        ("", _core, STUBBED),
        *((f"{c}.", getattr(_core, c), stub_members(STUBBED[c].body)) for c in CLASSES if c in STUBBED),
    ]
    for prefix, owner, stubs in owners:
        for name, value in vars(owner).items():
            if is_public(name) and callable(value) and isinstance(stubs.get(name), ast.FunctionDef):
                names = parameters_of(value)
                if names:
                    found.append(pytest.param(names, stubs[name], id=prefix + name))
    return found


@pytest.mark.parametrize(("built", "stub"), functions_with_named_parameters())
def test_parameters_have_the_names_of_the_stub(built, stub):
    assert built == stubbed_parameters(stub)


# What mypy cannot see of any class that pybind11 makes: its metaclass, its buffer protocol, its mark on enums, and
# a constructor that only says it takes anything.
PYBIND11_ARTEFACTS = [rf"tq_hb\._core\.{name}(\.__buffer__|\.__init__|\.__pybind11_native_enum__)?" for name in CLASSES]


def test_mypy_agrees(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    allowed = tmp_path / "allowed.txt"
    allowed.write_text("\n".join(PYBIND11_ARTEFACTS))
    command = [
        sys.executable,
        "-m",
        "mypy.stubtest",
        "tq_hb._core",
        "--allowlist",
        allowed,
        "--ignore-unused-allowlist",
    ]

    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    assert run.returncode == 0, run.stdout
