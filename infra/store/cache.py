"""The local read cache: whole verified files, kept under a size limit, shared by the processes of a host.

An index (SQLite) holds each file's size and last use, and who has it pinned. A process pins what it fetches; its pins hold while it
lives, which others see by a lock the kernel drops with the process. So a file in use is never evicted, and kill -9 leaves nothing to clean.
"""

import contextlib
import fcntl
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from infra.store.local import disk_error, is_disk_full
from schemas.errors import BadInput, RunFailed
from schemas.manifest import FileEntry

logger = logging.getLogger(__name__)

TABLES = (
    "create table if not exists entries (folder text, path text, size integer, used real, primary key (folder, path))",
    "create table if not exists pins (owner text, folder text, path text, primary key (owner, folder, path))",
)


@dataclass
class _Owner:
    """This process, as the other users of one cache folder see it."""

    name: str
    pid: int
    lock: BinaryIO
    pinned: set[tuple[str, str]] = field(default_factory=set)
    verified: set[tuple[str, str]] = field(default_factory=set)


_owners: dict[Path, _Owner] = {}
"""One for each cache folder, kept for the life of the process: a fetched path stays good after its store was dropped."""


class ReadCache:
    """Files as `artifacts/<name of the artifact's bytes>/<path>` below `folder`."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    def check(self) -> None:
        """Prove that the folder can be used. Raises `BadInput`, and `RunFailed` when the disk is full."""
        self._owner()

    def claim(self, name: str, entries: Sequence[FileEntry]) -> Path:
        """Pin files for this process, before they are read or downloaded, and make room for them. Returns the artifact's folder."""
        owner = self._owner()
        wanted = [(name, entry.path) for entry in entries]
        if not owner.pinned.issuperset(wanted):
            now = time.time()
            with self._index() as index:
                index.executemany(
                    "insert into entries values (?, ?, ?, ?) on conflict do update set size = excluded.size, used = excluded.used",
                    [(name, entry.path, entry.size, now) for entry in entries],
                )
                index.executemany("insert or ignore into pins values (?, ?, ?)", [(owner.name, *key) for key in wanted])
                self._evict(index)
            owner.pinned.update(wanted)
        return self.folder / "artifacts" / name

    def release(self, name: str | None = None, paths: Sequence[str] | None = None) -> None:
        """Unpin what this process has fetched: everything, one artifact, or some of its files. They may be evicted from now on."""
        owner = self._owner()
        dropped = {key for key in owner.pinned if name in (None, key[0]) and (paths is None or key[1] in paths)}
        if dropped:
            with self._index() as index:
                index.executemany("delete from pins where owner = ? and folder = ? and path = ?", [(owner.name, *key) for key in dropped])
                self._evict(index)
            owner.pinned -= dropped

    def is_verified(self, name: str, path: str) -> bool:
        """True where this process has hashed the file before."""
        return (name, path) in self._owner().verified

    def mark_verified(self, name: str, path: str) -> None:
        self._owner().verified.add((name, path))

    def temporary(self) -> Path:
        """Return a path for a file that is not whole yet, removed with its process."""
        return self.folder / "tmp" / f"{self._owner().name}-{uuid.uuid4().hex}"

    @contextlib.contextmanager
    def filling(self, name: str) -> Iterator[None]:
        """Let one process at a time fill an artifact's folder, so that the ranks of a host download it once."""
        with (self.folder / "locks" / name).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _owner(self) -> _Owner:
        owner = _owners.get(self.folder)
        if owner is None or owner.pid != os.getpid():
            try:
                for part in ("artifacts", "locks", "owners", "tmp"):
                    (self.folder / part).mkdir(parents=True, exist_ok=True)
                with self._index() as index:  # nobody looks for dead owners between the file's creation and its locking
                    for table in TABLES:
                        index.execute(table)
                    name = uuid.uuid4().hex
                    lock = (self.folder / "owners" / name).open("wb")
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    self._forget_dead(index)
            except OSError as error:
                if is_disk_full(error):
                    raise disk_error(error, self.folder) from error
                raise BadInput(
                    f"read cache {self.folder} cannot be used: {error.strerror or error}: expected a writable folder (DISTILL_STORE_CACHE_DIR)"
                ) from error
            owner = _owners[self.folder] = _Owner(name, os.getpid(), lock)
        return owner

    def _forget_dead(self, index: sqlite3.Connection) -> None:
        """Drop the pins and half-written files of processes that are no more."""
        for path in (self.folder / "owners").iterdir():
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:  # it lives
                    continue
            index.execute("delete from pins where owner = ?", (path.name,))
            for half in (self.folder / "tmp").glob(f"{path.name}-*"):
                half.unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def _evict(self, index: sqlite3.Connection) -> None:
        """Remove the files used longest ago, until the cache is within its limit or only pinned files are left."""
        total = _total(index)
        if total <= self.limit_bytes:
            return
        self._forget_dead(index)
        loose = index.execute(
            "select folder, path, size from entries where not exists"
            " (select 1 from pins where pins.folder = entries.folder and pins.path = entries.path) order by used, folder, path"
        ).fetchall()
        for folder, path, size in loose:
            if total <= self.limit_bytes:
                break
            self._remove(self.folder / "artifacts" / folder, path)
            index.execute("delete from entries where folder = ? and path = ?", (folder, path))
            total -= size
        if total > self.limit_bytes:
            logger.warning("read cache %s: files in use take %d bytes, more than its limit of %d", self.folder, total, self.limit_bytes)

    def _remove(self, folder: Path, path: str) -> None:
        target = folder / path
        target.unlink(missing_ok=True)
        for parent in target.parents:
            if parent == self.folder / "artifacts":
                break
            try:
                parent.rmdir()
            except OSError:  # not empty, or never made
                break

    @contextlib.contextmanager
    def _index(self) -> Iterator[sqlite3.Connection]:
        """One transaction; other processes and threads wait. Raises `RunFailed` when the index cannot be used."""
        try:
            with contextlib.closing(sqlite3.connect(self.folder / "index.sqlite", timeout=120, isolation_level=None)) as index:
                index.execute("begin immediate")
                try:
                    yield index
                except BaseException:
                    index.rollback()
                    raise
                index.commit()
        except sqlite3.Error as error:
            raise RunFailed(f"the read cache {self.folder} cannot be used ({error}): free space or delete that folder") from error


def _total(index: sqlite3.Connection) -> int:
    return int(index.execute("select coalesce(sum(size), 0) from entries").fetchone()[0])
