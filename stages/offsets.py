"""Where each picture lies inside its shard, so that one can be read from the store by a range, without the rest of its shard.

An `image_shards` artifact holds `offsets-NNNNN.parquet` beside each `shard-NNNNN.tar`. For shards without it the headers of the tar are read
by ranges, about one small request a picture.
"""

import io
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import CorruptArtifact
from schemas.manifest import ImageShards, Manifest
from stages.shards import shard_names
from stages.workspace import Workspace

OFFSETS: Final = pa.schema(
    [
        ("key", pa.string()),
        ("extension", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),  # bytes
        ("row_offset", pa.int64()),  # of the JSON that tells of the picture
        ("row_size", pa.int64()),
    ]
)
_BLOCK: Final = 16 * 2**10
"""Bytes read at once while looking for headers: small files between two pictures come with them."""
_READERS: Final = 16
"""Shards, or tables of offsets, looked at at the same time: what is waited for is the store."""


def write_offsets(shard: Path) -> Path:
    """Write the table of a shard beside it and return its path. Raises `CorruptArtifact` when it is no whole webdataset shard."""
    path = shard.with_name(offsets_name(shard.name))
    with shard.open("rb") as stream:
        pq.write_table(scan_offsets(stream, shard.name), path)
    return path


def offsets_name(shard: str) -> str:
    """Name of the table of a shard's offsets: `offsets-00000.parquet` for `shard-00000.tar`."""
    return f"offsets-{shard.removeprefix('shard-').removesuffix('.tar')}.parquet"


def read_offsets(images: Manifest[ImageShards], workspace: Workspace) -> list[pa.Table]:
    """The offsets of every shard, in order. No shard is fetched. Raises `CorruptArtifact`."""
    names = shard_names(images)
    files = {entry.path: entry.size for entry in images.files}
    tables = [offsets_name(name) for name in names]
    present = [table for table in tables if table in files]
    folder = workspace.fetch(images, present) if present else None

    def offsets(name: str) -> pa.Table:
        if folder is not None and offsets_name(name) in files:
            return pq.read_table(folder / offsets_name(name), schema=OFFSETS)
        stream = RangeStream(lambda start, stop: workspace.read_range(images, name, start, stop), files[name])
        return scan_offsets(io.BufferedReader(stream, _BLOCK), name)

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(offsets, names))


def scan_offsets(stream: IO[bytes], name: str) -> pa.Table:
    """Read the headers of a shard and return its `OFFSETS`, in order. Raises `CorruptArtifact` when it is no whole webdataset shard."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise CorruptArtifact(f"{name}: not a whole tar file ({error})") from error
    rows: list[dict[str, Any]] = []
    for key, members in found.items():
        pictures = [extension for extension in members if extension not in ("json", "txt")]
        if len(pictures) != 1 or len(members) != 3:
            raise CorruptArtifact(f"{name}: sample {key} has {', '.join(sorted(members))}; expected one picture, json and txt")
        (image_offset, image_size), (row_offset, row_size) = members[pictures[0]], members["json"]
        places = {"image_offset": image_offset, "image_size": image_size, "row_offset": row_offset, "row_size": row_size}
        rows.append({"key": key, "extension": pictures[0], **places})
    return pa.Table.from_pylist(rows, OFFSETS)


class RangeStream(io.RawIOBase):
    """A file on the store: each read is one range request, so it is read through a buffer."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        """`read(start, stop)` returns those bytes of the file, whose `size` is in bytes."""
        self._read, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move without reading."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read into the buffer, less at the file's end."""
        stop = min(self._position + len(buffer), self._size)
        data = self._read(self._position, stop) if self._position < stop else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
