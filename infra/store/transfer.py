"""Move files between folders and a storage: in parallel, hashed while they stream, big ones by ranges."""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from infra.store.filesystem import Storage
from infra.store.local import CHUNK_BYTES, copy_hashed, disk_error
from schemas.errors import BadInput, CorruptArtifact
from schemas.manifest import FileEntry

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(call: Callable[[T], R], items: Iterable[T], workers: int) -> list[R]:
    """`[call(item) for item in items]` on `workers` threads. The first error is raised and what has not begun is dropped."""
    waiting = list(items)
    if len(waiting) <= 1 or workers == 1:
        return [call(item) for item in waiting]
    with ThreadPoolExecutor(min(workers, len(waiting))) as pool:
        futures = [pool.submit(call, item) for item in waiting]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def object_key(prefix: str, entry: FileEntry) -> str:
    """Key of a file's bytes below an artifact's or a part's prefix. Its hash is in it, so two writers never clobber each other."""
    return f"{prefix}/files/{entry.sha256[:16]}/{entry.path}"


def scan(folder: Path, workers: int) -> tuple[FileEntry, ...]:
    """Hash every file below `folder`. Raises `BadInput` for what cannot be published."""
    if not folder.is_dir():
        raise BadInput(f"cannot publish {folder}: expected a folder")
    return tuple(sorted(in_parallel(lambda path: _entry(folder, path), _files(folder), workers), key=lambda entry: entry.path))


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path
        elif path.is_symlink() or not path.is_dir():
            raise BadInput(f"cannot publish {path}: expected files and folders only")


def _entry(folder: Path, path: Path) -> FileEntry:
    name = path.relative_to(folder).as_posix()
    size, sha256 = copy_hashed(path, None)
    try:
        name.encode()
        return FileEntry(path=name, size=size, sha256=sha256)
    except (ValidationError, UnicodeEncodeError) as error:
        raise BadInput(f"cannot publish a file named {name!r}: {error}") from error


def upload_missing(storage: Storage, folder: Path, prefix: str, entries: Sequence[FileEntry], workers: int) -> None:
    """Bring every file's bytes to the storage; an object that is there under the same hash with the same size is not sent again."""
    there = {info.key: info.size for info in storage.objects(f"{prefix}/files/")}

    def send(entry: FileEntry) -> None:
        key = object_key(prefix, entry)
        if there.get(key) != entry.size:
            storage.upload(folder / entry.path, key, entry.size, entry.sha256)

    in_parallel(send, entries, workers)


def copy_missing(storage: Storage, sources: Mapping[str, str], prefix: str, entries: Sequence[FileEntry], workers: int) -> None:
    """Copy each file's bytes inside the storage, from its key in `sources`; one that is there under the same hash with the same size is left."""
    if not entries:
        return
    there = {info.key: info.size for info in storage.objects(f"{prefix}/files/")}

    def copy(entry: FileEntry) -> None:
        key = object_key(prefix, entry)
        if there.get(key) != entry.size:
            storage.copy(sources[entry.path], key)

    in_parallel(copy, entries, workers)


def missing_objects(storage: Storage, prefix: str, entries: Sequence[FileEntry]) -> list[str]:
    """Say of each file whose object is not there with its size what is wrong. Reads no bytes: one listing a thousand objects."""
    there = {info.key: info.size for info in storage.objects(f"{prefix}/files/")}
    found = ((entry, there.get(object_key(prefix, entry))) for entry in entries)
    return [_size_problem(entry, size) for entry, size in found if size != entry.size]


def _size_problem(entry: FileEntry, size: int | None) -> str:
    if size is None:
        return f"{entry.path}: expected {entry.size} bytes with SHA-256 {entry.sha256}, found no object"
    return f"{entry.path}: expected {entry.size} bytes, found {size}"


def chunks(storage: Storage, key: str, size: int, pool: ThreadPoolExecutor | None) -> Iterator[bytes]:
    """Yield an object's first `size` bytes in order, up to eight ranges on their way at a time when a pool is given.

    Ends early where the object does. Raises `FileNotFoundError` when there is none.
    """
    if size <= CHUNK_BYTES:
        yield storage.read(key)
        return
    starts = iter(range(0, size, CHUNK_BYTES))
    if pool is None:
        for start in starts:
            yield storage.read_range(key, start, min(start + CHUNK_BYTES, size))
        return
    ahead: deque[Future[bytes]] = deque()
    for start in starts:
        ahead.append(pool.submit(storage.read_range, key, start, min(start + CHUNK_BYTES, size)))
        if len(ahead) >= 8:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def problem(storage: Storage, prefix: str, entry: FileEntry, pool: ThreadPoolExecutor | None = None) -> str | None:
    """Read a file's bytes on the storage and say what is wrong with them, or None."""
    hasher, size = hashlib.sha256(), 0
    try:
        for chunk in chunks(storage, object_key(prefix, entry), entry.size, pool):
            hasher.update(chunk)
            size += len(chunk)
    except FileNotFoundError:
        return _size_problem(entry, None)
    return difference(entry, size, hasher.hexdigest())


def difference(entry: FileEntry, size: int, sha256: str) -> str | None:
    """Say how bytes differ from what the manifest promises, or None."""
    if size != entry.size:
        return _size_problem(entry, size)
    if sha256 != entry.sha256:
        return f"{entry.path}: expected SHA-256 {entry.sha256}, found {sha256}"
    return None


def download(
    storage: Storage,
    prefix: str,
    entry: FileEntry,
    way: tuple[Path, Path],
    pool: ThreadPoolExecutor,
    *,
    shared: bool,
    identity: str | None = None,
) -> None:
    """Bring one file over `way` (temporary name, final name), whole and verified or not at all.

    A `shared` file is read-only, and may be another name of the store's own. `identity` is that of the artifact it belongs to, if any.

    Raises `CorruptArtifact` naming the file, what was expected and what was found; `RunFailed` when the disk is full.
    """
    key = object_key(prefix, entry)
    temporary, target = way
    try:
        for last in (False, True):
            wrong = _bring(storage, key, entry, temporary, pool, link=shared)
            if wrong is None:
                break
            temporary.unlink(missing_ok=True)
            if last:  # wrong twice: not the way's fault
                raise CorruptArtifact(f"{storage.address}/{prefix} is damaged: {wrong}", identity)
        if shared:
            temporary.chmod(0o444)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(target)
    except OSError as error:
        raise disk_error(error, target) from error
    finally:
        temporary.unlink(missing_ok=True)


def _bring(storage: Storage, key: str, entry: FileEntry, temporary: Path, pool: ThreadPoolExecutor, *, link: bool) -> str | None:
    try:
        if link and storage.link(key, temporary):
            return difference(entry, *copy_hashed(temporary, None))
        hasher, size = hashlib.sha256(), 0
        arriving = chunks(storage, key, entry.size, pool)
        first = next(arriving, b"")  # before a file is made: a missing object is told from a missing folder
    except FileNotFoundError:
        return _size_problem(entry, None)
    with temporary.open("wb") as file:
        for chunk in itertools.chain([first], arriving):
            hasher.update(chunk)
            size += len(chunk)
            file.write(chunk)
    return difference(entry, size, hasher.hexdigest())
