"""Mean keys of a model, one per layer and KV head, and the file that keeps them.

A cache encodes keys as differences from them (``k_mean=``). They belong to the model rather than to a text: measured
once, they serve every prompt.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tq_hb import InvalidArgument
from tq_hb.options import invalid

__all__ = ["Calibration"]

Mean: TypeAlias = npt.NDArray[np.float32]

_FORMAT = "tq_hb.k_mean"
_VERSION = "1"
_COUNTS = ("layers", "tokens", "context")
_TEXTS = ("model_type", "model", "text_sha256")


@dataclass(frozen=True, eq=False)
class Calibration:
    """Mean keys of a model, as `tq_hb.integrations.transformers.calibrate` measures them.

    Parameters
    ----------
    k_means : tuple of float32 arrays, shape (kv_heads, head_dim), or None
        One per layer of the model, in the space of the keys that its cache is given, that is after RoPE. None: the
        layer is not centred.
    model_type : str
        The architecture, as in the model's config. A cache of another one refuses the means.
    model : str
        Which model it was, for people.
    tokens, context : int
        How many tokens were averaged, and over which range of positions they were spread.
    text_sha256 : str
        Of the text, for people.

    Raises
    ------
    tq_hb.InvalidArgument
        If a mean is not a float32 array of finite values and two axes.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from tq_hb.integrations.calibration import Calibration
    >>> calibration = Calibration((None, np.ones((2, 64), np.float32)), model_type="llama")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     calibration.save(f"{folder}/means.safetensors")
    ...     loaded = Calibration.load(f"{folder}/means.safetensors")
    >>> loaded.model_type, loaded.k_means[0], loaded.k_means[1].shape
    ('llama', None, (2, 64))
    """

    k_means: tuple[Mean | None, ...]
    model_type: str
    model: str = ""
    tokens: int = 0
    context: int = 0
    text_sha256: str = ""

    def __post_init__(self) -> None:
        for layer, mean in enumerate(self.k_means):
            if mean is None:
                continue
            if not isinstance(mean, np.ndarray) or mean.dtype != np.float32 or mean.ndim != 2:
                got = f"{mean.dtype} {mean.shape}" if isinstance(mean, np.ndarray) else type(mean).__name__
                rule = "must be None or a float32 array (kv_heads, head_dim)"
                raise invalid("Calibration", f"k_means[{layer}]", rule, got)
            if not np.isfinite(mean).all():
                raise invalid("Calibration", f"k_means[{layer}]", "must be finite", mean[~np.isfinite(mean)][0])

    def means_for(self, op: str, config: Any) -> tuple[Mean | None, ...]:
        """Return the means, having made sure that a model can have them.

        Parameters
        ----------
        op : str
            Who asks, for the error.
        config : transformers.PreTrainedConfig
            The model's config.

        Raises
        ------
        tq_hb.InvalidArgument
            If the means are of another type of model, or of one with more or fewer layers.

        Examples
        --------
        >>> from transformers import LlamaConfig
        >>> from tq_hb.integrations.calibration import Calibration
        >>> calibration = Calibration((None, None), model_type="llama")
        >>> calibration.means_for("TqCache", LlamaConfig(num_hidden_layers=2))
        (None, None)
        >>> calibration.means_for("TqCache", LlamaConfig(num_hidden_layers=3))
        Traceback (most recent call last):
        tq_hb.InvalidArgument: TqCache: k_mean must be for the model's 3 layers, got 2
        """
        config = config.get_text_config(decoder=True)
        if self.model_type != config.model_type:
            rule = f"must be of a model of type {config.model_type!r}"
            raise invalid(op, "k_mean", rule, f"one of {self.model_type!r}")
        if len(self.k_means) != config.num_hidden_layers:
            rule = f"must be for the model's {config.num_hidden_layers} layers"
            raise invalid(op, "k_mean", rule, len(self.k_means))
        return self.k_means

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: ``layer.<i>.k_mean`` for every centred layer, the rest as metadata.

        >>> import tempfile, numpy as np
        >>> from safetensors.numpy import load_file
        >>> from tq_hb.integrations.calibration import Calibration
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Calibration((None, np.ones((2, 64), np.float32)), "llama").save(f"{folder}/means.safetensors")
        ...     list(load_file(f"{folder}/means.safetensors"))
        ['layer.1.k_mean']
        """
        from safetensors.numpy import save_file

        metadata = {"format": _FORMAT, "version": _VERSION, "layers": str(len(self.k_means))}
        metadata |= {name: str(getattr(self, name)) for name in (*_TEXTS, "tokens", "context")}
        # The library takes an array's memory as it lies, whatever its strides.
        arrays = {_tensor(i): np.ascontiguousarray(mean) for i, mean in enumerate(self.k_means) if mean is not None}
        save_file(arrays, path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises
        ------
        tq_hb.InvalidArgument
            If the file can't be read, or is not such a file.

        Examples
        --------
        >>> from tq_hb.integrations.calibration import Calibration
        >>> Calibration.load("no such file")
        Traceback (most recent call last):
        tq_hb.InvalidArgument: Calibration.load: path must be a file of mean keys, got 'no such file' (it isn't there)
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise _refused(path, "it isn't there")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- it is not a dict
        except (SafetensorError, OSError) as error:
            raise _refused(path, str(error)) from error
        return cls(**_parse(path, metadata, arrays))


def _parse(path: str | os.PathLike[str], metadata: Mapping[str, str], arrays: dict[str, Any]) -> dict[str, Any]:
    if metadata.get("format") != _FORMAT:
        raise _refused(path, f"its format is {metadata.get('format')!r}")
    if metadata.get("version") != _VERSION:
        raise _refused(path, f"its version is {metadata.get('version')!r}")
    counts = {name: metadata.get(name, "") for name in _COUNTS}
    for name, digits in counts.items():
        if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
            raise _refused(path, f"its {name} is {digits!r}")
    layers = int(counts.pop("layers"))
    # The number of layers is only believed as far as memory goes.
    if layers > 100_000:
        raise _refused(path, f"its layers is {layers}")
    k_means = tuple(arrays.pop(_tensor(layer), None) for layer in range(layers))
    if arrays:
        raise _refused(path, f"it has a tensor {min(arrays)!r} for {layers} layers")
    return {
        "k_means": k_means,
        **{name: int(digits) for name, digits in counts.items()},
        **{name: metadata.get(name, "") for name in _TEXTS},
    }


def _tensor(layer: int) -> str:
    return f"layer.{layer}.k_mean"


def _refused(path: str | os.PathLike[str], why: str) -> InvalidArgument:
    return invalid("Calibration.load", "path", "must be a file of mean keys", f"{os.fspath(path)!r} ({why})")
