"""Seeds the faults of ``mutants.toml`` in the sources, one at a time, and shows which test catches each.

Works on copies of the tree under ``build/mutants``: builds one, puts the extension beside its Python sources and runs
the tests there. What it finds goes into ``docs/mutants.md``, where the rows of faults that were not chosen stay as
they are. It fails if a fault is not caught, does not compile, or replaces a text that is no longer there.

    python tests/mutants/run.py [--jobs N] [WORD ...]      only faults with one of the words in their name or file
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "docs" / "mutants.md"

# Cheapest first; a fault that one catches is not shown to the next.
PYTHON_SUITES = ("tests/conformance", "tests/metal", "tests/unit", "tests/property")
# Which fails with any fault, since it looks for the texts that are replaced.
OF_FAULTS = "--ignore=tests/unit/test_mutants.py"
SUITE_LIMIT_S = 900

NOT_CAUGHT = "**none**"
DOES_NOT_BUILD = "**does not build**"
NOT_RUN = "not run yet"


@dataclass(frozen=True)
class Mutant:
    """One fault: `old` stands exactly once in `file`, and becomes `new`."""

    name: str
    file: str
    old: str
    new: str

    def text(self) -> str:
        """Return the file with the fault."""
        text = (ROOT / self.file).read_text()
        if text.count(self.old) != 1:
            sys.exit(f"{self.name}: {self.file} has the text to replace {text.count(self.old)} times, not once")
        return text.replace(self.old, self.new)


class BuildError(Exception):
    """A copy cannot be built; the message is what the compiler says."""


class Copy:
    """A copy of the tree and its build, in which one fault is tried at a time."""

    def __init__(self, number: int, cores: int) -> None:
        self._tree = ROOT / "build" / "mutants" / str(number) / "tree"
        self._build = self._tree.with_name("cmake")
        self._cores = str(cores)
        self._bring_up_to_date()

    def _bring_up_to_date(self) -> None:
        """Touch only files that differ, so that the build stays incremental."""
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
        for name in filter(None, names):
            source, target = ROOT / name, self._tree / name
            if not source.is_file():
                target.unlink(missing_ok=True)
            elif not (target.is_file() and filecmp.cmp(source, target, shallow=False)):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def failure_with(self, mutant: Mutant) -> str | None:
        """Return the first test that fails with the fault, or None if all pass."""
        (self._tree / mutant.file).write_text(mutant.text())
        try:
            return self.first_failure()
        finally:
            shutil.copyfile(ROOT / mutant.file, self._tree / mutant.file)

    def first_failure(self) -> str | None:
        """Build the copy and return the first test that fails, or None if all pass.

        The C++ tests take longest to build, so that is left until no Python test has failed.
        """
        self.build("_core")
        failure = self._python_failure()
        if failure is None:
            self.build("all")
            failure = self._ctest_failure()
        return failure

    def build(self, target: str) -> None:
        """Configure once, build, and install the extension beside the copy's Python sources."""
        if not (self._build / "build.ninja").exists():
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
            configured = self._run(
                tool("cmake"), "-S", str(self._tree), "-B", str(self._build), "-G", "Ninja", *definitions
            )
            if configured.returncode != 0:
                raise BuildError(configured.stdout + configured.stderr)
        built = self._run(tool("cmake"), "--build", str(self._build), "--target", target, "--parallel", self._cores)
        if built.returncode != 0:
            raise BuildError(built.stdout)
        extension = f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
        shutil.copyfile(self._build / extension, self._tree / "python" / "tq_hb" / extension)

    def _python_failure(self) -> str | None:
        """Return the first Python test that fails."""
        for suite in PYTHON_SUITES:
            if not (self._tree / suite).is_dir():
                continue
            tested = self._run(sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", OF_FAULTS, suite)
            if tested.returncode != 0:
                failed = re.search(r"^(?:FAILED|ERROR) ([^\s\[]+)", tested.stdout, re.MULTILINE)
                return failed[1] if failed else f"{suite}, which ended with exit code {tested.returncode}"
        return None

    def _ctest_failure(self) -> str | None:
        """Return the first C++ test that fails."""
        tested = self._run(tool("ctest"), "--test-dir", str(self._build), "--stop-on-failure")
        if tested.returncode == 0:
            return None
        failed = re.search(r"^\s*\d+ - (\S+) \(", tested.stdout, re.MULTILINE)
        return failed[1] if failed else "ctest"

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the copy; one that hangs counts as failed, and what it wrote is kept."""
        environment = {**os.environ, "PYTHONPATH": str(self._tree / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            return subprocess.run(
                command, cwd=self._tree, env=environment, capture_output=True, text=True, timeout=SUITE_LIMIT_S
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, returncode=-1, stdout="")


def main() -> None:
    """Run the faults that the arguments select."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--jobs", type=int, default=1, help="faults that are tried at the same time, on a copy each")
    arguments = parser.parse_args()

    entries = tomllib.loads(Path(__file__).with_name("mutants.toml").read_text())["mutant"]
    mutants = [Mutant(**entry) for entry in entries]
    for mutant in mutants:
        mutant.text()
    chosen = [m for m in mutants if not arguments.words or any(word in m.name + m.file for word in arguments.words)]
    cores = max(1, (os.cpu_count() or 1) // arguments.jobs)
    copies = [Copy(number, cores) for number in range(arguments.jobs)]
    free: SimpleQueue[Copy] = SimpleQueue()
    for copy in copies:
        free.put(copy)

    def outcome(mutant: Mutant) -> str:
        copy = free.get()
        try:
            failure = copy.failure_with(mutant)
        except BuildError as error:
            print(f"{mutant.name}:\n{error}", file=sys.stderr)
            return DOES_NOT_BUILD
        finally:
            free.put(copy)
        return f"`{failure}`" if failure else NOT_CAUGHT

    found: dict[str, str] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        print("building and testing without a fault", flush=True)
        sound = pool.submit(copies[0].first_failure)
        list(pool.map(lambda copy: copy.build("all"), copies[1:]))
        if (failure := sound.result()) is not None:
            sys.exit(f"the suite fails without a fault: {failure}")
        for number, (mutant, what) in enumerate(zip(chosen, pool.map(outcome, chosen), strict=True), 1):
            found[mutant.name] = what
            write_report(mutants, found)
            print(f"[{number}/{len(chosen)}] {mutant.name}: {what}", flush=True)

    missed = sum(what in (NOT_CAUGHT, DOES_NOT_BUILD) for what in found.values())
    print(f"{len(found) - missed} caught, {missed} not caught")
    sys.exit(missed > 0)


def tool(name: str) -> str:
    """Return the path of a build tool, the one beside this Python first."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return path or sys.exit(f"{name} is not installed")


def write_report(mutants: list[Mutant], found: dict[str, str]) -> None:
    """Bring the table of faults and the tests that caught them up to date."""
    before = re.findall(r"^\| (.*) \| `.*` \| (.*) \|$", REPORT.read_text(), re.MULTILINE)
    results = {**dict(before), **found}
    lines = [
        "# Seeded faults",
        "",
        "`make mutants` puts these faults into the sources, one at a time, and runs the tests until one fails. A fault",
        "that no test catches is a hole in the tests. A row has what came of the fault's own last run, also where",
        f'later runs left it out; "{NOT_RUN}" is one that no run has tried. Faults outside `csrc/metal` may have been',
        "tried in a build without Metal.",
        "",
        "| fault | file | first test that failed |",
        "| --- | --- | --- |",
        *(f"| {m.name} | `{m.file}` | {results.get(m.name, NOT_RUN)} |" for m in mutants),
    ]
    REPORT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
