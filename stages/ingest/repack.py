"""From what img2dataset left, in the order its threads happened to finish, to shards that are a function of their content."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.base import Model
from schemas.data import IngestConfig
from stages.ingest.fetch import Downloads, Fetched, fetch_rows, reason_and_detail
from stages.ingest.rules import normalised_label
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
STATED_SCORES: Final = ("aesthetic", "similarity", "watermark", "unsafe")
FAILURES_SCHEMA: Final = pa.schema([("key", pa.string()), ("url", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


class Chunk(Model):
    """What one chunk of the table came to."""

    images: int
    failures: dict[str, int]
    downloads: Downloads


def key_of(row: int) -> str:
    """The key of a row: its number in the table, with zeros to sort by."""
    return f"{row:010d}"


def make_chunk(rows: pa.Table, config: IngestConfig, scratch: Path, folder: Path, shared: str | None = None) -> Chunk:
    """Fetch `rows` (`ROW_SCHEMA`) and write one shard, `rows.parquet` and `failures.parquet` into `folder`. Raises what `fetch_rows` does."""
    groups, downloads = fetch_rows(rows, config, scratch, shared)
    facts: dict[int, PictureFacts | str] = {}
    for group in map_processes(inspect_group, groups, config.processes):
        facts |= group
    fetched = {outcome.row: outcome for group in groups for outcome in group}

    writer = ShardWriter(folder, rows.num_rows)
    attempted: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    for row in rows.to_pylist():
        key, fact = key_of(row["row"]), facts[row["row"]]
        label = row["nsfw"] and normalised_label(row["nsfw"])
        entry = {name: row[name] for name in ("url", "caption", *STATED_SCORES)}
        entry |= {"key": key, "stated_width": row["width"], "stated_height": row["height"], "nsfw": label}
        if isinstance(fact, str):
            reason, detail = reason_and_detail(fact)
            failed.append({"key": key, "url": row["url"], "reason": reason, "detail": detail})
            attempted.append(entry | {"width": None, "height": None, "sha256": None, "failure": reason})
            continue
        known = {"width": fact.width, "height": fact.height, "sha256": fact.sha256}
        attempted.append(entry | known | {"failure": None})
        stated = {name: finite(row[name]) for name in STATED_SCORES} | {"nsfw": label or None}
        writer.add(Sample(key, fact.extension, fetched[row["row"]].read(), row["caption"], {"url": row["url"]} | known | stated))
    writer.close()
    pq.write_table(pa.Table.from_pylist(attempted, ROWS_SCHEMA), folder / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(failed, FAILURES_SCHEMA), folder / "failures.parquet")
    counts = Counter(failure["reason"] for failure in failed)
    return Chunk(images=writer.images, failures=dict(sorted(counts.items())), downloads=downloads)


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
