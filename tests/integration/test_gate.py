"""``tq-hb gate`` and ``tq-hb calibrate``: the replay runs on codes, broken codecs fail, identity passes."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

sys.path.insert(0, str(Path(__file__).resolve().parent))  # models

from models import KINDS, make_model, make_tokens  # noqa: E402

import reference  # noqa: E402
import tq_hb  # noqa: E402
from tq_hb.cli import main  # noqa: E402
from tq_hb.cli._gate_caches import Decoded, FloatCache, Layer, Widths, attention_weights, weigh  # noqa: E402
from tq_hb.cli._gate_capture import capture, load_capture, measure_capture, save_capture  # noqa: E402
from tq_hb.cli._gate_replay import FLOAT32, SAMPLED_EVERY, layers_of, replay, replay_reference  # noqa: E402
from tq_hb.cli._gate_report import _make_room  # noqa: E402
from tq_hb.cli._gate_run import ModelJob, smallest  # noqa: E402
from tq_hb.cli._gate_scores import score  # noqa: E402
from tq_hb.cli._gate_stats import GATES, OURS  # noqa: E402
from tq_hb.cli._gate_store import Store  # noqa: E402
from tq_hb.cli._gate_texts import needle_text, own_texts, user_text  # noqa: E402
from tq_hb.cli._models import make_tiny  # noqa: E402
from tq_hb.integrations.calibration import Calibration  # noqa: E402

# More than a chunk, so that queries meet a filled cache, and more than four windows of the tiny models.
LENGTH = 300
CHUNK = 64

# Logits of the tiny models have a magnitude of a few units, and float32 gives about 1e-6 of that.
LOGIT_ATOL = 1e-4


def ignore(*_):
    pass


@pytest.fixture(autouse=True)
def _same_threads():
    before = tq_hb.num_threads(), torch.get_num_threads()
    yield
    tq_hb.set_num_threads(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture(scope="module")
def tiny():
    return make_tiny()


@pytest.fixture(scope="module")
def text(tiny):
    return own_texts(tiny.tokenizer, LENGTH)[2]


@pytest.fixture
def job(tiny, text, tmp_path):
    return ModelJob(tiny, [text], Store(tmp_path))


# --- the replay --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [CHUNK, 1000])
def test_the_reference_predicts_what_the_library_does(kind, chunk):
    model, tokens = make_model(kind), make_tokens(150)
    hidden = replay_reference(model, tokens, ignore, chunk=chunk).hidden
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        want = model(tokens, use_cache=False).logits[0]
        got = model.get_output_embeddings()(torch.from_numpy(hidden))
        softcap = getattr(model.config, "final_logit_softcapping", None)
        got = got if softcap is None else softcap * torch.tanh(got / softcap)
    torch.testing.assert_close(got, want, atol=LOGIT_ATOL, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_measures_every_layer_on_codes(kind):
    model, tokens = make_model(kind), make_tokens(150)
    unquantised = replay_reference(model, tokens, ignore, chunk=CHUNK)
    done = [replay(model, tokens, Widths(b, b), unquantised, ignore, chunk=CHUNK) for b in (8, 5)]
    layers = layers_of(model)
    for each in done:
        assert each.attention.cosine.shape == (len(layers), 150 // SAMPLED_EVERY)
        assert any("flash_attn_vec_tq_hb" in kernel for kernel in each.kernels)
        assert (each.attention.variation >= 0).all()
        assert (each.attention.variation <= 1).all()
    eight, five = (each.attention for each in done)
    assert 0.99 < five.cosine.mean() < eight.cosine.mean() < 1
    assert five.run_cosine.mean() < eight.run_cosine.mean() < 1
    assert eight.variation.mean() < five.variation.mean()
    assert done[0].bytes_per_token == sum(layer.kv_heads * (2 * layer.head_dim + norms(layer)) for layer in layers)


def norms(layer: Layer) -> int:
    return 2 * 4 * max(1, layer.head_dim // 256)


def test_the_first_token_is_on_codes_too(tiny, text):
    """With a codec that gives zeros for every value, what attention says of any position, the first too, is gone."""
    nothing = Decoded("zeros", 0, np.zeros_like)
    unquantised = replay_reference(tiny.model, text.tokens, ignore)
    done = replay(tiny.model, text.tokens, nothing, unquantised, ignore)
    assert (done.attention.cosine == 0).all()
    assert not np.allclose(done.hidden[0], unquantised.hidden[0], atol=1e-3)


def test_several_tokens_at_a_time_are_as_one_at_a_time(tiny, text):
    tokens = text.tokens[:, :100]
    hidden = {}
    for chunk in (1, 100):
        unquantised = replay_reference(tiny.model, tokens, ignore, chunk=chunk)
        hidden[chunk] = replay(tiny.model, tokens, Widths(6, 6), unquantised, ignore, chunk=chunk).hidden
    # The rounding of the products themselves may move a value over a boundary, to another code.
    np.testing.assert_allclose(hidden[1], hidden[100], atol=2e-2)


class Pretender(Widths):
    """Says that it runs on codes, and doesn't."""

    def make_cache(self, layer, first_keys, chunk):
        return FloatCache(layer, chunk)


