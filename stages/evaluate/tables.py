"""An evaluation's figures as parquet, for programs: rows of the table, and of every changed teacher of `evaluate.transfer`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.evaluate.rows import Row
from stages.evaluate.scoring import Score


def write_tables(folder: Path, rows: Sequence[Row], scores: Mapping[str, Mapping[str, Score]]) -> None:
    """Write `scores.parquet`, a line a row with its metrics in columns (null where it has none), and `rows.parquet`, a line a row and metric.

    `scores` are by a row's name and metric. The column `on` has the entry of `evaluate.transfer`; null in the table itself.
    """
    metrics = list(dict.fromkeys(metric for row in rows for metric in scores[row.name]))
    wide = [_named(row) | {name: value for metric in metrics for name, value in _columns(metric, scores[row.name]).items()} for row in rows]
    pq.write_table(pa.Table.from_pylist(wide), folder / "scores.parquet")
    long = [
        _named(row) | {"metric": metric, "value": score.value, "low": score.low, "high": score.high}
        for row in rows
        for metric, score in scores[row.name].items()
    ]
    pq.write_table(pa.Table.from_pylist(long), folder / "rows.parquet")


def _named(row: Row) -> dict[str, Any]:
    return {"row": row.name, "model": row.model, "family": row.family, "steps": row.steps, "on": row.on}


def _columns(metric: str, scores: Mapping[str, Score]) -> dict[str, float | None]:
    """A metric's value, and the ends of its interval."""
    score = scores.get(metric)
    ends = {metric: "value", f"{metric}_low": "low", f"{metric}_high": "high"}
    return {name: None if score is None else getattr(score, end) for name, end in ends.items()}
