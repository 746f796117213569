"""Where benchmarks write, and what they refuse to write over."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import harness, tables

import tq_hb


def parse(monkeypatch, *arguments: str, partial: bool = False):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    parser = harness.measuring_parser("bench.cpu", "What it costs.", samples=30)
    return harness.parse(parser, is_partial=lambda _: partial)


def test_results_go_to_the_folder_that_documents_show():
    assert harness.RESULTS == harness.ROOT / "bench" / "results"


def test_results_go_where_they_are_asked_to(monkeypatch, tmp_path):
    out = parse(monkeypatch, "--samples", "3", "--out", str(tmp_path / "new")).out
    harness.write("cpu", [{"op": "attend"}], out)

    report = harness.read("cpu", tmp_path / "new")
    assert report["results"] == [{"op": "attend"}]
    assert report["command"].startswith("python -m bench.cpu --samples 3 --out ")
    assert report["path"] == str(tmp_path / "new" / "cpu.json")


@pytest.mark.parametrize(
    ("arguments", "partial"),
    [(["--samples", "14"], False), ([], True), (["--samples", "14", "--out", str(harness.RESULTS)], False)],
    ids=["few samples", "some shapes", "named"],
)
def test_a_short_run_replaces_no_results(arguments, partial, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(monkeypatch, *arguments, partial=partial)

    assert "name another folder, as in --out build/bench" in capsys.readouterr().err


def test_what_was_measured_is_shown_as_in_the_documents(monkeypatch, tmp_path, capsys):
    def ops(report):
        """Return what was measured."""
        return "| op |\n| --- |\n" + "".join(f"| {result['op']} |\n" for result in report["results"])

    harness.finish("cpu", [{"op": "attend"}], tmp_path, ops)

    printed = capsys.readouterr().out
    assert printed.startswith("What was measured.")
    assert "attend" in printed
    assert "|" not in printed
    assert printed.endswith(f"{tmp_path / 'cpu.json'}\n")


@pytest.mark.parametrize("samples", ["0", "1", "-3", "many"])
def test_too_few_samples_for_quartiles_are_refused(samples, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(monkeypatch, f"--samples={samples}")

    assert f"argument --samples: must be a number of at least 2, got '{samples}'" in capsys.readouterr().err


@pytest.mark.parametrize("error", [tq_hb.DeviceError, tq_hb.InvalidArgument, ModuleNotFoundError])
def test_what_the_machine_does_not_allow_is_said_in_a_line(error, capsys):
    def main() -> None:
        raise error("cuda is not available")

    with pytest.raises(SystemExit, match="2"):
        harness.run("bench.cpu", main)

    assert capsys.readouterr().err == "python -m bench.cpu: cuda is not available\n"


def test_a_file_is_no_folder_for_results(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()

    with pytest.raises(SystemExit, match="2"):
        parse(monkeypatch, "--out", str(tmp_path / "file"))

    assert "argument --out: " in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(harness.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_have_the_samples_that_a_new_run_needs(path, monkeypatch):
    command = json.loads(path.read_text()).get("command", "")
    samples = re.findall(r"--samples \d+", command)

    assert parse(monkeypatch, *" ".join(samples).split()).out == harness.RESULTS


@pytest.mark.parametrize("name", tables.PLOTS)
def test_plots_are_drawn_from_the_results(name):
    pytest.importorskip("matplotlib")

    assert tables.PLOTS[name](harness.read(name)).startswith(b"\x89PNG")


def test_a_run_without_matplotlib_has_its_results_all_the_same(tmp_path, capsys):
    def plot(report):
        raise ModuleNotFoundError("No module named 'matplotlib'")

    harness.finish("cpu", [], tmp_path, plot=plot)

    assert capsys.readouterr().err == "no plot: No module named 'matplotlib'\n"
    assert harness.read("cpu", tmp_path)["results"] == []


def test_results_are_kept_where_there_is_no_git_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "ROOT", tmp_path)

    harness.finish("cpu", [], tmp_path)

    assert harness.read("cpu", tmp_path)["commit"] is None
