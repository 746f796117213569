"""Captured queries, keys and values: what the gate can measure where there is no model to run.

The file is safetensors. Per layer it has ``layer.<i>.q``, shape (tokens, heads, head_dim), and ``layer.<i>.k`` and
``layer.<i>.v``, shape (tokens, kv_heads, head_dim): what the model's attention is given, that is after RoPE, of one
sequence from its first token on, in float32, float16 or bfloat16. ``layer.<i>.sinks``, shape (heads,), is optional. Its
metadata are ``format`` ("tq_hb.capture"), ``version`` ("1"), ``model`` (a name) and ``layers``: JSON, a list with an
object per layer: ``window`` (tokens or null), ``scale`` (null: ``head_dim ** -0.5``) and ``softcap`` (0: none).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tq_hb
from tq_hb.cli._gate_caches import Layer, Setting
from tq_hb.cli._gate_replay import CHUNK, Attention, Outputs, Probe, kernels, layers_of, measured, run_layers

_FORMAT = "tq_hb.capture"
_VERSION = "1"

OnTokens = Callable[[int], object]


@dataclass(frozen=True)
class CapturedLayer:
    """One layer's inputs: q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim), and how it attends."""

    layer: Layer
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float | None
    softcap: float
    sinks: torch.Tensor | None


@dataclass(frozen=True)
class Capture:
    """All layers' inputs over one text."""

    model: str
    layers: tuple[CapturedLayer, ...]
    sha256: str = ""


def capture(model: Any, name: str, tokens: torch.Tensor, on_tokens: OnTokens) -> Capture:
    """Run a text, shape (1, tokens), through a model, and keep what every layer's attention is given."""
    recorders = [_Recorder(layer, CHUNK) for layer in layers_of(model)]
    run_layers(model, tokens, recorders, on_tokens, CHUNK, 0)
    return Capture(name, tuple(recorder.captured() for recorder in recorders))


def measure_capture(inputs: Capture, setting: Setting, on_tokens: OnTokens) -> tuple[Attention, float, tuple[str, ...]]:
    """Attend to captured keys and values in a setting's caches; returns attention, bytes per token and kernels."""
    probes = []
    with torch.inference_mode():
        for given in inputs.layers:
            probe = Probe(given.layer, partial(setting.make_cache, given.layer, chunk=CHUNK), CHUNK)
            for q, k, v in zip(given.q.split(CHUNK), given.k.split(CHUNK), given.v.split(CHUNK), strict=True):
                probe.append(k, v)
                probe.attend(q, scale=given.scale, softcap=given.softcap, sinks=given.sinks)
                on_tokens(len(q))
            probes.append(probe)
    return measured(probes), sum(probe.kv.bytes_per_token for probe in probes), kernels(setting, probes)


def save_capture(path: Path, captured: Capture) -> None:
    """Write the file."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for index, given in enumerate(captured.layers):
        tensors |= {f"layer.{index}.{name}": getattr(given, name).contiguous() for name in ("q", "k", "v")}
        if given.sinks is not None:
            tensors[f"layer.{index}.sinks"] = given.sinks.contiguous()
    layers = [
        {"window": given.layer.window, "scale": given.scale, "softcap": given.softcap} for given in captured.layers
    ]
    metadata = {"format": _FORMAT, "version": _VERSION, "model": captured.model, "layers": json.dumps(layers)}
    save_file(tensors, path, metadata)


def load_capture(path: Path) -> Capture:
    """Read the file.

    Raises
    ------
    tq_hb.InvalidArgument
        If it is not such a file, or its arrays don't fit each other.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- it is not a dict
    except (SafetensorError, OSError) as error:
        raise _refused(path, str(error)) from error
    if (metadata.get("format"), metadata.get("version")) != (_FORMAT, _VERSION):
        raise _refused(path, f"its format is {metadata.get('format')!r}, version {metadata.get('version')!r}")
    try:
        rules = json.loads(metadata["layers"])
        layers = tuple(_captured_layer(index, rule, tensors) for index, rule in enumerate(rules))
    except (KeyError, TypeError, ValueError) as error:
        raise _refused(path, f"{type(error).__name__}: {error}") from error
    if not layers:
        raise _refused(path, "it has no layer")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Capture(metadata.get("model", path.stem), layers, digest)


def _captured_layer(index: int, rule: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> CapturedLayer:
    q, k, v = (tensors[f"layer.{index}.{name}"].float() for name in ("q", "k", "v"))
    if not (q.ndim == k.ndim == 3 and k.shape == v.shape and q.shape[::2] == k.shape[::2]):
        raise ValueError(f"layer {index} has shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"layer {index} has {q.shape[1]} heads for {k.shape[1]} KV heads")
    sinks = tensors.get(f"layer.{index}.sinks")
    layer = Layer(index, k.shape[1], k.shape[2], rule["window"])
    return CapturedLayer(layer, q, k, v, rule["scale"], rule["softcap"], sinks)


def _refused(path: Path, why: str) -> tq_hb.InvalidArgument:
    return tq_hb.InvalidArgument(f"model must be a file of captured queries, keys and values, got {path} ({why})")


class _Recorder(Outputs):
    """A layer of an unquantised run that keeps its inputs."""

    def __init__(self, layer: Layer, chunk: int) -> None:
        super().__init__(layer, chunk)
        self._parts: list[tuple[torch.Tensor, ...]] = []
        self._options: dict[str, Any] = {}

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        super().append(k, v)
        self._parts.append((k.float(), v.float()))

    def attend(self, q: torch.Tensor, **options: Any) -> torch.Tensor:
        if self.attended < self.seen:
            self._parts[-1] = (q.float(), *self._parts[-1])
            self._options = options
        return super().attend(q, **options)

    def captured(self) -> CapturedLayer:
        q, k, v = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        return CapturedLayer(self.layer, q, k, v, **self._options)
