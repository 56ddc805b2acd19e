"""Training curves of a student, from its `metrics.parquet`, thinned for a chart, and its alarms."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from stages.training.alarms import RollBack, roll_backs
from stages.training.metrics import columns, kept_rows, read_metrics, thinned


@dataclass(frozen=True)
class Curve:
    """One scalar over the optimiser's steps."""

    name: str
    points: tuple[tuple[float, float], ...]
    """(step, median of the steps around it)."""


@dataclass(frozen=True)
class TrainingCurves:
    """What a chart of one training shows."""

    losses: tuple[Curve, ...] = ()
    alarms: tuple[RollBack, ...] = ()


def read_curves(path: Path) -> TrainingCurves:
    """Every loss in a metrics table, columns called `loss` or whose name ends so, and the alarms that training went on from.

    A curve has at most 120 points, medians of equal stretches of the steps that led to the result.
    """
    if "step" not in pq.read_schema(path).names:
        return TrainingCurves()
    happened = read_metrics(path)
    rows = kept_rows(happened)
    curves = (Curve(name, thinned(rows, name)) for name in columns(rows) if name.endswith("loss"))
    return TrainingCurves(tuple(curve for curve in curves if curve.points), tuple(roll_backs(happened)))
