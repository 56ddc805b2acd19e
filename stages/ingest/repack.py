"""From what img2dataset left, in the order its threads happened to finish, to shards that are a function of their content."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.base import Model
from schemas.data import IngestConfig
from stages.ingest.fetch import Fetched, fetch_rows, reason_and_detail
from stages.parallel import map_processes
from stages.pictures import BrokenPictureError, PictureFacts, inspect_picture
from stages.shards import Sample, ShardWriter

ROWS_SCHEMA: Final = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("stated_width", pa.float64()),
        ("stated_height", pa.float64()),
        ("aesthetic", pa.float64()),  # as stated, as the four below; null where the table does not say
        ("similarity", pa.float64()),
        ("watermark", pa.float64()),
        ("unsafe", pa.float64()),
        ("nsfw", pa.string()),
        ("width", pa.int64()),  # of the decoded picture; null where there is none
        ("height", pa.int64()),
        ("sha256", pa.string()),
        ("failure", pa.string()),  # null: fetched
    ]
)
FAILURES_SCHEMA: Final = pa.schema([("key", pa.string()), ("url", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


class Chunk(Model):
    """What one chunk of the table came to."""

    images: int
    failures: dict[str, int]


def key_of(row: int) -> str:
    """The key of a row: its number in the table, with zeros to sort by."""
    return f"{row:010d}"


def make_chunk(rows: pa.Table, config: IngestConfig, scratch: Path, folder: Path) -> Chunk:
    """Fetch `rows` (`ROW_SCHEMA`) and write shards, `rows.parquet` and `failures.parquet` into `folder`. Raises what `fetch_rows` does."""
    groups = fetch_rows(rows, config, scratch)
    facts: dict[int, PictureFacts | str] = {}
    for group in map_processes(inspect_group, groups, config.processes):
        facts |= group
    fetched = {outcome.row: outcome for group in groups for outcome in group}

    writer = ShardWriter(folder, config.shard_images)
    attempted: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    for row in rows.to_pylist():
        key, fact = key_of(row["row"]), facts[row["row"]]
        entry = {name: row[name] for name in ("url", "caption", "aesthetic")}
        entry |= {"key": key, "stated_width": row["width"], "stated_height": row["height"]}
        if isinstance(fact, str):
            reason, detail = reason_and_detail(fact)
            failed.append({"key": key, "url": row["url"], "reason": reason, "detail": detail})
            attempted.append(entry | {"width": None, "height": None, "sha256": None, "failure": reason})
            continue
        attempted.append(entry | {"width": fact.width, "height": fact.height, "sha256": fact.sha256, "failure": None})
        known = {
            "url": row["url"],
            "width": fact.width,
            "height": fact.height,
            "aesthetic": finite(row["aesthetic"]),
            "sha256": fact.sha256,
        }
        writer.add(Sample(key, fact.extension, fetched[row["row"]].read(), row["caption"], known))
    writer.close()
    pq.write_table(pa.Table.from_pylist(attempted, ROWS_SCHEMA), folder / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(failed, FAILURES_SCHEMA), folder / "failures.parquet")
    counts: dict[str, int] = {}
    for failure in failed:
        counts[failure["reason"]] = counts.get(failure["reason"], 0) + 1
    return Chunk(images=writer.images, failures=dict(sorted(counts.items())))


def inspect_group(group: Sequence[Fetched]) -> dict[int, PictureFacts | str]:
    """Decode every fetched file of one tar; by row, its facts or why it failed."""
    return {outcome.row: outcome.failure if outcome.failure is not None else _inspect(outcome) for outcome in group}


def _inspect(outcome: Fetched) -> PictureFacts | str:
    try:
        return inspect_picture(outcome.read())
    except BrokenPictureError as error:
        return error.reason


def finite(score: float | None) -> float | None:
    """`score`, or None where it is none or not a number."""
    return score if score is not None and abs(score) < float("inf") else None
