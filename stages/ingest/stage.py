"""The stage `ingest`: URL table to webdataset shards of downloaded pictures, chunk by chunk, each finished chunk kept."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.base import Model
from schemas.data import IngestConfig
from schemas.errors import BadInput, RunFailed
from schemas.manifest import ImageShards, Manifest
from schemas.recipe import Recipe
from stages.ingest.fetch import check_installed
from stages.ingest.repack import FAILURES_SCHEMA, ROWS_SCHEMA, Chunk, make_chunk
from stages.ingest.rules import MetadataFilter
from stages.ingest.table import ROW_SCHEMA, UrlTable
from stages.shards import move_shards, shard_paths
from stages.workspace import Workspace

logger = logging.getLogger(__name__)

ROWS_PER_CHUNK: Final = 10_000
"""Rows fetched by one start of the downloader, which takes seconds, and lost at most to a kill."""


class Inputs(Model):
    """`ingest` reads no artifact."""


def preflight(config: IngestConfig, outside: Mapping[str, str], recipe: Recipe) -> None:
    """Look for img2dataset, and read the first rows of the table.

    Raises `BadInput` when that is not installed, when the table cannot be read or lacks a column, and when `select` will ask for an aesthetic
    score that neither the table has nor a predictor gives: every picture would be downloaded to be dropped.
    """
    check_installed()
    table = UrlTable(outside["table"], config.columns)
    next(table.batches(), None)
    bound = recipe.select.min_aesthetic
    if bound is not None and recipe.measure.aesthetic_predictor is None and not table.has("aesthetic"):
        raise BadInput(
            f"select.min_aesthetic = {bound:g}: ingest.table {outside['table']} has no column with a score; expected one of "
            f"{', '.join(config.columns.aesthetic)} (recipe: ingest.columns.aesthetic), or measure.aesthetic_predictor, or null"
        )


def run(config: IngestConfig, inputs: Inputs, workspace: Workspace) -> Manifest[ImageShards]:  # noqa: ARG001
    """Make the artifact `image_shards` from the table at `workspace.outside["table"]`.

    Raises `BadInput` for a table that cannot be used, and `RunFailed` when no row passes its metadata, when no picture comes through, or when more
    than `max_failed_fraction` of the downloads fail.
    """
    table = UrlTable(workspace.outside["table"], config.columns)
    metadata = MetadataFilter(config)
    size = config.shard_images * max(1, ROWS_PER_CHUNK // config.shard_images)
    kept = {part.name: Chunk.model_validate(part.note) for part in workspace.parts()}
    done: list[Chunk] = []
    for number, rows in enumerate(_chunks(metadata.passing(table.batches()), size)):
        name = f"chunk-{number:05d}"
        done.append(kept[name] if name in kept else _fetch_chunk(config, workspace, name, rows, done))
        workspace.progress.update(
            metadata.seen, max(table.rows or 0, metadata.seen), "rows", {"images": sum(chunk.images for chunk in done)}
        )
    _check_some_passed(metadata, workspace.outside["table"])
    _check_failures(done, config, final=True)
    with workspace.folder("image-shards") as folder:
        shards = _assemble(workspace, folder, len(done))
        content = ImageShards(
            rows_in_table=metadata.seen,
            rows_dropped=metadata.counts(),
            images=sum(chunk.images for chunk in done),
            failures=_failures(done),
            shards=shards,
        )
        logger.info("%d rows, %d images; dropped %s; failed %s", metadata.seen, content.images, content.rows_dropped, content.failures)
        return workspace.publish(folder, content)


def _fetch_chunk(config: IngestConfig, workspace: Workspace, name: str, rows: pa.Table, before: list[Chunk]) -> Chunk:
    with workspace.folder("download") as scratch, workspace.folder("chunk") as folder:
        chunk = make_chunk(rows, config, scratch, folder)
        # A chunk that breaks the limit is not kept: once the network is mended, the same command fetches it again.
        _check_failures([*before, chunk], config, final=False)
        workspace.save_part(name, folder, chunk.model_dump(mode="json"))
    return chunk


def _chunks(batches: Iterator[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    """Cut a stream of batches into tables of `size` rows, the last one smaller."""
    waiting: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        rest = batch
        while count + rest.num_rows >= size:
            waiting.append(rest.slice(0, size - count))
            rest = rest.slice(size - count)
            yield pa.Table.from_batches(waiting, ROW_SCHEMA)
            waiting, count = [], 0
        if rest.num_rows:
            waiting.append(rest)
            count += rest.num_rows
    if waiting:
        yield pa.Table.from_batches(waiting, ROW_SCHEMA)


def _check_some_passed(metadata: MetadataFilter, address: str) -> None:
    if metadata.seen == sum(metadata.dropped.values()):
        raise RunFailed(
            f"ingest.table {address}: none of its {metadata.seen} rows passes by its metadata; dropped: {_listed(metadata.counts())}"
        )


def _check_failures(chunks: list[Chunk], config: IngestConfig, *, final: bool) -> None:
    images, failures = sum(chunk.images for chunk in chunks), _failures(chunks)
    failed = sum(failures.values())
    attempted = images + failed
    if failed > config.max_failed_fraction * attempted:
        raise RunFailed(
            f"{failed} of {attempted} downloads failed, more than ingest.max_failed_fraction = {config.max_failed_fraction:g}: {_listed(failures)}"
        )
    if final and images == 0:
        raise RunFailed(f"none of {attempted} downloads gave a picture: {_listed(failures)}")


def _failures(chunks: list[Chunk]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for chunk in chunks:
        total.update(chunk.failures)
    return dict(sorted(total.items()))


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))) or "nothing"


def _assemble(workspace: Workspace, folder: Path, chunks: int) -> int:
    """Join the chunks kept as parts: their shards numbered through, their tables one after the other. Returns the number of shards."""
    shards = 0
    with (
        pq.ParquetWriter(folder / "rows.parquet", ROWS_SCHEMA) as rows,
        pq.ParquetWriter(folder / "failures.parquet", FAILURES_SCHEMA) as failures,
    ):
        parts = {part.name: part for part in workspace.parts()}
        for number in range(chunks):
            with workspace.folder("part") as place:
                loaded = workspace.load_part(parts[f"chunk-{number:05d}"], place)
                shards = move_shards(shard_paths(loaded), folder, shards)
                rows.write_table(pq.read_table(loaded / "rows.parquet"))
                failures.write_table(pq.read_table(loaded / "failures.parquet"))
    return shards
