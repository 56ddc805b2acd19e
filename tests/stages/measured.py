"""Measurements without pictures: rows as `measure` writes them, published as its artifact."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.store import ArtifactStore
from schemas.base import digest
from schemas.manifest import Manifest, Measurements
from stages.measure.pictures import MEASUREMENTS, THUMBNAILS
from tests.workspaces import make_workspace

GOOD: dict[str, Any] = {
    "width": 80, "height": 80, "aesthetic": 6.0, "similarity": 0.3, "watermark": 0.1, "unsafe": 0.01, "nsfw": "UNLIKELY",
    "sharpness": 0.5, "high_frequency": 0.5, "animated": False, "unreadable": None,
}  # fmt: skip


def row(number: int, **fields: Any) -> dict[str, Any]:
    """The measurements of picture `number`: a good one but for `fields`."""
    made = {"key": f"{number:010d}", "url": f"http://example.org/{number}", "caption": f"picture number {number}"}
    return made | GOOD | {"sha256": digest(number), "phash": (number * 0x9E3779B97F4A7C15) % 2**64 - 2**63} | fields


def publish_measurements(
    folder: Path,
    store: ArtifactStore,
    rows: list[dict[str, Any]],
    *,
    shard_rows: int = 4,
    numbers: Sequence[int] | None = None,
    thumbnails: bool = False,
    identity: str = "measurements",
) -> Manifest[Measurements]:
    """Publish rows of `MEASUREMENTS` as what `measure` makes. With `thumbnails` each has one: bytes that name its key, called a JPEG."""
    workspace = make_workspace(folder, store, identity=identity)
    with workspace.folder("measurements") as place:
        parts = [rows[start : start + shard_rows] for start in range(0, len(rows), shard_rows)]
        for number, part in zip(numbers or range(len(parts)), parts, strict=True):
            pq.write_table(pa.Table.from_pylist(part, MEASUREMENTS), place / f"measurements-{number:05d}.parquet")
            small = [{"key": one["key"], "thumbnail": b"\xff\xd8" + one["key"].encode() if thumbnails else None} for one in part]
            pq.write_table(pa.Table.from_pylist(small, THUMBNAILS), place / f"thumbnails-{number:05d}.parquet", row_group_size=3)
        return workspace.publish(place, Measurements(source=digest("images"), images=len(rows), shards=len(parts)))
