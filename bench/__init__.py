"""Measurements: a module per question, run from the repository's root as ``python -m bench.NAME``."""
