"""The table of every step's figures: deterministic figures only, no times."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Row = Mapping[str, float]
"""`step` (1 after the first update), then `<player>.<scalar>`; `alarm.<name>`, 1, in the row of a step that raised one."""


def write_metrics(rows: Sequence[Row], path: Path) -> None:
    """Write `metrics.parquet`: int64 `step`, then float64 columns in the order in which they first appear; null where a row has none.

    Rows are in the order in which they happened: where training was taken back, `step` is too, and `kept_rows` are those that led to the result.
    """
    table = {"step": pa.array([int(row["step"]) for row in rows], pa.int64())}
    table |= {name: pa.array([row.get(name) for row in rows], pa.float64()) for name in columns(rows)}
    pq.write_table(pa.table(table), path, compression="zstd")


def columns(rows: Sequence[Row]) -> list[str]:
    """Names of the figures, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row if name != "step"))


def thinned(
    rows: Sequence[Row], name: str, points: int = 120, statistic: Callable[..., Any] = np.median
) -> tuple[tuple[float, float], ...]:
    """A figure over the steps, (step, median or other statistic of the steps around it), thinned to so many points for a chart."""
    known = [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]
    if not known:
        return ()
    stretches = np.array_split(np.array(known), min(points, len(known)))
    return tuple((float(stretch[:, 0].mean()), float(statistic(stretch[:, 1]))) for stretch in stretches)


def kept_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows that training was not taken back from, one a step."""
    kept: list[Row] = []
    lowest = float("inf")
    for row in reversed(rows):
        if row["step"] < lowest:
            kept.append(row)
            lowest = row["step"]
    return kept[::-1]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read what `write_metrics` wrote, figure for figure."""
    return [{name: value for name, value in row.items() if value is not None} for row in pq.read_table(path).to_pylist()]
