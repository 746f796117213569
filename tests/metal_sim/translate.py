#!/usr/bin/env python3
"""Translates Metal shading language to C++, and checks it.

translate.py run IN OUT     writes the C++ that the simulator compiles, after every check
translate.py check FILE...  only checks: what Metal has not, the encoders' rules, address spaces
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from translator.encoders import contracted_sums
from translator.lint import lint
from translator.rewrite import rewrite
from translator.structure import parse
from translator.tokens import TranslationError, read

HERE = Path(__file__).resolve().parent
METAL_VERSION = 310
# Metal 3 is C++14; the shim, a system header here, may use more.
TYPE_CHECK_FLAGS = [
    "-std=c++14",
    "-fsyntax-only",
    "-nostdinc",
    "-nostdinc++",
    "-isystem",
    str(HERE / "include"),
    "-DMETAL_SIM_TYPE_CHECK",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-Wno-unused-parameter",
    "-Wno-unused-const-variable",
    "-Wno-undefined-internal",
    "-Werror",
]


def find_compiler() -> str:
    names = [f"clang++-{version}" for version in (19, 20, 21, 18, 17, 16)]
    return next((path for name in names if (path := shutil.which(name))), "clang++")


def preprocess(path: Path, compiler: str, include: list[str]) -> str:
    command = [compiler, "-E", "-x", "c++", "-std=c++17", "-undef", "-nostdinc", "-nostdinc++"]
    command += ["-I", str(HERE / "macros"), *(f"-I{folder}" for folder in include)]
    command += [f"-D__METAL_VERSION__={METAL_VERSION}", "-D__METAL__=1", str(path)]
    return _compiler_output(command, None)


def translate(preprocessed: str) -> str:
    program = parse(read(preprocessed))
    lint(program)
    return rewrite(program)


def type_check(translated: str, compiler: str) -> None:
    _compiler_output([compiler, *TYPE_CHECK_FLAGS, "-x", "c++", "-"], translated)


def check_contraction(translated: str, compiler: str) -> None:
    command = [compiler, "-std=c++17", "-O0", "-gline-tables-only", "-w", "-nostdinc", "-nostdinc++"]
    command += ["-isystem", str(HERE / "include"), "-ffp-contract=fast-honor-pragmas"]
    command += ["-S", "-emit-llvm", "-x", "c++", "-", "-o", "-"]
    if places := contracted_sums(_compiler_output(command, translated)):
        rule = "error: part of an encoder: a sum that no pragma keeps from fusing with a product"
        raise TranslationError("\n".join(f"{place}: {rule}" for place in places))


def _compiler_output(command: list[str], text: str | None) -> str:
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise TranslationError(result.stderr.rstrip())
    return result.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", default=find_compiler())
    parser.add_argument("-I", dest="include", action="append", default=[], metavar="FOLDER")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("input", type=Path)
    run.add_argument("output", type=Path)
    check = commands.add_parser("check")
    check.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()

    failed = False
    for path in [options.input] if options.command == "run" else options.files:
        try:
            translated = translate(preprocess(path, options.compiler, options.include))
            type_check(translated, options.compiler)
            if options.command == "run":
                options.output.write_text(translated)
            else:
                check_contraction(translated, options.compiler)
        except TranslationError as error:
            print(error, file=sys.stderr)
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
