"""The library as a part of another CMake project."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = f"""
cmake_minimum_required(VERSION 3.25)
project(consumer LANGUAGES CXX)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(TQ_HB_METAL off)
set(TQ_HB_WERROR ON)
add_subdirectory("{ROOT}" tq_hb)
add_executable(consumer consumer.cpp)
target_link_libraries(consumer PRIVATE tq_hb)
"""


def test_projects_that_link_the_library_choose_their_own_warnings(tmp_path):
    found = shutil.which("cmake", path=Path(sys.executable).parent) or shutil.which("cmake")
    if found is None:
        pytest.skip("cmake is not installed")
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    (tmp_path / "consumer.cpp").write_text("int main() {}\n")
    ninja = shutil.which("ninja", path=Path(sys.executable).parent)
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []

    subprocess.run([found, "-S", tmp_path, "-B", tmp_path / "build", *generator], check=True, capture_output=True)

    commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    warnings = {
        Path(entry["file"]).name: [word for word in entry["command"].split() if word.startswith("-W")]
        for entry in commands
    }
    assert warnings["consumer.cpp"] == []
    assert {"-Wall", "-Wextra", "-Wconversion", "-Werror"} <= set(warnings["params.cpp"])
