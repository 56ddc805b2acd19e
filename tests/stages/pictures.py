"""Small pictures and artifacts made of them, as functions of a seed."""

import hashlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from infra.store import ArtifactStore
from schemas.manifest import ImageShards, Manifest, Selection
from stages.pictures import decode_rgb
from stages.shards import Sample, ShardWriter, read_samples, shard_paths
from tests.workspaces import make_workspace


def noise(seed: int, width: int, height: int) -> Image.Image:
    """White noise: as sharp as a picture can be."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    """The file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def sample(number: int, data: bytes, *, caption: str | None = None, **row: Any) -> Sample:
    """A captioned picture with the key of row `number`."""
    known = {"url": f"http://example.org/{number}", "width": 0, "height": 0, "aesthetic": 6.0, "sha256": hashlib.sha256(data).hexdigest()}
    return Sample(f"{number:010d}", "png", data, f"picture {number}" if caption is None else caption, known | row)


def publish_images(folder: Path, store: ArtifactStore, samples: Iterable[Sample], *, shard_images: int = 4) -> Manifest[ImageShards]:
    """Publish samples as what `ingest` makes, without its tables."""
    workspace = make_workspace(folder, store, identity="images")
    with workspace.folder("images") as place:
        writer = ShardWriter(place, shard_images)
        for one in samples:
            writer.add(one)
        writer.close()
        return workspace.publish(place, ImageShards(rows_in_table=writer.images, images=writer.images, shards=writer.shards))


Chosen = dict[str, Any]
"""The inputs `images` and `selection` of a stage."""


def publish_selected(folder: Path, store: ArtifactStore, samples: Iterable[Sample], *, shard_images: int = 4) -> Chosen:
    """Publish samples as images and as a selection of them all."""
    images = publish_images(folder, store, samples, shard_images=shard_images)
    workspace = make_workspace(folder, store, identity="selection")
    rows = []
    for shard in shard_paths(workspace.fetch(images)):
        for one in read_samples(shard):
            width, height = decode_rgb(one.image)[0].size
            rows.append({"key": one.key, "caption": one.caption, "passed": True, "reason": None, "width": width, "height": height})
    with workspace.folder("selection") as place:
        pq.write_table(pa.Table.from_pylist(rows), place / "verdicts.parquet")
        selection = workspace.publish(place, Selection(source=images.identity, images_in=len(rows), images=len(rows)))
    return {"images": images, "selection": selection}


def hashes(manifest: Manifest[Any]) -> Mapping[str, str]:
    """SHA-256 of every file."""
    return {entry.path: entry.sha256 for entry in manifest.files}