def test_a_setting_that_did_not_run_on_codes_is_an_error(tiny, text):
    unquantised = replay_reference(tiny.model, text.tokens, ignore)
    with pytest.raises(RuntimeError, match=r"8/8: layer 0 never attended on codes"):
        replay(tiny.model, text.tokens, Pretender(8, 8), unquantised, ignore)


def test_exceptions_get_8_bits_and_the_others_do_not(tiny):
    layers = layers_of(tiny.model)
    keys = torch.zeros(1, 1, 256)
    setting = Widths(5, 6, exceptions=(1, 3))
    widths = [(kv.k_bits, kv.v_bits) for kv in (setting.make_cache(layer, keys, CHUNK) for layer in layers)]
    assert widths == [(8, 8) if i in (1, 3) else (5, 6) for i in range(6)]
    assert setting.name == "5/6, layers 1 3 at 8/8"


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_exact_attention_is_that_of_the_formulas(window, sinks, softcap):
    rng = np.random.default_rng(0)
    q, (k, v) = rng.standard_normal((3, 4, 64)), rng.standard_normal((2, 9, 2, 64))
    options = {"window": window, "scale": 0.2, "softcap": softcap, "sinks": sinks}
    weights = attention_weights(torch.tensor(q), torch.tensor(k), torch.tensor([6, 7, 8]), **options)
    got = weigh(weights, torch.tensor(v))
    ranges = [(0 if window is None else max(0, row + 1 - window), row + 1) for row in (6, 7, 8)]
    want = reference.attend(
        q,
        k.transpose(1, 0, 2),
        v.transpose(1, 0, 2),
        scale=0.2,
        softcap=softcap,
        sinks=None if sinks is None else sinks.numpy(),
        ranges=ranges,
    )
    np.testing.assert_allclose(got, want, atol=1e-7)


# --- predictions -------------------------------------------------------------------------------


class Head:
    """A model that is nothing but an output layer over more tokens than are scored at a time."""

    def __init__(self, vocabulary: int, softcap: float | None, bias: bool) -> None:
        torch.manual_seed(0)
        self._head = torch.nn.Linear(16, vocabulary, bias=bias)
        torch.nn.init.normal_(self._head.weight, std=0.7)
        self.config = self
        self.final_logit_softcapping = softcap

    def get_text_config(self, *, decoder):
        assert decoder
        return self

    def get_output_embeddings(self):
        return self._head


def is_clear(log_probabilities):
    likeliest = log_probabilities.topk(2, -1).values
    return likeliest[:, 0] - likeliest[:, 1] > 5e-6


