"""Training curves of a student, from its `metrics.parquet`, thinned for a chart."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow.parquet as pq

_POINTS: Final = 120


@dataclass(frozen=True)
class Curve:
    """One scalar over the optimiser's steps."""

    name: str
    points: tuple[tuple[float, float], ...]
    """(step, median of the steps around it)."""


def read_curves(path: Path) -> tuple[Curve, ...]:
    """Every loss in a metrics table: columns called `loss`, or whose name ends so. Each has at most 120 points, medians of equal stretches."""
    table = pq.read_table(path)
    if "step" not in table.column_names:
        return ()
    steps = table["step"].to_numpy().astype(np.float64)
    names = [name for name in table.column_names if name == "loss" or name.endswith(("loss", "/loss", ".loss"))]
    curves = (Curve(name, _thin(steps, table[name].to_numpy(zero_copy_only=False).astype(np.float64))) for name in names)
    return tuple(curve for curve in curves if curve.points)


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[tuple[float, float], ...]:
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if not len(steps):
        return ()
    stretches = np.array_split(np.arange(len(steps)), min(_POINTS, len(steps)))
    return tuple((float(steps[stretch].mean()), float(np.median(values[stretch]))) for stretch in stretches)
