"""The table of every step's figures: deterministic figures only, no times."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

Row = Mapping[str, float]
"""`step` (1 after the first update), then `<player>.<scalar>`."""


def write_metrics(rows: Sequence[Row], path: Path) -> None:
    """Write `metrics.parquet`: int64 `step`, then float64 columns in the order in which they first appear; null where a row has none."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    columns = {"step": pa.array([int(row["step"]) for row in rows], pa.int64())}
    columns |= {name: pa.array([row.get(name) for row in rows], pa.float64()) for name in names}
    pq.write_table(pa.table(columns), path, compression="zstd")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read what `write_metrics` wrote, figure for figure."""
    return [{name: value for name, value in row.items() if value is not None} for row in pq.read_table(path).to_pylist()]