@pytest.mark.parametrize(("softcap", "bias"), [(None, False), (3.0, True)])
@pytest.mark.parametrize("error", [1e-3, 1e-1, 3.0])
def test_scores_agree_with_their_definitions_in_float64(softcap, bias, error):
    model = Head(20_001, softcap, bias)
    rng = np.random.default_rng(1)
    wanted = rng.standard_normal((300, 16), dtype=np.float32)
    others = [wanted + error * rng.standard_normal(wanted.shape, dtype=np.float32), wanted]
    targets = torch.from_numpy(rng.integers(0, 20_001, 300))
    targets[:50] = logits64(model, wanted)[:50].argmax(-1)
    scores = score(model, wanted, others, targets)
    p = logits64(model, wanted).log_softmax(-1)
    for scored, hidden in zip(scores, others, strict=True):
        q = logits64(model, hidden).log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).numpy()
        np.testing.assert_allclose(scored.kl, kl, rtol=2e-4, atol=1e-8)
        column = targets[:, None]
        np.testing.assert_allclose(scored.nll, -q.gather(1, column)[:, 0], atol=2e-5)
        np.testing.assert_allclose(scored.reference_nll, -p.gather(1, column)[:, 0], atol=2e-5)
        # Where the two likeliest are closer than float32 tells them apart, either may be said to be it.
        clear = (is_clear(p) & is_clear(q)).numpy()
        assert clear.any()
        assert (scored.same_top1 == (q.argmax(-1) == p.argmax(-1)).numpy())[clear].all()
        assert (scored.right == (q.argmax(-1) == targets).numpy())[clear].all()
        assert scored.reference_right[:50][is_clear(p)[:50].numpy()].all()
    assert (scores[1].kl == 0).all()
    got, kl = scores[0].summary(), scores[0].kl
    assert (got.mean_kl, got.predictions) == (pytest.approx(statistics.fmean(kl)), 300)
    assert got.mean_kl_standard_error == pytest.approx(statistics.stdev(kl) / 300**0.5)
    assert got.top1_agreement == pytest.approx(statistics.fmean(scores[0].same_top1))
    assert got.perplexity == pytest.approx(np.exp(statistics.fmean(scores[0].nll)))
    assert got.reference_perplexity == pytest.approx(np.exp(statistics.fmean(scores[0].reference_nll)))


def logits64(model, hidden):
    head = model.get_output_embeddings().double()
    logits = head(torch.from_numpy(hidden).double()).detach()
    head.float()
    softcap = model.final_logit_softcapping
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


# --- the verdict -------------------------------------------------------------------------------


def outcome_of(job, setting):
    (outcome,) = job.measure([setting], ignore)
    return outcome


def test_identity_passes_every_gate(job):
    outcome = outcome_of(job, FLOAT32)
    worst = outcome.worst()
    assert worst["kl_mean"].value == worst["kl_p99"].high == worst["flips"].high == worst["variation_mean"].high == 0
    assert worst["cosine_min"].value == pytest.approx(1)
    assert [outcome.verdict(gate) for gate in GATES] == ["pass"] * 3
    assert all(outcome.is_let_through(gate) for gate in GATES)


def wrong_table(x):
    """Codes of one codebook, read by another whose levels lie in the reverse order."""
    codes, norms = tq_hb.quantize(x, 8)
    return tq_hb.dequantize(255 - codes, norms, 8, head_dim=x.shape[-1])


def narrow_table(x):
    """A decoder whose outermost level is 4.035 where the encoder's is 5.065."""
    codes, norms = tq_hb.quantize(x, 8)
    levels = tq_hb.codebook(8) * np.float32(4.035 / 5.065)
    decoded = levels[codes] * norms[..., None] / np.sqrt(x.shape[-1])
    return np.ascontiguousarray(tq_hb.unrotate(decoded.astype(np.float32)))


def dropped_signs(x):
    """The inverse rotation without the signs."""
    codes, norms = tq_hb.quantize(x, 8)
    decoded = tq_hb.dequantize(codes, norms, 8, head_dim=x.shape[-1])
    return (decoded * reference.signs(x.shape[-1])).astype(np.float32)


@pytest.mark.parametrize("broken", [wrong_table, narrow_table, dropped_signs], ids=lambda f: f.__name__)
def test_a_broken_codec_fails_every_gate(broken, job):
    outcome = outcome_of(job, Decoded(broken.__name__, 8, broken))
    assert not any(outcome.is_let_through(gate) for gate in GATES)
    assert outcome.verdict(OURS) == "fail"
    assert smallest([outcome], OURS) is None


class SignlessOutput:
    """A cache whose attention forgets the signs when it rotates its output back."""

    def __init__(self, kv: tq_hb.KVCache) -> None:
        self._kv = kv

    def __getattr__(self, name):
        return getattr(self._kv, name)

    def attend(self, q, **options):
        return self._kv.attend(q, **options) * torch.from_numpy(reference.signs(q.shape[-1])).to(q.dtype)


@dataclasses.dataclass(frozen=True)
class SignlessWidths(Widths):
    def make_cache(self, layer, first_keys, chunk):
        return SignlessOutput(super().make_cache(layer, first_keys, chunk))


def test_an_attention_that_drops_the_signs_of_its_output_fails_every_gate(job):
    outcome = outcome_of(job, SignlessWidths(8, 8))
    assert not any(outcome.is_let_through(gate) for gate in GATES)
    assert abs(outcome.worst()["cosine_mean"].value) < 0.5


