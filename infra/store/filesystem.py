"""What the store needs of an object storage, and the two that give it: a folder and an S3 bucket.

Both promise: an object appears whole or not at all; `put_new` has one winner; a listing taken after a write shows the write.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from infra.store.settings import StoreSettings
from schemas.errors import BadInput


@dataclass(frozen=True)
class ObjectInfo:
    """One object: its key under the store's root, size in bytes, and when it was written by the store's own clock (seconds since 1970)."""

    key: str
    size: int
    modified: float


class Storage(Protocol):
    """Objects under one root, named by `/`-separated keys.

    Every method raises `BadInput` where the user's set-up is at fault (credentials, bucket, permissions), `Transient` after the last
    retry, `RunFailed` when the disk is full, and `FileNotFoundError` for a key that is not there.
    """

    address: str

    def check(self) -> None:
        """Prove that the root can be listed, written and deleted from. Raises `BadInput`."""

    def now(self) -> float:
        """Time by the clock that stamps objects: ages need no agreement between hosts."""

    def read(self, key: str) -> bytes: ...

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Return bytes `start..stop-1`, fewer where the object ends before."""

    def put(self, key: str, data: bytes) -> None:
        """Write or replace a small object."""

    def put_new(self, key: str, data: bytes) -> bool:
        """Write a small object unless one is there. Exactly one of any number of racing callers gets True."""

    def upload(self, path: Path, key: str, size: int, sha256: str) -> None:
        """Write or replace an object from a local file. Raises `RunFailed` when the file changed since it was hashed."""

    def copy(self, source: str, target: str) -> None:
        """Write or replace an object with the bytes of another, which never leave the store. Objects of up to 5 GB, as S3 copies in one call."""

    def link(self, key: str, path: Path) -> bool:
        """Make `path` another name of the object without moving bytes, where both are on one file system. False where not possible."""

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object whose key starts with `prefix`."""

    def folders(self, parent: str, prefix: str = "") -> list[str]:
        """Return the sorted names directly under `parent/` that start with `prefix` and have objects below them."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those already gone are no error."""

    def leftovers(self, older_than: float) -> Iterator[ObjectInfo]:
        """Yield unfinished writes of killed processes that began before `older_than`; `discard` removes one."""

    def discard(self, leftover: ObjectInfo) -> None: ...


def open_storage(address: str, settings: StoreSettings) -> Storage:
    """Return the storage of `file://PATH`, a plain path, or `s3://BUCKET/PREFIX`, reaching nothing yet. Raises `BadInput`."""
    from infra.store.local import LocalStorage  # noqa: PLC0415

    scheme, separator, rest = address.partition("://")
    if not separator:
        scheme, rest = "file", address
    if scheme == "file":
        if not rest:
            raise BadInput(f"store address {address!r} names no folder: expected file:///folder or a path")
        return LocalStorage(Path(rest).expanduser().absolute())
    if scheme == "s3":
        from infra.store.s3 import S3Storage  # noqa: PLC0415 - botocore is slow to import, and a folder needs none of it

        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise BadInput(f"store address {address!r} names no bucket: expected s3://bucket/prefix")
        return S3Storage(bucket, prefix.strip("/"), settings)
    raise BadInput(f"store address {address!r} has the unknown scheme {scheme!r}: expected file://, s3:// or a path")
