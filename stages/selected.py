"""The pictures of a selection: which they are comes from its verdicts, where they lie from the image shards' offsets.

What is held in memory is a table of Arrow columns, some 150 bytes a picture with its caption; pictures are read one by one from the store, or
shard by shard.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.errors import BadInput, CorruptArtifact
from schemas.manifest import ImageShards, Manifest, Selection
from stages.offsets import read_offsets
from stages.shards import Sample, shard_names
from stages.workspace import Workspace

_PASSED: Final = pa.schema(
    [("key", pa.string()), ("caption", pa.large_string()), ("width", pa.int64()), ("height", pa.int64())]
)  # captions together can be longer than the 2 GB of a plain string column
_BATCH_ROWS: Final = 2**17


@dataclass(frozen=True, eq=False)
class SelectedPictures:
    """The selected pictures in the order of their keys, each with its cleaned caption."""

    images: Manifest[ImageShards]
    workspace: Workspace
    table: pa.Table
    """One chunk of `shard` (its number), the columns of `stages.offsets.OFFSETS`, `caption`, `width` and `height` (pixels, upright)."""

    @classmethod
    def open(cls, images: Manifest[ImageShards], selection: Manifest[Selection], workspace: Workspace) -> Self:
        """Join verdicts and offsets; no shard is fetched.

        Raises `BadInput` when the selection was made from other images, and `CorruptArtifact` when a picture is not there.
        """
        if selection.content.source != images.identity:
            raise BadInput(
                f"selection {selection.identity[:12]}: made from the images {selection.content.source[:12]}; expected from {images.identity[:12]}"
            )
        passed = _passed(selection, workspace)
        kept: list[pa.Table] = []
        for number, offsets in enumerate(read_offsets(images, workspace)):
            kept.append(offsets.append_column("shard", pa.array(np.full(offsets.num_rows, number, np.int32))))
        places = pa.concat_tables(kept)
        row = pc.index_in(places["key"], value_set=passed["key"])  # one hash table for all
        is_selected = pc.is_valid(row)
        places, row = places.filter(is_selected), row.filter(is_selected)
        if places.num_rows != passed.num_rows:
            raise CorruptArtifact(f"images {images.identity[:12]}: hold {places.num_rows} of the {passed.num_rows} selected pictures")
        table = places
        for name in ("caption", "width", "height"):
            table = table.append_column(name, passed[name].take(row))
        return cls(images, workspace, table.combine_chunks())

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[Sample]:
        """Yield every picture in order. One shard at a time is fetched, verified, and released when it is done with."""
        names = shard_names(self.images)
        for batch in self.table.to_batches(max_chunksize=_BATCH_ROWS):
            for number in batch["shard"].unique().to_pylist():
                path = self.workspace.fetch(self.images, [names[number]]) / names[number]
                with path.open("rb") as stream:

                    def read(start: int, stop: int, stream: Any = stream) -> bytes:
                        stream.seek(start)
                        data: bytes = stream.read(stop - start)
                        return data

                    for place in batch.filter(pc.equal(batch["shard"], number)).to_pylist():
                        yield _sample(place, read, f"{self.images.identity[:12]}/{names[number]}")
                self.workspace.release(self.images, [names[number]])


def read_picture(workspace: Workspace, images: Manifest[ImageShards], shard: str, place: Mapping[str, Any]) -> Sample:
    """Read one selected picture by one range of its shard; `place` is a row of `SelectedPictures.table`.

    Raises `CorruptArtifact` when its bytes are not those that were ingested (their SHA-256 is in the picture's row).
    """
    return _sample(place, lambda start, stop: workspace.read_range(images, shard, start, stop), f"{images.identity[:12]}/{shard}")


def _sample(place: Mapping[str, Any], read: Callable[[int, int], bytes], where: str) -> Sample:
    spans = [(place[f"{part}_offset"], place[f"{part}_size"]) for part in ("image", "row")]
    start, stop = min(offset for offset, _ in spans), max(offset + size for offset, size in spans)
    data = read(start, stop)
    image, row = (data[offset - start : offset - start + size] for offset, size in spans)
    if len(data) != stop - start:
        raise CorruptArtifact(f"{where}: {place['key']} is cut short")
    try:
        known = json.loads(row)
    except ValueError as error:
        raise CorruptArtifact(f"{where}: the JSON of {place['key']} cannot be read ({error})") from error
    expected, found = known.get("sha256"), hashlib.sha256(image).hexdigest()
    if expected != found:
        raise CorruptArtifact(f"{where}: picture {place['key']}: expected SHA-256 {expected}, found {found}")
    return Sample(place["key"], place["extension"], image, place["caption"], known)


def _passed(selection: Manifest[Selection], workspace: Workspace) -> pa.Table:
    """The verdicts of the pictures that passed, in one chunk; those that did not are never in memory together."""
    path = workspace.fetch(selection, ["verdicts.parquet"]) / "verdicts.parquet"
    kept = []
    with pq.ParquetFile(path) as verdicts:
        for batch in verdicts.iter_batches(_BATCH_ROWS, columns=[*_PASSED.names, "passed"]):
            chosen = batch.filter(batch["passed"])
            kept.append(pa.table([chosen[name].cast(_PASSED.field(name).type) for name in _PASSED.names], schema=_PASSED))
    return pa.concat_tables([_PASSED.empty_table(), *kept]).combine_chunks()
