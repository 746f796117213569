"""Refuses what Metal has not."""

from __future__ import annotations

from translator.structure import Program


def lint(program: Program) -> None:
    """Raises TranslationError."""
