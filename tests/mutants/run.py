"""Seeds the faults of ``mutants.toml`` in the sources, one at a time, and shows which test catches each.

Works on a copy of the tree under ``build/mutants``: builds it, puts the extension beside its Python sources and runs
the tests there. What it finds goes into ``docs/mutants.md``, where the rows of faults that were not chosen stay as
they are. It fails if a fault is not caught, does not compile, or replaces a text that is no longer there.

    python tests/mutants/run.py [NAME ...]      only the faults whose names contain one of the words
"""

from __future__ import annotations

import argparse
import filecmp
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "mutants" / "tree"
BUILD = ROOT / "build" / "mutants" / "cmake"
REPORT = ROOT / "docs" / "mutants.md"

# Cheapest first; a fault that one catches is not shown to the next.
PYTHON_SUITES = ("tests/conformance", "tests/metal", "tests/unit", "tests/property")
SUITE_LIMIT_S = 900


@dataclass(frozen=True)
class Mutant:
    """One fault: `old` stands exactly once in `file`, and becomes `new`."""

    name: str
    file: str
    old: str
    new: str

    def apply(self) -> None:
        """Put the fault into the copy."""
        path = TREE / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            sys.exit(f"{self.name}: {self.file} has the text to replace {text.count(self.old)} times, not once")
        path.write_text(text.replace(self.old, self.new))

    def undo(self) -> None:
        """Take the fault out again."""
        shutil.copyfile(ROOT / self.file, TREE / self.file)


def main() -> None:
    """Run the faults that the arguments select."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="NAME")
    words = parser.parse_args().words

    entries = tomllib.loads(Path(__file__).with_name("mutants.toml").read_text())["mutant"]
    mutants = [Mutant(**entry) for entry in entries]
    chosen = [m for m in mutants if not words or any(word in m.name for word in words)]
    copy_tree()
    for mutant in mutants:
        mutant.apply()
        mutant.undo()
    print("building and testing without a fault", flush=True)
    if (failure := first_failure()) is not None:
        sys.exit(f"the suite fails without a fault: {failure}")

    caught: list[tuple[Mutant, str | None]] = []
    for number, mutant in enumerate(chosen, 1):
        mutant.apply()
        failure = first_failure()
        mutant.undo()
        caught.append((mutant, failure))
        print(f"[{number}/{len(chosen)}] {mutant.name}: {failure or 'NOT CAUGHT'}", flush=True)

    write_report(mutants, caught)
    missed = sum(failure is None for _, failure in caught)
    print(f"{len(caught) - missed} caught, {missed} not caught")
    sys.exit(missed > 0)


def copy_tree() -> None:
    """Bring the copy up to date, touching only files that differ, so that the build stays incremental."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        source, target = ROOT / name, TREE / name
        if not source.is_file():
            target.unlink(missing_ok=True)
        elif not (target.is_file() and filecmp.cmp(source, target, shallow=False)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def first_failure() -> str | None:
    """Build the copy and return the first test that fails, or None if all pass.

    The C++ tests take longest to build, so that is left until no Python test has failed.
    """
    build("_core")
    failure = python_failure()
    if failure is None:
        build("all")
        failure = ctest_failure()
    return failure


def build(target: str) -> None:
    """Configure once, build, and install the extension beside the copy's Python sources."""
    if not (BUILD / "build.ninja").exists():
        pybind11 = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INTERPROCEDURAL_OPTIMIZATION": "OFF",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.stdout.strip(),
            "TQ_HB_PYTHON": "ON",
            "TQ_HB_BUILD_TESTS": "ON",
            "TQ_HB_METAL": "apple" if sys.platform == "darwin" else "simulator",
        }
        definitions = [f"-D{key}={value}" for key, value in options.items()]
        subprocess.run([tool("cmake"), "-S", TREE, "-B", BUILD, "-G", "Ninja", *definitions], check=True)
    built = run(tool("cmake"), "--build", str(BUILD), "--target", target)
    if built.returncode != 0:
        sys.exit(f"the copy does not build:\n{built.stdout}")
    extension = f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    shutil.copyfile(BUILD / extension, TREE / "python" / "tq_hb" / extension)


def python_failure() -> str | None:
    """Return the first Python test that fails."""
    for suite in PYTHON_SUITES:
        if not (TREE / suite).is_dir():
            continue
        tested = run(sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", suite)
        if tested.returncode != 0:
            failed = re.search(r"^(?:FAILED|ERROR) ([^\s\[]+)", tested.stdout, re.MULTILINE)
            return failed[1] if failed else f"{suite}, which ended with exit code {tested.returncode}"
    return None


def ctest_failure() -> str | None:
    """Return the first C++ test that fails."""
    tested = run(tool("ctest"), "--test-dir", str(BUILD), "--stop-on-failure")
    if tested.returncode == 0:
        return None
    failed = re.search(r"^\s*\d+ - (\S+) \(", tested.stdout, re.MULTILINE)
    return failed[1] if failed else "ctest"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command on the copy; one that hangs counts as failed, and what it wrote is kept."""
    environment = {**os.environ, "PYTHONPATH": str(TREE / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, timeout=SUITE_LIMIT_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, returncode=-1, stdout="")


def tool(name: str) -> str:
    """Return the path of a build tool, the one beside this Python first."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return path or sys.exit(f"{name} is not installed")


def write_report(mutants: list[Mutant], caught: list[tuple[Mutant, str | None]]) -> None:
    """Bring the table of faults and the tests that caught them up to date."""
    before = re.findall(r"^\| (.*) \| `.*` \| (.*) \|$", REPORT.read_text(), re.MULTILINE)
    results = {**dict(before), **{m.name: f"`{failure}`" if failure else "**none**" for m, failure in caught}}
    lines = [
        "# Seeded faults",
        "",
        "`make mutants` puts these faults into the sources, one at a time, and runs the tests until one fails; it",
        "wrote this table. A fault that no test catches is a hole in the tests.",
        "",
        "| fault | file | first test that failed |",
        "| --- | --- | --- |",
        *(f"| {m.name} | `{m.file}` | {results.get(m.name, 'not run yet')} |" for m in mutants),
    ]
    REPORT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
