"""A folder as object storage: temporary file, fsync, then link (create-only) or rename (replace) into place."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from infra.store.filesystem import ObjectInfo
from schemas.errors import BadInput, RunFailed

CHUNK_BYTES = 8 * 2**20
TEMPORARY = ".tmp"
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_disk_full(error: BaseException) -> bool:
    """True for the operating system's "no space left", as Python says it or as libraries in Rust (safetensors) do."""
    said = re.search(r"\(os error (\d+)\)", str(error))
    return (error.errno if isinstance(error, OSError) else int(said[1]) if said else None) in DISK_FULL


def disk_error(error: OSError, path: Path) -> Exception:
    """Turn the operating system's refusal to write into the error a person can act on."""
    if error.errno in DISK_FULL:
        return RunFailed(f"disk full: cannot write {path} ({error.strerror}): free space")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return BadInput(f"cannot write {path}: {error.strerror}")
    return error


class LocalStorage:
    """Objects as files under `root`. Readers see whole files only: every name appears by one link or rename."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.address = f"file://{root}"

    def check(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / TEMPORARY).mkdir(exist_ok=True)
            key = f"{TEMPORARY}/probe-{uuid.uuid4().hex}"
            self.put_new(key, b"")
            (self.root / key).unlink()
        except OSError as error:
            raise BadInput(
                f"store {self.address} cannot be used: {error.strerror or error}: expected a writable folder that allows hard links"
            ) from error

    def now(self) -> float:
        # A file's own time stamp: on a network file system the server's clock counts, not ours.
        probe = self._temporary()
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError as error:
            raise disk_error(error, probe) from error
        finally:
            probe.unlink(missing_ok=True)

    def read(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        with self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def put(self, key: str, data: bytes) -> None:
        self._write(key, lambda file: _write_all(file, data), Path.replace)

    def put_new(self, key: str, data: bytes) -> bool:
        try:
            self._write(key, lambda file: _write_all(file, data), lambda temporary, target: target.hardlink_to(temporary))
        except FileExistsError:
            return False
        return True

    def upload(self, path: Path, key: str, size: int, sha256: str) -> None:
        def copy(target: BinaryIO) -> None:
            if copy_hashed(path, target) != (size, sha256):
                raise RunFailed(
                    f"{path} changed while it was being published: nothing may write to a folder once it is handed to the store"
                )

        self._write(key, copy, Path.replace, mode=0o444)  # read-only: fetched files can be further names of this one

    def copy(self, source: str, target: str) -> None:
        temporary, place = self._temporary(), self._path(target)
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            if not self.link(source, temporary):
                shutil.copyfile(self._path(source), temporary)
                temporary.chmod(0o444)
            _place(temporary, place, Path.replace)
            _sync_folder(place.parent)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise disk_error(error, place) from error
        finally:
            temporary.unlink(missing_ok=True)

    def link(self, key: str, path: Path) -> bool:
        try:
            path.hardlink_to(self._path(key))
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                return False
            raise
        return True

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        folder, _, _ = prefix.rpartition("/")
        for parent, folders, names in os.walk(self.root / folder):
            if TEMPORARY in folders and Path(parent) == self.root:
                folders.remove(TEMPORARY)
            for name in names:
                path = Path(parent, name)
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):  # deleted since the folder was read
                        status = path.stat()
                        yield ObjectInfo(key, status.st_size, status.st_mtime)

    def folders(self, parent: str, prefix: str = "") -> list[str]:
        try:
            with os.scandir(self.root / parent) as entries:
                return sorted(entry.name for entry in entries if entry.name.startswith(prefix) and entry.is_dir())
        except FileNotFoundError:
            return []

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            path = self._path(key)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise disk_error(error, path) from error
            for parent in path.parents:
                if parent == self.root:
                    break
                try:
                    parent.rmdir()
                except OSError:  # not empty: it stays, and so do those above it
                    break

    def leftovers(self, older_than: float) -> Iterator[ObjectInfo]:
        for path in sorted((self.root / TEMPORARY).glob("*")):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if status.st_mtime < older_than:
                    yield ObjectInfo(f"{TEMPORARY}/{path.name}", status.st_size, status.st_mtime)

    def discard(self, leftover: ObjectInfo) -> None:
        self._path(leftover.key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.root / key

    def _temporary(self) -> Path:
        return self.root / TEMPORARY / uuid.uuid4().hex

    def _write(self, key: str, fill: Callable[[BinaryIO], None], place: Callable[[Path, Path], object], *, mode: int | None = None) -> None:
        target, temporary = self._path(key), self._temporary()
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            if mode is not None:
                temporary.chmod(mode)
            _place(temporary, target, place)
            _sync_folder(target.parent)
        except FileExistsError:
            raise
        except OSError as error:
            raise disk_error(error, target) from error
        finally:
            temporary.unlink(missing_ok=True)


def _place(temporary: Path, target: Path, place: Callable[[Path, Path], object]) -> None:
    for attempt in range(5):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            place(temporary, target)
        except FileNotFoundError:  # a collector removed the folder while it was still empty
            if attempt == 4:
                raise
        else:
            return


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_all(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def copy_hashed(path: Path, target: BinaryIO | None) -> tuple[int, str]:
    """Stream a file into `target` (or nowhere) and return its size and SHA-256."""
    hasher, size = hashlib.sha256(), 0
    with path.open("rb") as source:
        while chunk := source.read(CHUNK_BYTES):
            hasher.update(chunk)
            size += len(chunk)
            if target is not None:
                target.write(chunk)
    return size, hasher.hexdigest()
