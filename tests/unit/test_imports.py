"""Dependencies point one way: between the layers of the C++ core, between the Python modules, and outward."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tq_hb

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PACKAGE = Path(tq_hb.__file__).resolve().parent

# A module may import those before it, and its neighbours of the same layer.
PYTHON_LAYERS = (
    "_core",
    "options",
    "policy",
    "gpu_arrays",
    "interop",
    "encoder",
    "device",
    "staging",
    "transforms",
    "codec",
    "ops",
    "visibility",
    "cache_format",
    "attention_call",
    "states",
    "file_header",
    "files",
    "cache",
    "batch",
    "integrations",
    "cli",
)
BACKENDS = ("cpu", "metal", "cuda")
# Folder of csrc -> folders whose headers it may include. "registry" is the pair of files beside them.
CPP_LAYERS = {
    "core": {"core"},
    **{backend: {"core", backend} for backend in BACKENDS},
    "registry": {"core", "registry", *BACKENDS},
    "bind": {"core", "registry", "bind", *BACKENDS},
}

needs_sources = pytest.mark.skipif(not CSRC.is_dir(), reason="the C++ sources are not beside the tests")


def python_imports(path: Path) -> list[str]:
    """First component below ``tq_hb`` of everything of ours that a module imports, wherever it does so."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("tq_hb.")]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "tq_hb":
            found += [alias.name for alias in node.names if alias.name in PYTHON_LAYERS]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("tq_hb."):
            found.append(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            raise AssertionError(f"{path}: relative imports hide the direction of a dependency")
    return found


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in ("__init__.py", "__main__.py")
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_python_modules_import_downwards(path):
    assert layer_of(path) in PYTHON_LAYERS, "a new module needs its place in PYTHON_LAYERS"
    position = PYTHON_LAYERS.index(layer_of(path))
    upwards = {name for name in python_imports(path) if PYTHON_LAYERS.index(name) > position}
    assert not upwards


def cpp_files() -> list[Path]:
    suffixes = {".h", ".cpp", ".mm", ".metal", ".cu", ".cuh"}
    return sorted(path for path in CSRC.rglob("*") if path.suffix in suffixes) if CSRC.is_dir() else []


def includes(path: Path) -> list[str]:
    return re.findall(r"^\s*#\s*(?:include|import)\s*[<\"]([^>\"]+)[>\"]", path.read_text(), re.MULTILINE)


def cpp_layer(relative: str) -> str:
    first = relative.split("/")[0]
    return "registry" if first.startswith("registry.") else first


@needs_sources
@pytest.mark.parametrize("path", cpp_files(), ids=lambda path: str(path.relative_to(CSRC)))
def test_cpp_files_include_downwards(path):
    layer = cpp_layer(str(path.relative_to(CSRC)))
    ours = [name for name in includes(path) if (CSRC / name).exists() or (path.parent / name).exists()]
    # A neighbour may be named without its folder.
    layers = {cpp_layer(name) if (CSRC / name).exists() else layer for name in ours}
    assert layers <= CPP_LAYERS[layer]


@needs_sources
def test_only_bind_knows_python():
    knowing = {
        cpp_layer(str(p.relative_to(CSRC))) for p in cpp_files() for n in includes(p) if re.match("pybind11|Python", n)
    }
    assert knowing == {"bind"}


@needs_sources
def test_the_core_reads_no_environment_and_starts_no_threads():
    for path in cpp_files():
        if cpp_layer(str(path.relative_to(CSRC))) == "core":
            assert not re.search(r"\bgetenv\b|std::thread\b|\bpthread_", path.read_text()), path


def imported_by(statement: str) -> set[str]:
    """Top-level packages, beyond the standard library, that a fresh interpreter loads for a statement."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)


def test_importing_the_package_imports_numpy_only():
    third_party = imported_by("import tq_hb") - imported_by("import numpy")
    assert {name for name in third_party if not name.startswith("_")} == {"tq_hb"}


def test_using_the_package_imports_numpy_only():
    use = "import numpy as np, tq_hb; c, x = tq_hb.KVCache(1, 256), np.ones((1, 256)); c.append(x, x); c.attend(x)"
    third_party = imported_by(use) - imported_by("import numpy")
    assert {name for name in third_party if not name.startswith("_")} == {"tq_hb"}


@pytest.mark.parametrize("missing", ["torch", "transformers", "transformers.masking_utils"])
def test_the_adapter_says_what_to_install(missing):
    for library in ("torch", "transformers"):
        if library != missing:
            pytest.importorskip(library)
    code = f"import sys; sys.modules[{missing!r}] = None; import tq_hb.integrations.transformers"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = run.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: tq_hb.integrations.transformers: needs torch and transformers, got ")
    assert "pip install 'tq-hb[transformers]'" in last
    assert "The above exception was the direct cause" in run.stderr


def test_public_names_are_those_of_all():
    public = {name for name in vars(tq_hb) if not name.startswith("_")} - {"annotations"}
    modules = {name for name in public if isinstance(getattr(tq_hb, name), type(sys))}
    assert public - modules == set(tq_hb.__all__) - modules
    assert "policy" in tq_hb.__all__
    assert tq_hb.__version__
