"""Webdataset tar shards, byte for byte a function of what is in them: KEY.jpg|png|webp, KEY.json, KEY.txt, sorted, without dates or owners."""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.base import canonical_json
from schemas.errors import CorruptArtifact
from schemas.manifest import ImageShards, Manifest


@dataclass(frozen=True)
class Sample:
    """One captioned picture."""

    key: str
    extension: str
    image: bytes
    """The file as downloaded."""
    caption: str
    row: Mapping[str, Any]
    """What is known of it: `url`, `width`, `height` (pixels, upright) and `sha256`; null where the table has none: `aesthetic`, `similarity`,
    `watermark`, `unsafe`, `nsfw`."""


@dataclass(frozen=True)
class Place:
    """Where a sample lies, so that it can be read without reading its shard."""

    key: str
    extension: str
    shard: Path
    members: Mapping[str, tuple[int, int]]
    """Offset and size in bytes by extension."""

    def read(self) -> Sample:
        """Read the sample. Raises `CorruptArtifact` where the shard is shorter than its directory says."""
        parts: dict[str, bytes] = {}
        with self.shard.open("rb") as stream:
            for extension, (offset, size) in self.members.items():
                stream.seek(offset)
                parts[extension] = stream.read(size)
                if len(parts[extension]) != size:
                    raise CorruptArtifact(f"{self.shard}: {self.key}.{extension} is cut short")
        return Sample(self.key, self.extension, parts[self.extension], parts["txt"].decode(), json.loads(parts["json"]))


def shard_paths(folder: Path) -> list[Path]:
    """The shards of an `image_shards` folder, in order."""
    return sorted(folder.glob("shard-*.tar"), key=lambda path: (len(path.name), path.name))


def shard_names(images: Manifest[ImageShards]) -> list[str]:
    """Names of the shards of an artifact, in order, without fetching one."""
    names = [entry.path for entry in images.files if entry.path.startswith("shard-") and entry.path.endswith(".tar")]
    return sorted(names, key=lambda name: (len(name), name))


def index_shard(path: Path) -> list[Place]:
    """List the samples of a shard, in order, reading headers only. Raises `CorruptArtifact` when it is no whole webdataset shard."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in index_tar(path):
        key, _, extension = name.partition(".")
        found.setdefault(key, {})[extension] = (offset, size)
    places = []
    for key, members in found.items():
        images = [extension for extension in members if extension not in ("json", "txt")]
        if len(images) != 1 or len(members) != 3:
            raise CorruptArtifact(f"{path}: sample {key} has {', '.join(sorted(members))}; expected one picture, json and txt")
        places.append(Place(key, images[0], path, members))
    return places


def index_tar(path: Path) -> list[tuple[str, int, int]]:
    """Name, offset and size (bytes) of every member, reading headers only. Raises `CorruptArtifact` when it is no whole tar file."""
    try:
        with tarfile.open(path, "r:") as tar:
            return [(member.name, member.offset_data, member.size) for member in tar]
    except tarfile.TarError as error:
        raise CorruptArtifact(f"{path}: not a whole tar file ({error})") from error


def read_samples(path: Path) -> Iterator[Sample]:
    """Yield the samples of a shard in order. Raises `CorruptArtifact`."""
    return (place.read() for place in index_shard(path))


class ShardWriter:
    """Writes samples, given in the order of their keys, to `shard-00000.tar`, `shard-00001.tar`, ... of `shard_images` each."""

    def __init__(self, folder: Path, shard_images: int) -> None:
        self.folder, self.shard_images = folder, shard_images
        self.images = 0
        self._tar: tarfile.TarFile | None = None

    @property
    def shards(self) -> int:
        """Number of shards begun."""
        return -(-self.images // self.shard_images)

    def add(self, sample: Sample) -> None:
        """Append one sample."""
        if self.images % self.shard_images == 0:
            self.close()
            path = self.folder / f"shard-{self.shards:05d}.tar"
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed when the shard is full
        assert self._tar is not None
        members = {sample.extension: sample.image, "json": canonical_json(sample.row), "txt": sample.caption.encode()}
        for extension in sorted(members):
            header = tarfile.TarInfo(f"{sample.key}.{extension}")  # its defaults are date 0, owner 0, mode 0644
            header.size = len(members[extension])
            self._tar.addfile(header, io.BytesIO(members[extension]))
        self.images += 1

    def close(self) -> None:
        """Finish the shard in hand."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None
