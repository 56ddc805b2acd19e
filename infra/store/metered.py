"""A storage whose traffic is counted: what a stage run reads and writes, in however many processes."""

import os
import struct
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from infra.store.filesystem import ObjectInfo, Storage

_RECORD = struct.Struct("<QQ")


class Traffic:
    """Bytes read and written, summed over all processes that are handed it: each counts in a file of its own, which outlives its death."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._forget()

    def _forget(self) -> None:
        self._pid = 0
        self._counted = (0, 0)
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def add(self, *, read: int = 0, written: int = 0) -> None:
        """Count bytes of this process."""
        if self._pid not in (0, os.getpid()):
            self._forget()  # forked: the file is the parent's
        with self._lock:
            if self._file is None:
                self._file, self._pid = (self._folder / uuid.uuid4().hex).open("wb", buffering=0), os.getpid()
            self._counted = (self._counted[0] + read, self._counted[1] + written)
            os.pwrite(self._file.fileno(), _RECORD.pack(*self._counted), 0)  # one call: a reader finds it whole

    def total(self) -> tuple[int, int]:
        """Bytes read and written by all processes so far."""
        records = [path.read_bytes() for path in self._folder.iterdir()]
        counted = [_RECORD.unpack(record) for record in records if len(record) == _RECORD.size]
        return sum(read for read, _ in counted), sum(written for _, written in counted)


class MeteredStorage:
    """Another storage, with the bytes of objects counted that come from it and go to it. Listings, and copies inside the store, move none."""

    def __init__(self, storage: Storage, traffic: Traffic) -> None:
        self._storage, self._traffic = storage, traffic
        self.address = storage.address

    def check(self) -> None:
        self._storage.check()

    def now(self) -> float:
        return self._storage.now()

    def read(self, key: str) -> bytes:
        data = self._storage.read(key)
        self._traffic.add(read=len(data))
        return data

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        data = self._storage.read_range(key, start, stop)
        self._traffic.add(read=len(data))
        return data

    def put(self, key: str, data: bytes) -> None:
        self._storage.put(key, data)
        self._traffic.add(written=len(data))

    def put_new(self, key: str, data: bytes) -> bool:
        new = self._storage.put_new(key, data)
        self._traffic.add(written=len(data) if new else 0)
        return new

    def upload(self, path: Path, key: str, size: int, sha256: str) -> None:
        self._storage.upload(path, key, size, sha256)
        self._traffic.add(written=size)

    def copy(self, source: str, target: str) -> None:
        self._storage.copy(source, target)

    def link(self, key: str, path: Path) -> bool:
        linked = self._storage.link(key, path)
        if linked:  # whoever links a file reads it, to verify it
            self._traffic.add(read=path.stat().st_size)
        return linked

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._storage.objects(prefix)

    def folders(self, parent: str, prefix: str = "") -> list[str]:
        return self._storage.folders(parent, prefix)

    def delete(self, keys: Sequence[str]) -> None:
        self._storage.delete(keys)

    def leftovers(self, older_than: float) -> Iterator[ObjectInfo]:
        return self._storage.leftovers(older_than)

    def discard(self, leftover: ObjectInfo) -> None:
        self._storage.discard(leftover)
