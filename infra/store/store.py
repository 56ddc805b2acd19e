"""The artifact store: what tasks hand to each other is a manifest, and this is where its files lie.

artifacts/<identity>/files/<sha256[:16]>/<path>     data; two writers never clobber each other
artifacts/<identity>/manifest.json                  written last, create-only: without it the artifact does not exist
parts/<identity>/<name>/...                         finished pieces of unfinished artifacts
leases/<identity>/<generation>.json                 who works on what
latest/<recipe>/<stage run>                         identity of the newest artifact
reports/<identity>/report.html                      what a run tells of an artifact that is no part of it
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from infra.store import lease, parts, safetensors_header, transfer
from infra.store.cache import ReadCache
from infra.store.filesystem import Storage, open_storage
from infra.store.gc import ARTIFACTS, REPORTS, GcReport, collect
from infra.store.local import copy_hashed
from infra.store.metered import MeteredStorage, Traffic
from infra.store.parts import Part
from infra.store.safetensors_header import RawTensor
from infra.store.settings import StoreSettings
from schemas.base import Sha256
from schemas.errors import BadInput, CorruptArtifact
from schemas.manifest import Content, Cost, FileEntry, Lineage, Manifest, RelativePath

logger = logging.getLogger(__name__)

SHORTEST_REFERENCE = 6
LATEST = "latest"
_identity = TypeAdapter(Sha256)
_path = TypeAdapter(RelativePath)


def _checked(identity: str) -> Sha256:
    try:
        return _identity.validate_python(identity)
    except ValidationError as error:
        raise BadInput(f"artifact identity {identity!r}: expected 64 lower-case hex digits") from error


class ArtifactStore:
    """Artifacts, parts and leases under one address. Cheap to pickle; holds no connection across processes.

    Any method raises `Transient` when the store stays out of reach after its retries, and `BadInput` when it refuses us.
    """

    def __init__(self, storage: Storage, settings: StoreSettings) -> None:
        self._storage = storage
        self._settings = settings
        self._workers = settings.transfer_workers
        self._cache = ReadCache(settings.cache_folder(), settings.cache_bytes)

    @classmethod
    def open(cls, address: str, settings: StoreSettings | None = None) -> Self:
        """Open `file:///folder`, a plain path, or `s3://bucket/prefix`, and prove that it can be listed, written and deleted from.

        Raises `BadInput` for an unknown scheme, a missing bucket, missing or refused credentials, and a folder that cannot be written, and
        `StoreUnreachable`, which is one, where nothing answers at the endpoint.
        """
        settings = StoreSettings() if settings is None else settings
        storage = open_storage(address, settings)
        storage.check()
        return cls(storage, settings)

    def metered(self, traffic: Traffic) -> Self:
        """Return this store, its read cache included, with the bytes counted that go over it."""
        other = copy.copy(self)
        other._storage = MeteredStorage(self._storage, traffic)
        return other

    @property
    def address(self) -> str:
        """The store's address, absolute."""
        return self._storage.address

    def __repr__(self) -> str:
        return f"ArtifactStore({self.address!r})"

    def check_cache(self) -> None:
        """Prove that the read cache can be used, which every reading of an artifact needs. Raises `BadInput`."""
        self._cache.check()

    def find(self, identity: str) -> Manifest | None:
        """Return the manifest, or None when there is no such artifact: one small read. Raises `CorruptArtifact`."""
        key = f"{_prefix(_checked(identity))}/manifest.json"
        try:
            manifest = Manifest.model_validate_json(self._storage.read(key))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise CorruptArtifact(f"{self.address}/{key} is not a manifest of this version ({place}: {first['msg']})", identity) from error
        if manifest.identity != identity:
            raise CorruptArtifact(f"{self.address}/{key} is the manifest of {manifest.identity}", identity)
        return manifest

    def resolve(self, reference: str) -> Manifest:
        """Find an artifact by identity, by the first 6 or more digits of one, or by an address that ends in either.

        Raises `BadInput` when none, or more than one, is meant.
        """
        wanted = reference.rstrip("/").removesuffix("/manifest.json").rpartition("/")[2]
        if len(wanted) < SHORTEST_REFERENCE or not set(wanted) <= set("0123456789abcdef"):
            raise BadInput(f"artifact reference {reference!r}: expected an identity, or its first {SHORTEST_REFERENCE} or more hex digits")
        names = [wanted] if len(wanted) == 64 else self._storage.folders(ARTIFACTS, wanted)
        found = [manifest for manifest in transfer.in_parallel(self.find, names, self._workers) if manifest is not None]
        if not found:
            raise BadInput(f"artifact reference {reference!r}: no such artifact in {self.address}")
        if len(found) > 1:
            candidates = ", ".join(f"{manifest.identity} ({manifest.kind})" for manifest in found)
            raise BadInput(f"artifact reference {reference!r} is ambiguous in {self.address}: {candidates}")
        return found[0]

    def note_latest(self, recipe: str, node: str, identity: Sha256) -> None:
        """Remember an artifact as the newest that the stage run of that recipe made or found."""
        key = f"{LATEST}/{recipe}/{node}"
        try:
            known = self._storage.read(key)
        except FileNotFoundError:
            known = b""
        if known != identity.encode():
            self._storage.put(key, identity.encode())

    def latest(self, recipe: str, node: str) -> Manifest:
        """Return the newest artifact of a recipe's stage run, whatever the recipe's settings were. Raises `BadInput` when there is none."""
        try:
            identity = self._storage.read(f"{LATEST}/{_path.validate_python(f'{recipe}/{node}')}").decode()
        except (FileNotFoundError, ValidationError):
            raise BadInput(
                f"latest:{recipe}: no artifact of its stage run {node} is in {self.address}; expected one that has run there"
            ) from None
        return self.resolve(identity)

    def keep_report(self, manifest: Manifest[Any], page: str) -> str:
        """Keep a page about an artifact beside it, in the place of an earlier one; return its address."""
        key = f"{REPORTS}/{manifest.identity}/report.html"
        self._storage.put(key, page.encode())
        return f"{self.address}/{key}"

    def report_address(self, manifest: Manifest[Any]) -> str | None:
        """Where the page about an artifact lies that was kept beside it; None where none was."""
        found = next(iter(self._storage.objects(f"{REPORTS}/{manifest.identity}/")), None)
        return None if found is None else f"{self.address}/{found.key}"

    def manifests(self) -> Iterator[Manifest]:
        """Yield every artifact's manifest, sorted by identity. One that cannot be read is logged and passed over."""
        names = [name for name in self._storage.folders(ARTIFACTS) if len(name) == 64]
        for start in range(0, len(names), 100):
            for manifest in transfer.in_parallel(self._readable, names[start : start + 100], self._workers):
                if manifest is not None:
                    yield manifest

    def _readable(self, identity: str) -> Manifest | None:
        try:
            return self.find(identity)
        except CorruptArtifact as error:
            logger.warning("%s", error)
            return None

    def is_complete(self, manifest: Manifest) -> bool:
        """True when every file's object is there with its size: one listing a thousand files, no read. What a cache hit checks."""
        return not transfer.missing_objects(self._storage, _prefix(manifest.identity), manifest.files)

    def verify(self, manifest: Manifest) -> list[str]:
        """Read and hash every file on the store, past the cache. Returns what is wrong, file by file; empty when all is well."""

        def check(entry: FileEntry) -> str | None:
            return transfer.problem(self._storage, _prefix(manifest.identity), entry)

        sizes = transfer.missing_objects(self._storage, _prefix(manifest.identity), manifest.files)
        bytes_ = transfer.in_parallel(check, manifest.files, self._workers)
        return list(dict.fromkeys([*sizes, *(found for found in bytes_ if found)]))

    def publish(
        self, folder: Path, *, identity: str, content: Content, lineage: Lineage, kept: Mapping[str, tuple[Part, str]] | None = None
    ) -> Manifest:
        """Make the files below `folder` an artifact: data first, then the manifest, create-only.

        `kept` adds files of finished pieces of this identity, by their path in the artifact (the piece, the path in it): they are copied inside
        the store, so that an artifact can be larger than the disk of whoever makes it.

        Returns the manifest that counts: where another writer was first, theirs. An artifact whose objects went missing is mended.
        Raises `BadInput` for a folder that cannot be published.
        """
        prefix = _prefix(_checked(identity))
        local = transfer.scan(folder, self._workers)
        moved = {path: (part, _part_file(part, name)) for path, (part, name) in (kept or {}).items()}
        pieces = [FileEntry(path=path, size=entry.size, sha256=entry.sha256) for path, (_, entry) in moved.items()]
        files = tuple(sorted([*local, *pieces], key=lambda entry: entry.path))
        manifest = Manifest(identity=identity, content=content, files=files, lineage=lineage)
        there = self.find(identity)
        if there is not None and self.is_complete(there):
            return self._adopted(there, manifest)
        transfer.upload_missing(self._storage, folder, prefix, local, self._workers)
        sources = {path: transfer.object_key(parts.part_prefix(identity, part.name), entry) for path, (part, entry) in moved.items()}
        transfer.copy_missing(self._storage, sources, prefix, pieces, self._workers)
        if there is not None:
            if self.is_complete(there):
                logger.warning("artifact %s had lost files; they are there again", identity[:12])
                return there
            logger.warning("artifact %s had lost files which this run made differently; it is replaced", identity[:12])
            self._storage.delete([f"{prefix}/manifest.json"])
        while not self._storage.put_new(f"{prefix}/manifest.json", manifest.model_dump_json(indent=1).encode()):
            there = self.find(identity)
            if there is not None:
                return self._adopted(there, manifest)
        return manifest

    def _adopted(self, there: Manifest, ours: Manifest) -> Manifest:
        if there.files_digest != ours.files_digest:
            different = sorted({entry.path for entry in set(there.files) ^ set(ours.files)})
            logger.warning("artifact %s is there with other bytes in %s; the one that is there counts", there.identity[:12], different)
        else:
            logger.info("artifact %s is there already, with equal bytes", there.identity[:12])
        return there

    def remove(self, identity: str) -> None:
        """Delete an artifact: first what makes it exist, then its files. For one that `verify` found damaged."""
        prefix = _prefix(_checked(identity))
        self._storage.delete([f"{prefix}/manifest.json"])
        self._storage.delete([info.key for info in self._storage.objects(f"{prefix}/")])

    def fetch(self, manifest: Manifest, paths: Sequence[str] | None = None) -> Path:
        """Return a local, read-only folder that holds these files (all when None) under their names, verified against the manifest.

        They lie in the read cache and stay there while this process lives, or until `release`. The folder may hold other files of the same
        artifact. Raises `CorruptArtifact` naming the file, what was expected and what was found; `BadInput` for a path it does not have.
        """
        entries = manifest.files if paths is None else tuple(self._entry(manifest, path) for path in paths)
        name = _cache_name(manifest)
        folder = self._cache.claim(name, entries)
        folder.mkdir(parents=True, exist_ok=True)
        if all(self._cache.is_verified(name, entry.path) and _size(folder / entry.path) == entry.size for entry in entries):
            return folder
        prefix = _prefix(manifest.identity)
        with self._cache.filling(name), ThreadPoolExecutor(self._workers) as pool:

            def bring(entry: FileEntry) -> None:
                target = folder / entry.path
                if _size(target) is None or not self._is_sound(name, target, entry):
                    way = (self._cache.temporary(), target)
                    transfer.download(self._storage, prefix, entry, way, pool, shared=True, identity=manifest.identity)
                self._cache.mark_verified(name, entry.path)

            transfer.in_parallel(bring, entries, self._workers)
        return folder

    def _is_sound(self, name: str, target: Path, entry: FileEntry) -> bool:
        if _size(target) == entry.size and (self._cache.is_verified(name, entry.path) or copy_hashed(target, None)[1] == entry.sha256):
            return True
        logger.warning("%s in the read cache is damaged: fetching it again", target)
        return False

    def release(self, manifest: Manifest[Any] | None = None, paths: Sequence[str] | None = None) -> None:
        """Say that this process is done with what it fetched (everything when None), so that the cache may evict it."""
        self._cache.release(None if manifest is None else _cache_name(manifest), paths)

    def read_range(self, manifest: Manifest, path: str, start: int, stop: int) -> bytes:
        """Read bytes `start..stop-1` of a file, fewer where it ends before, without fetching it. The file's hash is not checked: that would read
        all of it. Raises `CorruptArtifact` when there is no such object, `BadInput` for a path the artifact does not have."""
        try:
            return self._reader(manifest, path)(start, stop)
        except FileNotFoundError as error:
            raise CorruptArtifact(f"{self._where(manifest, path)}: no such object", manifest.identity) from error

    def read_header(self, manifest: Manifest, path: str) -> dict[str, Any]:
        """Return the JSON header of a safetensors file by a range read. Raises `CorruptArtifact` when it is not one."""
        return self._header(manifest, path).tensors

    def read_tensors(self, manifest: Manifest, path: str, names: Sequence[str]) -> dict[str, RawTensor]:
        """Read single tensors of a safetensors file, by parallel range reads. The file's hash is not checked: that would read all of it."""
        header, read = self._header(manifest, path), self._reader(manifest, path)

        def tensor(name: str) -> RawTensor:
            return safetensors_header.tensor_of(header, name, read(*header.span(name)))

        try:
            return dict(zip(names, transfer.in_parallel(tensor, names, self._workers), strict=True))
        except ValueError as error:
            raise CorruptArtifact(f"{self._where(manifest, path)}: {error}", manifest.identity) from error

    def _header(self, manifest: Manifest, path: str) -> safetensors_header.Header:
        try:
            return safetensors_header.read_header(self._reader(manifest, path))
        except FileNotFoundError as error:
            raise CorruptArtifact(f"{self._where(manifest, path)}: no such object", manifest.identity) from error
        except ValueError as error:
            raise CorruptArtifact(f"{self._where(manifest, path)}: {error}", manifest.identity) from error

    def _reader(self, manifest: Manifest, path: str) -> safetensors_header.ReadRange:
        entry = self._entry(manifest, path)
        key = transfer.object_key(_prefix(manifest.identity), entry)
        return lambda start, stop: self._storage.read_range(key, start, min(stop, entry.size))

    def file_address(self, manifest: Manifest[Any], path: str) -> str:
        """Where a file lies, for people and other programs. Raises `BadInput` for a path the artifact does not have."""
        return f"{self.address}/{transfer.object_key(_prefix(manifest.identity), self._entry(manifest, path))}"

    def _where(self, manifest: Manifest, path: str) -> str:
        return f"{self.address}/{_prefix(manifest.identity)}: {path}"

    def _entry(self, manifest: Manifest, path: str) -> FileEntry:
        try:
            return manifest.file(_path.validate_python(path))
        except (KeyError, ValidationError) as error:
            raise BadInput(f"artifact {manifest.identity[:12]} ({manifest.kind}) holds no file {path!r}") from error

    def save_part(self, identity: str, name: str, folder: Path, note: Mapping[str, object] | None = None) -> Part:
        """Keep the files below `folder` as a finished piece of an unfinished artifact. Replaces one of the same name, at once.

        `note` must be JSON (`ValueError` otherwise).
        """
        return parts.save(self._storage, _checked(identity), name, folder, note or {}, workers=self._workers)

    def parts(self, identity: str) -> list[Part]:
        """Return the whole parts, sorted by name; a torn part does not exist."""
        return parts.complete(self._storage, _checked(identity), self._workers)

    def load_part(self, identity: str, part: Part, destination: Path, paths: Sequence[str] | None = None) -> Path:
        """Bring a part's files (all when None) below `destination`, verified, as the caller's own. Raises `CorruptArtifact`. Returns
        `destination`."""
        wanted = part.files if paths is None else tuple(_part_file(part, path) for path in paths)
        prefix = parts.part_prefix(_checked(identity), part.name)
        with ThreadPoolExecutor(self._workers) as pool:

            def bring(entry: FileEntry) -> None:
                target = destination / entry.path
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary = target.with_name(f".{target.name[:200]}.part")
                transfer.download(self._storage, prefix, entry, (temporary, target), pool, shared=False)

            transfer.in_parallel(bring, wanted, self._workers)
        return destination

    def note_spent(self, identity: str, cost: Cost) -> None:
        """Remember what an attempt cost that ended before the artifact was made. Deleted with the parts."""
        parts.note_spent(self._storage, _checked(identity), cost)

    def spent(self, identity: str) -> list[Cost]:
        """Return what earlier attempts at an unfinished artifact cost."""
        return parts.spent(self._storage, _checked(identity))

    def delete_parts(self, identity: str, names: Sequence[str] | None = None) -> None:
        """Delete parts, whole or torn: those named, or all."""
        groups = parts.by_part(self._storage.objects(f"{parts.PARTS}/{_checked(identity)}/"))
        parts.delete(self._storage, groups, identity, groups if names is None else names)

    def lease(
        self, identity: str, *, seconds: float = 60.0, poll_seconds: float = 2.0, on_wait: Callable[[str], None] | None = None
    ) -> AbstractContextManager[lease.Lease]:
        """Hold the right to work on `identity` for a `with` block; wait while another run works on it.

        Ends the wait with `already_done` when the artifact is there. A holder that has not renewed for `seconds` of its own, or whose
        process on this host is gone, is taken over; of many takers one wins. `on_wait` gets the holder's name when waiting begins.
        """
        _checked(identity)

        def done() -> bool:
            manifest = self.find(identity)
            return manifest is not None and self.is_complete(manifest)

        return lease.hold(self._storage, identity, done=done, seconds=seconds, poll_seconds=poll_seconds, on_wait=on_wait)

    def gc(self, *, dry_run: bool = True, older_than: timedelta = timedelta(days=1), keep_checkpoints: int = 2) -> GcReport:
        """Find what nothing needs, and delete it unless `dry_run`. Never touches an identity whose lease is held.

        That is: files no manifest names, torn parts, unfinished writes, pages about artifacts that are no more and leases of dead runs, all older
        than the age; every part of a finished artifact; checkpoints (parts named `checkpoint-<number>`) beyond the newest few of each artifact.
        """
        return collect(self._storage, self.find, dry_run=dry_run, older_than=older_than, keep_checkpoints=keep_checkpoints)


def _prefix(identity: Sha256) -> str:
    return f"{ARTIFACTS}/{identity}"


def _part_file(part: Part, path: str) -> FileEntry:
    found = next((entry for entry in part.files if entry.path == path), None)
    if found is None:
        raise BadInput(f"part {part.name} holds no file {path!r}")
    return found


def _cache_name(manifest: Manifest[Any]) -> str:
    # By bytes as well: an identity that was removed and made again elsewhere may hold others.
    return f"{manifest.identity[:16]}-{manifest.files_digest[:16]}"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
