"""Every public function, class and method explains itself, and its example runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import numpy as np
import pytest

import tq_hb

# Modules whose public names a caller is meant to use without further libraries.
MODULES = [
    "tq_hb",
    *(f"tq_hb.{m.name}" for m in pkgutil.iter_modules(tq_hb.__path__) if not m.name.startswith("_") and not m.ispkg),
]
CALLABLES = sorted(
    name
    for name in tq_hb.__all__
    if callable(getattr(tq_hb, name)) and not isinstance(getattr(tq_hb, name), type(tq_hb))
)
FINDER = doctest.DocTestFinder(exclude_empty=True)


def examples_of(name: str) -> list[doctest.DocTest]:
    """Doctests of a public name and, for a class, of its members."""
    return [test for test in FINDER.find(getattr(tq_hb, name), f"tq_hb.{name}", module=False) if test.examples]


def run(test: doctest.DocTest) -> None:
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert result.failed == 0, "".join(report)


@pytest.mark.parametrize("name", CALLABLES)
def test_public_name_has_a_docstring_with_an_example_that_runs(name):
    value = getattr(tq_hb, name)
    assert (value.__doc__ or "").strip()
    examples = examples_of(name)
    assert examples or issubclass(value, Exception), f"tq_hb.{name} has no example"
    for test in examples:
        test.globs = {"np": np, "tq_hb": tq_hb}
        run(test)


@pytest.mark.parametrize("name", [n for n in CALLABLES if inspect.isclass(getattr(tq_hb, n))])
def test_public_methods_have_docstrings(name):
    value = getattr(tq_hb, name)
    undocumented = [
        member
        for member, attribute in vars(value).items()
        if not member.startswith("_")
        # Fields that can be set are explained by the class.
        and (callable(attribute) or (isinstance(attribute, property) and attribute.fset is None))
        and not (attribute.__doc__ or "").strip()
    ]
    assert not undocumented


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_the_module_run(module):
    loaded = importlib.import_module(module)
    assert (loaded.__doc__ or "").strip()
    for test in FINDER.find(loaded, module):
        run(test)
