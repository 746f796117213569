#!/usr/bin/env python3
"""Writes the codebook tables beside this file, as literals that C++, MSL and CUDA include.

``lloyd_max`` is solved here; ``mlx_native`` is the reference system's published table, copied
from ``mlx_native.json``. ``--check`` writes nothing and fails if a checked-in table differs.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

HERE = Path(__file__).resolve().parent
CBITS = (5, 6, 8)
MAX_RESIDUAL = 1e-12
MAX_NEWTON_STEPS = 50


def density(x: float) -> float:
    """Return the density of N(0,1)."""
    return math.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def cell_mass(low: float, high: float) -> float:
    """Return the probability of [low, high], 0 <= low < high <= inf, without cancellation in the tail."""
    root2 = math.sqrt(2.0)
    if low < 0.5:
        return 0.5 * (math.erf(high / root2) - math.erf(low / root2))
    return 0.5 * (math.erfc(low / root2) - math.erfc(high / root2))


def cell_mean(low: float, high: float) -> float:
    """Return the mean of N(0,1) within [low, high]: the centroid that Lloyd-Max asks of that cell."""
    # density(low) - density(high); expm1 keeps the digits where the two nearly agree.
    drop = -density(low) * math.expm1(0.5 * (low - high) * (low + high))
    return drop / cell_mass(low, high)


def cell_edges(levels: list[float]) -> list[float]:
    """Return the edges of the positive half's cells: 0, the midpoints, infinity."""
    return [0.0, *(0.5 * (a + b) for a, b in pairwise(levels)), math.inf]


def residuals(levels: list[float]) -> list[float]:
    """Return how far each level is from the mean of its own cell."""
    cells = pairwise(cell_edges(levels))
    return [c - cell_mean(low, high) for c, (low, high) in zip(levels, cells, strict=True)]


def solve_tridiagonal(lower: list[float], diagonal: list[float], upper: list[float], rhs: list[float]) -> list[float]:
    """Solve by the Thomas algorithm; ``lower[0]`` and ``upper[-1]`` are not read."""
    count = len(rhs)
    gain, partial = [0.0] * count, [0.0] * count
    for i in range(count):
        before = lower[i] if i else 0.0
        pivot = diagonal[i] - before * (gain[i - 1] if i else 0.0)
        gain[i] = upper[i] / pivot if i + 1 < count else 0.0
        partial[i] = (rhs[i] - before * (partial[i - 1] if i else 0.0)) / pivot
    solution = partial
    for i in reversed(range(count - 1)):
        solution[i] -= gain[i] * solution[i + 1]
    return solution


def newton_step(levels: list[float]) -> list[float]:
    """Take a Newton step on ``residuals``; a cell's mean depends on its two neighbours only."""
    lower, diagonal, upper = [], [], []
    for low, high in pairwise(cell_edges(levels)):
        mass, mean = cell_mass(low, high), cell_mean(low, high)
        # Half of d(mean)/d(edge), since an edge moves by half of what its level moves.
        by_low = 0.5 * density(low) * (mean - low) / mass if low > 0.0 else 0.0
        by_high = 0.5 * density(high) * (high - mean) / mass if high < math.inf else 0.0
        lower.append(-by_low)
        diagonal.append(1.0 - by_low - by_high)
        upper.append(-by_high)
    step = solve_tridiagonal(lower, diagonal, upper, residuals(levels))
    return [c - d for c, d in zip(levels, step, strict=True)]


def lloyd_max(cbits: int) -> list[float]:
    """Return the levels of the optimal ``2**cbits``-level quantiser of N(0,1), ascending.

    The problem is symmetric, so only the positive half is solved. Newton's method is needed:
    Lloyd's iteration moves by less than 1e-4 a step while still 0.7 away at 256 levels.
    """
    if cbits < 1:
        raise ValueError(f"lloyd_max: cbits must be at least 1, got {cbits}")
    count = 2**cbits
    # Levels are dense as the cube root of the density, which is that of N(0,3).
    start = NormalDist(sigma=math.sqrt(3.0))
    levels = [start.inv_cdf((i + 0.5) / count) for i in range(count // 2, count)]
    residual = max(map(abs, residuals(levels)))
    for _ in range(MAX_NEWTON_STEPS):
        candidate = newton_step(levels)
        candidate_residual = max(map(abs, residuals(candidate)))
        if candidate_residual >= residual:  # at the rounding floor
            break
        levels, residual = candidate, candidate_residual
    if residual >= MAX_RESIDUAL:
        raise ArithmeticError(f"lloyd_max: {cbits} bits: residual {residual:.1e} is not below {MAX_RESIDUAL}")
    return [-c for c in reversed(levels)] + levels


def midpoints(levels: list[float]) -> list[float]:
    """Return the decision boundaries, one between each two levels."""
    return [0.5 * (a + b) for a, b in pairwise(levels)]


def to_float32(x: float) -> float:
    """Round to the nearest float32."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def literal(x: float) -> str:
    """Write the float32 nearest to ``x``; nine significant digits name it exactly."""
    digits = f"{to_float32(x):.9g}"
    return digits + ("f" if "." in digits or "e" in digits else ".0f")


def table_text(title: str, values: list[float]) -> str:
    """Write one ``.inc`` file: usable as ``float table[] = { #include "..." };``."""
    rows = [", ".join(map(literal, values[i : i + 6])) for i in range(0, len(values), 6)]
    return f"// {title} Written by generate.py.\n" + ",\n".join(rows) + "\n"


def all_tables() -> dict[str, str]:
    """Return file name -> content, for every codebook and width."""
    published = json.loads((HERE / "mlx_native.json").read_text())
    tables = {}
    for cbits in CBITS:
        levels = lloyd_max(cbits)
        sources = {
            "lloyd_max": (levels, midpoints(levels)),
            "mlx_native": (published["levels"][str(cbits)], published["boundaries"][str(cbits)]),
        }
        for name, values in sources.items():
            for kind, table in zip(("levels", "boundaries"), values, strict=True):
                tables[f"{name}_{cbits}_{kind}.inc"] = table_text(f"{name}, {cbits} bits: {kind}.", table)
    return tables


def main() -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the checked-in tables, write nothing")
    check = parser.parse_args().check
    tables = all_tables()
    if not check:
        for name, text in tables.items():
            (HERE / name).write_text(text)
        return 0
    on_disk = {path.name: path.read_text() for path in HERE.glob("*_*_*.inc")}
    wrong = sorted(name for name in tables.keys() | on_disk.keys() if tables.get(name) != on_disk.get(name))
    for name in wrong:
        print(f"{name}: differs from what generate.py makes", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
