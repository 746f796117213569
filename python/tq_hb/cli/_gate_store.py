"""Keeps what the gate has measured, so that an interrupted or enlarged run goes on where it was."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import tq_hb
from tq_hb import _core
from tq_hb.cli._output import write_whole

Arrays = dict[str, npt.NDArray[Any]]

_MEASURING = ("_gate_caches", "_gate_capture", "_gate_replay", "_gate_run", "_gate_scores")
"""Modules of this folder that say what is measured, and how."""


class Store:
    """Named arrays in a directory, under a JSON-able key that says all that they depend on.

    The code that makes them is part of every key, so that another version measures anew.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, key: Mapping[str, Any]) -> Arrays | None:
        """Return what was saved under the key; None if there is nothing, or if it can't be read."""
        try:
            content = io.BytesIO(self._path(key).read_bytes())
            with np.load(content, allow_pickle=False) as file:
                return dict(file)
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile):
            # Numpy gives an array where it should give a file of arrays, if that is what is there.
            return None

    def save(self, key: Mapping[str, Any], arrays: Arrays) -> None:
        """Keep arrays, whole or not at all."""
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)
        # Where the output is part of a checkout, what can be measured again is not.
        if not (self._directory / ".gitignore").exists():
            write_whole(self._directory / ".gitignore", b"*\n")
        write_whole(self._path(key), content.getvalue())

    def drop(self, key: Mapping[str, Any]) -> None:
        """Forget what is saved under the key, if anything is."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: Mapping[str, Any]) -> Path:
        text = json.dumps({**key, "code": code_digest()}, sort_keys=True)
        return self._directory / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"


@cache
def code_digest() -> str:
    """Return a digest of what the results depend on of this package."""
    return digest_of(Path(tq_hb.__file__).parent, Path(_core.__file__))


def digest_of(package: Path, core: Path) -> str:
    """Return a digest of the core and of a package's modules, those of commands left out that don't measure."""
    digest = hashlib.sha256(tq_hb.__version__.encode())
    modules = [*package.glob("*.py"), *package.glob("integrations/*.py")]
    modules += [package / "cli" / f"{name}.py" for name in _MEASURING]
    for path in (core, *sorted(modules)):
        digest.update(path.read_bytes())
    return digest.hexdigest()
