"""The pictures of a selection: which they are comes from its verdicts, what they show from the image shards."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from schemas.errors import BadInput, CorruptArtifact
from schemas.manifest import ImageShards, Manifest, Selection
from stages.shards import Place, index_shard, shard_paths
from stages.workspace import Workspace


def selected_places(images: Manifest[ImageShards], selection: Manifest[Selection], workspace: Workspace) -> list[Place]:
    """Where every selected picture lies, in the order of the keys, with its cleaned caption.

    Raises `BadInput` when the selection was made from other images, and `CorruptArtifact` when a picture is not there.
    """
    if selection.content.source != images.identity:
        raise BadInput(
            f"selection {selection.identity[:12]}: made from the images {selection.content.source[:12]}; expected from {images.identity[:12]}"
        )
    table = pq.read_table(workspace.fetch(selection, ["verdicts.parquet"]) / "verdicts.parquet", columns=["key", "caption", "passed"])
    kept = table.filter(table["passed"])
    captions = dict(zip(kept["key"].to_pylist(), kept["caption"].to_pylist(), strict=True))
    places = [replace(place, caption=captions[place.key]) for place in _places(workspace.fetch(images)) if place.key in captions]
    if len(places) != len(captions):
        raise CorruptArtifact(f"images {images.identity[:12]}: hold {len(places)} of the {len(captions)} selected pictures")
    return places


def _places(folder: Path) -> Iterator[Place]:
    for shard in shard_paths(folder):
        yield from index_shard(shard)
