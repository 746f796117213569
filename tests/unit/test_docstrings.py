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
# What users call outside tq_hb itself, and what the libraries are that it needs.
EXAMPLE_MODULES = {
    "tq_hb.policy": (),
    **{f"tq_hb.cli{name}": ("rich",) for name in ("", ".bench", ".calibrate", ".gate", ".generate", ".info")},
    **{
        f"tq_hb.integrations.{name}": ("torch", "transformers") for name in ("attention", "cache_layer", "transformers")
    },
}
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


def has_example(documented: object) -> bool:
    return bool(doctest.DocTestParser().get_examples(inspect.getdoc(documented) or ""))


def members_without_example(cls: type) -> list[str]:
    """Public methods and properties that the class itself defines and whose docstrings have no example."""
    class_examples = "".join(e.source + e.want for e in doctest.DocTestParser().get_examples(inspect.getdoc(cls) or ""))
    missing = []
    for member, attribute in vars(cls).items():
        kinds = property | staticmethod | classmethod
        if member.startswith("_") or not (callable(attribute) or isinstance(attribute, kinds)):
            continue
        # Fields that can be set are made from a list; the example of their class shows each.
        is_field = isinstance(attribute, property) and attribute.fset is not None
        if not (f"{member}=" in class_examples if is_field else has_example(attribute)):
            missing.append(member)
    return missing


@pytest.mark.parametrize("name", [n for n in CALLABLES if inspect.isclass(getattr(tq_hb, n))])
def test_public_members_have_docstrings_with_examples(name):
    assert not members_without_example(getattr(tq_hb, name))


@pytest.mark.parametrize("module", EXAMPLE_MODULES)
def test_public_names_of_the_module_and_their_members_have_examples_that_run(module):
    for library in EXAMPLE_MODULES[module]:
        pytest.importorskip(library)
    loaded = importlib.import_module(module)
    own = {
        name: value
        for name, value in vars(loaded).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module
    }
    assert own
    missing = [name for name, value in own.items() if not has_example(value)]
    for name, value in own.items():
        if inspect.isclass(value):
            missing += [f"{name}.{member}" for member in members_without_example(value)]
    assert not missing
    for test in FINDER.find(loaded, module):
        run(test)


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_the_module_run(module):
    loaded = importlib.import_module(module)
    assert (loaded.__doc__ or "").strip()
    for test in FINDER.find(loaded, module):
        run(test)
