"""From the chunks kept as parts to the artifact's files, which say nothing of how the chunks were cut."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.base import Model
from stages.ingest.repack import FAILURES_SCHEMA, ROWS_SCHEMA
from stages.offsets import write_offsets
from stages.shards import ShardWriter, read_samples, shard_paths
from stages.workspace import Workspace

GROUP_ROWS: Final = 65_536
"""Rows of one row group of `rows.parquet` and `failures.parquet`."""


class ShardFacts(Model):
    """What one shard holds."""

    images: int
    bytes: int
    """Of the pictures' files."""


def assemble(workspace: Workspace, folder: Path, chunks: Sequence[str], shard_images: int) -> list[ShardFacts]:
    """Write the pictures of the parts `chunks`, in order, to shards of `shard_images` in `folder`, and their tables one after the other."""
    writer = ShardWriter(folder, shard_images)
    shards: list[ShardFacts] = []
    parts = {part.name: part for part in workspace.parts()}
    with (
        _TableWriter(folder / "rows.parquet", ROWS_SCHEMA) as rows,
        _TableWriter(folder / "failures.parquet", FAILURES_SCHEMA) as failures,
    ):
        for name in chunks:
            with workspace.folder("part") as place:
                loaded = workspace.load_part(parts[name], place)
                for shard in shard_paths(loaded):
                    for sample in read_samples(shard):
                        writer.add(sample)
                        before = shards.pop() if len(shards) == writer.shards else ShardFacts(images=0, bytes=0)
                        shards.append(ShardFacts(images=before.images + 1, bytes=before.bytes + len(sample.image)))
                rows.add(pq.read_table(loaded / "rows.parquet"))
                failures.add(pq.read_table(loaded / "failures.parquet"))
    writer.close()
    for shard in shard_paths(folder):
        write_offsets(shard)
    return shards


class _TableWriter:
    """Writes tables one after the other in row groups of equal size, so that the file depends on their rows alone."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema)
        self._waiting: pa.Table = schema.empty_table()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self._waiting.num_rows:
            self._writer.write_table(self._waiting.combine_chunks())
        self._writer.close()

    def add(self, table: pa.Table) -> None:
        self._waiting = pa.concat_tables([self._waiting, table])
        while self._waiting.num_rows >= GROUP_ROWS:
            self._writer.write_table(self._waiting.slice(0, GROUP_ROWS).combine_chunks())
            self._waiting = self._waiting.slice(GROUP_ROWS)
