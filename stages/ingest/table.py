"""URL tables of any size, read batch by batch: parquet, folders of parquet, csv; local or anywhere fsspec reaches."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from schemas.data import ColumnMap
from schemas.errors import BadInput

logger = logging.getLogger(__name__)

BATCH_ROWS: Final = 65_536
"""Rows held at a time."""
CSV_BLOCK_BYTES: Final = 4 * 2**20

ROW_SCHEMA: Final = pa.schema(
    [
        ("row", pa.int64()),  # position in the whole table, from 0
        ("url", pa.string()),
        ("caption", pa.string()),
        ("width", pa.float64()),  # as stated; null where the table does not say
        ("height", pa.float64()),
        ("aesthetic", pa.float64()),
        ("similarity", pa.float64()),
        ("watermark", pa.float64()),
        ("unsafe", pa.float64()),
        ("nsfw", pa.string()),
    ]
)
_NEEDED: Final = ("url", "caption")
_LABEL: Final = "nsfw"


@dataclass(frozen=True)
class _Columns:
    """Names in one file of the table, by our name; those that it has."""

    names: dict[str, str]

    @classmethod
    def find(cls, available: list[str], wanted: ColumnMap, file: str) -> "_Columns":
        by_lower = {name.lower(): name for name in reversed(available)}
        names: dict[str, str] = {}
        for field in ROW_SCHEMA.names[1:]:
            candidates: tuple[str, ...] = getattr(wanted, field)
            found = next((by_lower[name.lower()] for name in candidates if name.lower() in by_lower), None)
            if found is not None:
                names[field] = found
            elif field in _NEEDED:
                raise BadInput(
                    f"ingest.table {file}: no column for the {field}; found {', '.join(available) or 'none'}; "
                    f"expected one of {', '.join(candidates) or '(no names given)'} (recipe: ingest.columns.{field})"
                )
        return cls(names)


class UrlTable:
    """Rows of a table as record batches of `ROW_SCHEMA`, in order. Memory does not grow with the table."""

    def __init__(self, address: str, columns: ColumnMap) -> None:
        """Look at the files and their columns. Raises `BadInput` for what is missing or cannot be read."""
        self.address, self.columns = address, columns
        try:
            self._system, path = fsspec.core.url_to_fs(address)
            self._files = self._list(path)
        except (OSError, ValueError, ImportError) as error:
            raise BadInput(f"ingest.table {address}: cannot be read ({error})") from error
        self.rows: int | None = None
        """Rows in the table where its files say so without being read (parquet)."""
        if all(file.endswith(".parquet") for file in self._files):
            self.rows = sum(self._parquet_rows(file) for file in self._files)
            if self.rows == 0:
                raise BadInput(f"ingest.table {address}: has no rows")

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the rows. Raises `BadInput` naming file and column for values that are not what their column should hold, or no rows at all."""
        row = 0
        for file in self._files:
            for batch in _ahead(self._parquet_batches(file) if file.endswith(".parquet") else self._csv_batches(file)):
                if batch.num_rows:
                    yield self._mapped(batch, row, file)
                    row += batch.num_rows
        if row == 0:
            raise BadInput(f"ingest.table {self.address}: has no rows")

    def has(self, field: str) -> bool:
        """Whether any file of the table has a column for our `field`. Reads their first blocks."""
        return any(field in self._columns(file).names for file in self._files)

    def _list(self, path: str) -> list[str]:
        if self._system.isfile(path):
            if PurePosixPath(path).suffix not in (".parquet", ".csv"):
                raise BadInput(f"ingest.table {self.address}: expected a .parquet or .csv file, or a folder of .parquet files")
            return [path]
        inside = [name for name in self._system.find(path) if name.endswith(".parquet")]
        files = sorted(name for name in inside if not any(part.startswith(".") for part in name[len(path) :].split("/")))
        if not files:
            raise BadInput(
                f"ingest.table {self.address}: nothing to read; expected a .parquet or .csv file, or a folder with .parquet files"
            )
        return files

    def _parquet_rows(self, file: str) -> int:
        try:
            with self._open(file) as stream:
                parquet = pq.ParquetFile(stream)
                _Columns.find(parquet.schema_arrow.names, self.columns, file)
                return int(parquet.metadata.num_rows)
        except (pa.ArrowException, OSError) as error:
            raise BadInput(f"ingest.table {file}: not a readable parquet file ({error})") from error

    def _columns(self, file: str) -> _Columns:
        try:
            with self._open(file) as stream:
                if file.endswith(".parquet"):
                    available = pq.read_schema(stream).names
                else:
                    available = pyarrow.csv.open_csv(stream, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True)).schema.names
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise BadInput(f"ingest.table {file}: cannot be read ({error})") from error
        return _Columns.find(available, self.columns, file)

    def _open(self, file: str) -> AbstractContextManager[Any]:
        # Arrow's own file spares a copy through Python's.
        local = isinstance(self._system, LocalFileSystem)
        stream: AbstractContextManager[Any] = pa.OSFile(file) if local else self._system.open(file, "rb")
        return stream

    def _parquet_batches(self, file: str) -> Iterator[pa.RecordBatch]:
        try:
            with self._open(file) as stream:
                parquet = pq.ParquetFile(stream, pre_buffer=False)  # which keeps every row group in memory until the last
                names = _Columns.find(parquet.schema_arrow.names, self.columns, file).names
                yield from parquet.iter_batches(BATCH_ROWS, columns=sorted(set(names.values())))
        except (pa.ArrowException, OSError) as error:
            raise BadInput(f"ingest.table {file}: cannot be read ({error})") from error

    def _csv_batches(self, file: str) -> Iterator[pa.RecordBatch]:
        # Every column is read as text and cast later: a type guessed from the first block may not fit the last.
        read = pyarrow.csv.ReadOptions(block_size=CSV_BLOCK_BYTES)
        parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
        try:
            with self._open(file) as stream:
                available = pyarrow.csv.open_csv(stream, read_options=read, parse_options=parse).schema.names
            names = sorted(set(_Columns.find(available, self.columns, file).names.values()))
            convert = pyarrow.csv.ConvertOptions(
                include_columns=names, column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
            )
            with self._open(file) as stream:
                yield from pyarrow.csv.open_csv(stream, read_options=read, parse_options=parse, convert_options=convert)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise BadInput(f"ingest.table {file}: not a readable csv file ({error})") from error

    def _mapped(self, batch: pa.RecordBatch, first_row: int, file: str) -> pa.RecordBatch:
        names = _Columns.find(batch.schema.names, self.columns, file).names
        arrays: list[pa.Array] = [pa.array(np.arange(first_row, first_row + batch.num_rows))]
        for field in ROW_SCHEMA.names[1:]:
            wanted = ROW_SCHEMA.field(field).type
            if field not in names:
                arrays.append(pa.nulls(batch.num_rows, wanted))
                continue
            column = batch.column(names[field])
            if field == _LABEL and not _is_text(column.type):
                raise BadInput(
                    f"ingest.table {file}: column {names[field]} holds {column.type}, expected labels such as UNLIKELY; a probability belongs to "
                    "ingest.columns.unsafe, with ingest.columns.nsfw: []"
                )
            try:
                # Not safe: a number may lose digits, and text that is not UTF-8 is a row's fault, for the rules to count.
                arrays.append(column if column.type == wanted else pc.cast(column, wanted, safe=False))
            except pa.ArrowException as error:
                raise BadInput(f"ingest.table {file}: column {names[field]} cannot be read as {wanted} ({error})") from error
        return pa.RecordBatch.from_arrays(arrays, schema=ROW_SCHEMA)


def _ahead(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same batches, each read and decoded by a thread while the one before is worked on."""
    with ThreadPoolExecutor(1, "table") as reader:
        waiting = reader.submit(next, batches, None)
        while (batch := waiting.result()) is not None:
            waiting = reader.submit(next, batches, None)
            yield batch


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    kinds = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_null,
    )
    return any(check(kind) for check in kinds)