def test_wider_is_better_and_k_and_v_are_told_apart(job):
    names = ("8/8", "8/5", "5/8", "5/5")
    settings = [Widths(*map(int, name.split("/"))) for name in names]
    worst = dict(zip(names, (outcome.worst() for outcome in job.measure(settings, ignore)), strict=True))
    assert worst["8/8"]["kl_mean"].value < worst["5/8"]["kl_mean"].value < worst["5/5"]["kl_mean"].value
    # Weights come from K alone, and the same errors of V come out whatever K is.
    assert worst["8/5"]["variation_mean"].value < 0.5 * worst["5/5"]["variation_mean"].value
    assert worst["5/8"]["variation_mean"].value > 2 * worst["8/8"]["variation_mean"].value
    for figures in worst.values():
        for figure in figures.values():
            assert figure.low is None or figure.low <= figure.value <= figure.high


# --- what is kept ------------------------------------------------------------------------------


def test_what_is_measured_is_not_measured_again(job, monkeypatch):
    import tq_hb.cli._gate_run as gate_run

    settings = [Widths(8, 8), Widths(5, 5)]
    first = job.measure(settings[:1], ignore)
    replayed = []
    original = gate_run.replay
    monkeypatch.setattr(gate_run, "replay", lambda m, t, s, *rest: replayed.append(s.name) or original(m, t, s, *rest))
    both = job.measure(settings, ignore)
    assert replayed == ["5/5"]
    assert both[0] == first[0]
    assert job.measure(settings, ignore) == both
    assert replayed == ["5/5"]


def test_a_run_that_was_cut_off_goes_on(job, monkeypatch):
    import tq_hb.cli._gate_run as gate_run

    settings = [Widths(8, 8), Widths(5, 5)]
    original = gate_run.replay

    def cut_off(model, tokens, setting, *rest):
        if setting.name == "5/5":
            raise KeyboardInterrupt
        return original(model, tokens, setting, *rest)

    monkeypatch.setattr(gate_run, "replay", cut_off)
    with pytest.raises(KeyboardInterrupt):
        job.measure(settings, ignore)
    replayed = []
    monkeypatch.setattr(gate_run, "replay", lambda m, t, s, *rest: replayed.append(s.name) or original(m, t, s, *rest))
    assert len(job.measure(settings, ignore)) == 2
    assert replayed == ["5/5"]


def test_another_text_setting_or_model_is_measured_anew(tiny, text, tmp_path, monkeypatch):
    import tq_hb.cli._gate_run as gate_run

    replayed = []
    original = gate_run.replay
    monkeypatch.setattr(gate_run, "replay", lambda m, t, s, *rest: replayed.append(s.name) or original(m, t, s, *rest))
    store = Store(tmp_path)
    ModelJob(tiny, [text], store).measure([Widths(8, 8)], ignore)
    ModelJob(tiny, own_texts(tiny.tokenizer, LENGTH)[:1], store).measure([Widths(8, 8)], ignore)
    ModelJob(tiny, [text], store).measure([Widths(8, 8, codebook="mlx_native")], ignore)
    other = make_tiny()
    with torch.no_grad():
        next(iter(other.model.parameters()))[0, 0] += 1
    ModelJob(other, [text], store).measure([Widths(8, 8)], ignore)
    assert replayed == ["8/8"] * 4


# --- texts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "count"), [(300, 2), (2000, 10)])
def test_needles_are_where_they_are_said_to_be(length, count, tiny):
    text = needle_text(tiny.tokenizer, length)
    assert text.tokens.shape == (1, length)
    assert len(text.answers) == len(text.depths) == count
    content = tiny.tokenizer.decode(text.tokens[0])
    last_needle = 0
    for depth, answer in zip(text.depths, text.answers, strict=True):
        number = tiny.tokenizer.decode(text.tokens[0, list(answer)]).strip()
        assert number.isdigit()
        assert content.count(f" is {number}.") == 2
        place = content.index(f" is {number}.")
        assert abs(place / len(content) - depth) < 0.3
        assert place > last_needle
        last_needle = place


