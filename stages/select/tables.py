"""Measurements in batches: as many rows at a time as serve speed, whatever the size of a shard, so that memory does not grow with their number."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

BATCH_ROWS: Final = 32_768


@dataclass(frozen=True)
class Batch:
    """Rows that follow each other."""

    rows: pa.Table
    first: int
    """Position of its first row among all rows."""
    shard: NDArray[np.int64]
    """(N,) number of each row's shard."""
    place: NDArray[np.int64]
    """(N,) position of each row in its shard."""


def batches(tables: Sequence[Path], batch_rows: int = BATCH_ROWS) -> Iterator[Batch]:
    """Yield the rows of all tables (one a shard), in order, whole shards at a time until `batch_rows` are reached."""
    first, waiting = 0, list[tuple[int, pa.Table]]()
    for number, path in enumerate(tables):
        waiting.append((number, pq.read_table(path)))
        if sum(table.num_rows for _, table in waiting) >= batch_rows or number == len(tables) - 1:
            batch = _joined(waiting, first)
            yield batch
            first, waiting = first + batch.rows.num_rows, []


def _joined(tables: Sequence[tuple[int, pa.Table]], first: int) -> Batch:
    sizes = [table.num_rows for _, table in tables]
    shard = np.repeat(np.array([number for number, _ in tables], np.int64), sizes)
    place = np.concatenate([np.arange(size, dtype=np.int64) for size in sizes])
    return Batch(pa.concat_tables(table for _, table in tables).combine_chunks(), first, shard, place)


def table_paths(folder: Path, names: Sequence[str]) -> list[Path]:
    """Paths of files named by number, in the order of their numbers, which may outgrow their zeros."""
    return [folder / name for name in sorted(names, key=lambda name: (len(name), name))]


def column(rows: pa.Table, name: str) -> pa.Array:
    """A column of a table as one array."""
    values = rows[name].combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        return pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], rows.schema.field(name).type)
    return values


def numbers(rows: pa.Table, name: str) -> NDArray[np.float64]:
    """A column of numbers, NaN where there is none."""
    return np.asarray(column(rows, name).cast(pa.float64()).to_numpy(zero_copy_only=False))
