"""The stage `ingest`: URL table to webdataset shards of downloaded pictures, chunk by chunk, each finished chunk kept on the store."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping

import pyarrow as pa

from schemas.base import Model
from schemas.data import IngestConfig
from schemas.errors import BadInput, RunFailed
from schemas.manifest import ImageShards, Manifest
from schemas.recipe import Recipe
from stages.ingest.assemble import ShardFacts, assemble
from stages.ingest.fetch import Downloads, check_installed
from stages.ingest.repack import Chunk, make_chunk
from stages.ingest.rules import MetadataFilter
from stages.ingest.table import ROW_SCHEMA, UrlTable
from stages.workspace import Workspace

logger = logging.getLogger(__name__)


class Inputs(Model):
    """`ingest` reads no artifact."""


class Statistics(Model):
    """`statistics.json`: what became of every row. Facts only, no times, so that the file is the same when it is made again."""

    rows_in_table: int
    rows_dropped: dict[str, int]
    images: int
    failures: dict[str, int]
    img2dataset: Downloads
    """A file that is fetched and is no picture is a success here."""
    shards: list[ShardFacts]
    """In order."""


def preflight(config: IngestConfig, outside: Mapping[str, str], recipe: Recipe) -> None:
    """Look for img2dataset, and read the first rows of the table.

    Raises `BadInput` when that is not installed, when the table cannot be read or lacks a column, and when `select` will ask for an aesthetic
    score that neither the table has nor a predictor gives: every picture would be downloaded to be dropped.
    """
    check_installed(config)
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
    kept = {part.name: Chunk.model_validate(part.note) for part in workspace.parts()}
    done: dict[str, Chunk] = {}
    for number, rows in enumerate(_chunks(metadata.passing(table.batches()), config.chunk_rows)):
        name = chunk_name(number * config.chunk_rows, rows.num_rows)
        done[name] = kept[name] if name in kept else _fetch_chunk(config, workspace, name, rows, list(done.values()))
        images = sum(chunk.images for chunk in done.values())
        workspace.progress.update(metadata.seen, max(table.rows or 0, metadata.seen), "rows", {"images": images})
    _check_some_passed(metadata, workspace.outside["table"])
    chunks = list(done.values())
    _check_failures(chunks, config, final=True)
    with workspace.folder("image-shards") as folder:
        shards = assemble(workspace, folder, list(done), config.shard_images)
        content = ImageShards(
            rows_in_table=metadata.seen,
            rows_dropped=metadata.counts(),
            images=sum(chunk.images for chunk in chunks),
            failures=_failures(chunks),
            shards=len(shards),
        )
        downloads = sum((chunk.downloads for chunk in chunks), Downloads())
        statistics = Statistics(
            rows_in_table=content.rows_in_table,
            rows_dropped=content.rows_dropped,
            images=content.images,
            failures=content.failures,
            img2dataset=downloads,
            shards=shards,
        )
        (folder / "statistics.json").write_text(statistics.model_dump_json(indent=1) + "\n")
        logger.info("%d rows, %d images; dropped %s; failed %s", metadata.seen, content.images, content.rows_dropped, content.failures)
        return workspace.publish(folder, content)


def chunk_name(first: int, rows: int) -> str:
    """Name of the part that keeps `rows` rows, the first being the `first` that passes: after another `chunk_rows` only equal pieces are found."""
    return f"chunk-{first:010d}-{rows}"


def _fetch_chunk(config: IngestConfig, workspace: Workspace, name: str, rows: pa.Table, before: list[Chunk]) -> Chunk:
    shared = config.shared_folder and f"{config.shared_folder.rstrip('/')}/{workspace.identity[:16]}-{name}"
    with workspace.folder("download") as scratch, workspace.folder("chunk") as folder:
        chunk = make_chunk(rows, config, scratch, folder, shared)
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