def test_a_text_of_too_few_tokens_is_refused(tiny, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("too short")
    with pytest.raises(tq_hb.InvalidArgument, match=r"text must have at least 300 tokens, got 9 in .*short.txt"):
        user_text(tiny.tokenizer, path, 300)


# --- captures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gemma2", "gpt-oss-64"])
def test_a_capture_gives_the_attention_of_the_replay_of_its_text(kind, tmp_path):
    """In the first layer, whose inputs are the same; the file keeps softcaps, sinks and windows."""
    model, tokens = make_model(kind), make_tokens(150)
    path = tmp_path / "capture.safetensors"
    save_capture(path, capture(model, kind, tokens, ignore))
    loaded = load_capture(path)
    attention, nbytes, names = measure_capture(loaded, Widths(6, 6), ignore)
    done = replay(model, tokens, Widths(6, 6), replay_reference(model, tokens, ignore), ignore)
    np.testing.assert_array_equal(attention.cosine[0], done.attention.cosine[0])
    np.testing.assert_array_equal(attention.variation[0], done.attention.variation[0])
    assert (nbytes, names, loaded.model) == (done.bytes_per_token, done.kernels, kind)
    assert np.isnan(attention.run_cosine).all()


@pytest.mark.parametrize("content", [b"", b"not a tensor file", None], ids=["empty", "text", "other tensors"])
def test_what_is_no_capture_is_refused(content, tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "capture.safetensors"
    if content is None:
        save_file({"x": np.zeros(3, np.float32)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(tq_hb.InvalidArgument, match="must be a file of captured queries, keys and values"):
        load_capture(path)


# --- the commands ------------------------------------------------------------------------------

SMALL = ["--tokens", "300", "--widths", "8/8,5/5", "--threads", "1"]


def test_the_command_reports_what_it_measured(tmp_path, capsys):
    assert main(["gate", "tiny", *SMALL, "--out", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "tiny random model"
    assert [text["name"] for text in report["texts"]] == ["licence", "documentation", "code", "needles"]
    assert [row["name"] for row in report["settings"]] == ["8/8", "5/5"]
    assert set(report["smallest"]) == {gate.name for gate in GATES}
    for row in report["settings"]:
        assert set(row["texts"]) == {"licence", "documentation", "code"}
        assert len(row["per_layer"]["code"]) == len(report["layers"]) == 6
        assert len(row["needles"]) == len(report["needle_depths"])
        for text in row["texts"].values():
            assert text["kl_mean"]["low"] <= text["kl_mean"]["value"] <= text["kl_mean"]["high"]
        assert row["worst"]["kl_mean"]["value"] == max(t["kl_mean"]["value"] for t in row["texts"].values())
    assert json.loads((tmp_path / "gate.json").read_text()) == report
    assert {(tmp_path / name).read_bytes()[:4] for name in ("gate.png", "layers.png")} == {b"\x89PNG"}
    written = (tmp_path / "gate.md").read_text()
    assert "`tq-hb gate tiny --tokens 300 --widths 8/8,5/5`" in written

    # Once more: nothing is measured again, and everything comes out the same.
    assert main(["gate", "tiny", *SMALL, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "8/8" in printed
    assert "needles" in printed
    assert (tmp_path / "gate.md").read_text() == written


def test_files_of_one_name_and_of_our_texts_names_are_texts_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i, path in enumerate(map(Path, ("a/code", "b/code", "worst"))):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"Text {i} has words of its own. " * 20)
    names = ["a/code", "code", "b/code", "worst"]
    arguments = [part for name in names for part in ("--text", name)]
    assert main(["gate", "tiny", *arguments, "--no-needles", *SMALL, "--out", "out", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [text["name"] for text in report["texts"]] == names
    for row in report["settings"]:
        assert list(row["texts"]) == names
        assert len({text["kl_mean"]["value"] for text in row["texts"].values()}) == len(names)
    section = (tmp_path / "out" / "gate.md").read_text().split("\n### worst ")[1]
    kl = report["settings"][0]["texts"]["worst"]["kl_mean"]["value"]
    assert f" | {1e3 * kl:.3g} (" in section


def test_calibrate_writes_means_that_gate_takes(tmp_path, capsys):
    means = tmp_path / "means.safetensors"
    assert (
        main(
            [
                "calibrate",
                "tiny",
                "--tokens",
                "1024",
                "--context",
                "1024",
                "--out",
                str(means),
                "--threads",
                "1",
                "--json",
            ]
        )
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    calibration = Calibration.load(means)
    assert (calibration.tokens, calibration.context) == (report["tokens"], report["context"]) == (1024, 1024)
    assert [layer["is_centred"] for layer in report["layers"]] == [m is not None for m in calibration.k_means]
    assert any(layer["is_centred"] for layer in report["layers"])

    own = ["--tokens", "300", "--no-needles", "--widths", "6/6", "--threads", "1"]
    text = tmp_path / "text.txt"
    text.write_text("Keys have a mean that is not zero. " * 20)
    options = ["--text", str(text), "--k-mean", "none", "--k-mean", str(means), "--out", str(tmp_path / "out")]
    assert main(["gate", "tiny", *own, *options, "--json"]) == 0
    plain, centred = json.loads(capsys.readouterr().out)["settings"]
    assert (plain["name"], centred["name"]) == ("6/6", "6/6 centred")
    assert plain["worst"]["kl_mean"] != centred["worst"]["kl_mean"]


@pytest.mark.parametrize(
    ("shape", "layers", "model_type", "message", "of_capture"),
    [
        ((1, 256), 6, "llama", "must be of a model of type 'gemma3_text', got one of 'llama'", None),
        ((1, 256), 7, "gemma3_text", "must be for the model's 6 layers, got 7", "be for 6 captured layers, got 7"),
        ((2, 64), 6, "gemma3_text", "of layer 0 must have shape (1, 256), got (2, 64)", "shape (1, 256), got (2, 64)"),
    ],
    ids=["another type", "more layers", "another shape"],
)
def test_means_of_another_model_are_refused_before_anything_is_measured(
    shape, layers, model_type, message, of_capture, tiny, text, tmp_path, capsys
):
    means, captured = tmp_path / "means.safetensors", tmp_path / "tiny.safetensors"
    Calibration((np.zeros(shape, np.float32),) * layers, model_type).save(means)
    save_capture(captured, capture(tiny.model, "tiny", text.tokens, ignore))
    for model, why in {"tiny": message, str(captured): of_capture}.items():
        if why is None:  # a capture does not tell what kind of model it is of
            continue
        assert main(["gate", model, *SMALL, "--k-mean", str(means), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert f"--k-mean must be of the model that is measured, got {means} (" in error
        assert why in error
    assert not (tmp_path / "out").exists()


def test_gate_takes_what_it_captured(tmp_path, capsys):
    file = tmp_path / "new" / "tiny.safetensors"
    assert main(["gate", "tiny", "--tokens", "300", "--threads", "1", "--capture", str(file)]) == 0
    assert (
        main(["gate", str(file), "--threads", "1", "--widths", "8/8,5/5", "--out", str(tmp_path / "out"), "--json"])
        == 0
    )
    captured = capsys.readouterr()
    report = json.loads(captured.out[captured.out.index("{") :])
    assert set(report["smallest"]) == {"strict cosine", "cosine"}
    eight, five = (row["worst"]["cosine_mean"]["value"] for row in report["settings"])
    assert 0.99 < five < eight < 1
    assert "kl_mean" not in report["settings"][0]["worst"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "model must be"),
        (["tiny", "--tokens", "0"], "tokens must be at least 1, got 0"),
        (["tiny", "--tokens", "50"], "tokens must be some hundreds"),
        (["tiny", "--no-needles", "--widths", "8/4"], "widths must be K/V pairs of 5, 6, 8, got '8/4'"),
        (["tiny", "--no-needles", "--widths", "8"], "widths must be K/V pairs of 5, 6, 8, got '8'"),
        (["tiny", "--text", "no such file"], "text must be a readable text file, got no such file"),
        (["tiny", "--text", "a", "--text", "./a"], "--text must name every text once, got a 2 times"),
        (["tiny", "--text", "code", "--text", "code"], "--text must name every text once, got code 2 times"),
        (["tiny", "--no-needles", "--k-mean", "no such file"], "path must be a file of mean keys"),
        (["tiny", "--no-needles", "--k-mean", "a", "--k-mean", "b"], "k-mean must name one file at most, got a, b"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_refusal_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    extra = [] if "--tokens" in arguments else ["--tokens", "300"]
    assert main(["gate", *arguments, *extra, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("tq-hb gate: ")


def test_names_in_the_plot_end_inside_of_it():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([7000, 9000], [1, 1], "o")
    for x, name in ((7000, "6/6"), (9000, "8/8, layers 1 2 3 4 5 at 8/8")):
        axes.annotate(name, (x, 1), (7, 3), textcoords="offset points")

    _make_room(figure, axes)

    figure.draw_without_rendering()
    assert all(text.get_window_extent().x1 <= axes.bbox.x1 + 0.5 for text in axes.texts)
