"""Training curves of a student, from its `metrics.parquet`, thinned for a chart."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from stages.training.metrics import columns, kept_rows, read_metrics, thinned


@dataclass(frozen=True)
class Curve:
    """One scalar over the optimiser's steps."""

    name: str
    points: tuple[tuple[float, float], ...]
    """(step, median of the steps around it)."""


def read_curves(path: Path) -> tuple[Curve, ...]:
    """Every loss in a metrics table: columns called `loss`, or whose name ends so. Each has at most 120 points, medians of equal stretches."""
    if "step" not in pq.read_schema(path).names:
        return ()
    rows = kept_rows(read_metrics(path))
    names = [name for name in columns(rows) if name.endswith("loss")]
    curves = (Curve(name, thinned(rows, name)) for name in names)
    return tuple(curve for curve in curves if curve.points)
