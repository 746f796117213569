"""The command line: what it prints, how it refuses, and that it stays light."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import tolerance
import tq_hb
from tq_hb.cli import bench, info, main
from tq_hb.cli._cases import attention64
from tq_hb.cli._output import commit
from tq_hb.cli._sampling import Timing, buffers_to_stay_cold, sample

SMALL = ["--heads", "4", "--kv-heads", "2", "--kv-len", "70", "--samples", "30", "--no-peers"]


@pytest.fixture(autouse=True)
def _same_threads():
    before = tq_hb.num_threads()
    yield
    tq_hb.set_num_threads(before)


def test_a_report_says_of_which_commit_it_is_and_whether_what_is_built_differs(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    assert commit(tmp_path) is None
    module = tmp_path / "python" / "tq_hb" / "__init__.py"
    module.parent.mkdir(parents=True)
    module.touch()
    assert commit(tmp_path) is None
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    head = git("rev-parse", "HEAD")
    (tmp_path / "notes").touch()
    assert commit(tmp_path) == head
    module.write_text("changed = True\n")
    assert commit(tmp_path) == f"{head} with changes"


def test_info_tells_devices_and_versions(capsys):
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tq_hb"] == tq_hb.__version__
    assert report["isa"] == tq_hb.cpu_isa()
    assert report["libraries"]["numpy"] == np.__version__
    assert {d["backend"]: d["available"] for d in report["devices"]}["cpu"]
    assert all(d["reason"] for d in report["devices"] if not d["available"])


def test_info_prints_every_device(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(device.backend in printed for device in tq_hb.devices())


@pytest.mark.parametrize(
    ("variable", "value"), [("TQ_HB_CPU_ISA", "[none]"), ("TQ_HB_NUM_THREADS", "x"), ("TQ_HB_DEVICE", "nonsense")]
)
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["tables", "json"])
def test_info_shows_a_variable_that_cannot_be_used(variable, value, options):
    command = [sys.executable, "-m", "tq_hb", "info", *options]
    environment = {**os.environ, variable: value, "COLUMNS": "200"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 2
    assert run.stderr == ""
    assert f"{variable} must be " in run.stdout
    assert f"got '{value}'" in run.stdout
    assert tq_hb.__version__ in run.stdout


def test_info_says_in_words_that_a_device_is_simulated(capsys):
    report = info.collect()
    for device in report["devices"]:
        device["is_simulated"] = device["backend"] == "metal"
    info._print_tables(report)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "metal is simulated: runs the Metal sources on this CPU; says nothing about speed"


def test_bench_says_that_timings_of_a_simulated_device_mean_nothing(capsys):
    device = {"backend": "metal", "name": "Simulated Metal", "is_simulated": True}
    machine = {"processor": "some", "isa": "avx2", "threads": 1}
    bench._print_tables({"machine": machine, "device": device, "results": []})
    assert "timings mean nothing" in capsys.readouterr().out
    device["is_simulated"] = False
    bench._print_tables({"machine": machine, "device": device, "results": []})
    assert "nothing" not in capsys.readouterr().out


def test_bench_runs_on_every_device(device, capsys):
    shape = ["--heads", "2", "--kv-heads", "1", "--kv-len", "33", "--samples", "30", "--no-peers"]
    assert main(["bench", *shape, "--op", "attend", "--device", device.backend, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == {
        "backend": device.backend, "name": device.name, "is_simulated": device.is_simulated,
    }  # fmt: skip
    assert report["results"][0]["plan"]["backend"] == device.backend


def test_bench_reports_both_ops(capsys):
    assert main(["bench", *SMALL, "--k-bits", "6", "--json"]) == 0
    attend, append = json.loads(capsys.readouterr().out)["results"]
    assert attend["op"] == "attend"
    assert append["op"] == "append"
    assert attend["plan"]["backend"] == tq_hb.Device("auto").backend
    assert attend["error"]["same_codes"] < tolerance.PRECISION_L2["default"] < attend["error"]["unquantised"]
    (row,) = attend["rows"]
    assert row["nbytes"] == 70 * 2 * 520
    assert row["samples"] == 30
    assert row["lower_us"] <= row["median_us"] <= row["upper_us"]
    assert row["share_of_read"] == pytest.approx(row["nbytes"] / row["median_us"] / 1e3 / attend["read_gb_s"])


def test_bench_takes_peers_of_the_same_shape(capsys):
    pytest.importorskip("torch")
    assert main(["bench", *SMALL[:-1], "--op", "attend", "--threads", "1", "--json"]) == 0
    (attend,) = json.loads(capsys.readouterr().out)["results"]
    sizes = {row["name"]: row["nbytes"] for row in attend["rows"]}
    assert sizes["torch float32"] == 2 * sizes["torch float16"] == 2 * 70 * 2 * 256 * 4


def test_bench_prints_tables(capsys):
    assert main(["bench", *SMALL, "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "1 token" in printed
    for op in ("attend", "append"):  # on one line, however narrow the table
        assert f"\n{op}: heads 4, kv_heads 2, head_dim 256, kv_len 70, k_bits 8, v_bits 8, packing byte\n" in printed


def refused(capsys, command: str, *options: str) -> str:
    """Return what the one line to standard error says."""
    assert main([command, *(SMALL if command == "bench" else ()), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"tq-hb {command}: ")
    return captured.err


@pytest.mark.parametrize("arguments", ["--heads 3", "--device nonsense", "--kv-len 2000000000 --kv-heads 2000000000"])
def test_a_refusal_is_one_line_and_exit_code_2(arguments, capsys):
    refused(capsys, "bench", *arguments.split())


@pytest.mark.parametrize(
    "arguments",
    [
        "bench --heads -1",
        "bench --kv-heads -1",
        "bench --head-dim -1",
        "bench --head-dim 96",
        "bench --kv-len 0",
        "bench --kv-len 99999999999999999999",
        "bench --k-bits 4",
        "bench --v-bits 7",
        "bench --samples 29",
        "bench --threads 0",
        "calibrate tiny --out x --tokens -1",
        "calibrate tiny --out x --context 0",
        "calibrate tiny --out x --threads 2000",
        "gate tiny --tokens 0",
        "gate tiny --threads 0",
        "generate --quick --max-new-tokens 0",
        "generate --quick --max-new-tokens -3",
        "generate --quick --k-bits 4",
        "generate --quick --v-bits -8",
        "generate --quick --seed 99999999999999999999",
    ],
)
def test_a_number_that_an_option_does_not_take_is_refused_by_name(arguments, capsys):
    command, *_, option, value = arguments.split()
    message = refused(capsys, *arguments.split())
    assert message.startswith(f"tq-hb {command}: {option} must be ")
    assert message.endswith(f", got {value}\n")


@pytest.mark.parametrize(
    ("command", "kind", "option"),
    [
        ("calibrate nonsense", "file", "--out"),
        ("gate nonsense", "folder", "--out"),
        ("gate nonsense", "file", "--capture"),
        ("generate --quick", "folder", "--out"),
    ],
)
def test_results_that_cannot_be_written_are_refused_before_they_are_measured(command, kind, option, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.touch()
    out = taken / "new" / "out"
    message = refused(capsys, *command.split(), option, str(out))
    assert f": {option} must be a {kind} that can be written, got {out} (Not a directory)\n" in message
    if kind == "file":
        assert f"got {tmp_path} (it is a folder)\n" in refused(capsys, *command.split(), option, str(tmp_path))
    assert list(tmp_path.iterdir()) == [taken]


def test_a_folder_for_results_need_not_be_there_and_is_not_made_for_a_refusal(tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert "model must be " in refused(capsys, "calibrate", "nonsense", "--out", str(tmp_path / "new" / "means"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError("Unable to allocate 3 TiB")])
def test_what_the_machine_has_no_room_for_is_said_in_a_line(error, monkeypatch, capsys):
    monkeypatch.setattr(info, "collect", lambda: (_ for _ in ()).throw(error))
    assert refused(capsys, "info") == f"tq-hb info: {error}\n"


def test_module_and_command_are_the_same():
    run = subprocess.run([sys.executable, "-m", "tq_hb", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"tq_hb {tq_hb.__version__}\n"


def test_starting_up_imports_no_optional_library():
    code = "import sys, tq_hb.cli; print([m for m in ('rich', 'torch', 'transformers', 'mlx') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_attention64_is_attention():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((6, 8)), rng.standard_normal((5, 3, 8)), rng.standard_normal((5, 3, 8))
    out = attention64(q, k, v)
    for head in range(6):
        weights = np.exp([q[head] @ k[t, head // 2] / np.sqrt(8) for t in range(5)])
        np.testing.assert_allclose(out[head], weights @ v[:, head // 2] / weights.sum(), rtol=1e-12)


def test_calls_take_turns_on_rotating_buffers():
    seen: list[tuple[str, int]] = []
    timings = sample({"a": lambda i: seen.append(("a", i)), "b": lambda i: seen.append(("b", i))}, 30)
    assert {name: timing.samples for name, timing in timings.items()} == {"a": 30, "b": 30}
    for name in "ab":
        assert [i for n, i in seen if n == name] == list(range(sum(n == name for n, _ in seen)))
    rounds = [name for name, _ in seen][6:]
    assert rounds.index("b") < len(rounds) - rounds[::-1].index("a")


def test_rates_and_buffer_counts():
    timing = Timing(median_us=2.0, lower_us=1.0, upper_us=3.0, samples=30, calls_per_sample=1)
    assert timing.gb_s(4000) == pytest.approx(2.0)
    assert buffers_to_stay_cold(1 << 40) == 2
    assert buffers_to_stay_cold(1) > 100
