"""Find, and on demand delete, what no artifact needs: what killed writers left, spent parts, old checkpoints, dead leases."""

import logging
import re
from collections.abc import Callable, Iterator
from datetime import timedelta

from infra.store import parts
from infra.store.filesystem import ObjectInfo, Storage
from infra.store.lease import LEASES, has_live_lease
from infra.store.transfer import object_key
from schemas.base import Model, Sha256
from schemas.errors import CorruptArtifact
from schemas.manifest import Manifest

logger = logging.getLogger(__name__)

ARTIFACTS = "artifacts"
REPORTS = "reports"
CHECKPOINT = re.compile(r"^checkpoint-\d+$")
IDENTITY = re.compile(r"^[0-9a-f]{64}$")


class GcItem(Model):
    """One object that can go."""

    key: str
    bytes: int
    reason: str


class GcReport(Model):
    """What was found, and whether it was deleted."""

    dry_run: bool
    items: tuple[GcItem, ...]

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)


def collect(
    storage: Storage, find: Callable[[Sha256], Manifest | None], *, dry_run: bool, older_than: timedelta, keep_checkpoints: int
) -> GcReport:
    """Go through the whole store. An identity somebody holds a live lease of is never touched."""
    before = storage.now() - older_than.total_seconds()
    items: list[GcItem] = []
    for identity, infos in _by_identity(storage, ARTIFACTS):
        # Read after the listing: an artifact published meanwhile keeps all its files.
        found = list(_unreferenced(storage, find, identity, infos, before))
        items += _removed(storage, found, dry_run=dry_run)
    for identity, infos in _by_identity(storage, parts.PARTS):
        found = list(_spent_parts(storage, find, identity, infos, before, keep_checkpoints=keep_checkpoints))
        items += _removed(storage, found, dry_run=dry_run)
    for identity, infos in _by_identity(storage, REPORTS):
        if _manifest_or_leave(find, identity) == (None, False):
            gone = [_item(info, "page about an artifact that is no more") for info in infos if info.modified <= before]
            items += _removed(storage, gone, dry_run=dry_run)
    for identity, infos in _by_identity(storage, LEASES):
        if not has_live_lease(storage, identity):
            dead = [_item(info, "lease of a run that is no more") for info in infos if info.modified <= before]
            items += _removed(storage, dead, dry_run=dry_run)
    for leftover in storage.leftovers(before):
        items.append(_item(leftover, "unfinished write"))
        if not dry_run:
            storage.discard(leftover)
    return GcReport(dry_run=dry_run, items=tuple({item.key: item for item in items}.values()))


def _by_identity(storage: Storage, top: str) -> Iterator[tuple[Sha256, list[ObjectInfo]]]:
    for identity in storage.folders(top):
        if IDENTITY.match(identity):
            yield identity, list(storage.objects(f"{top}/{identity}/"))


def _item(info: ObjectInfo, reason: str) -> GcItem:
    return GcItem(key=info.key, bytes=info.size, reason=reason)


def _removed(storage: Storage, items: list[GcItem], *, dry_run: bool) -> list[GcItem]:
    if items and not dry_run:
        # Lists come with what makes a part exist first, so that a part torn by a kill in the middle does not exist.
        storage.delete([item.key for item in items])
    return items


def _manifest_or_leave(find: Callable[[Sha256], Manifest | None], identity: Sha256) -> tuple[Manifest | None, bool]:
    try:
        return find(identity), False
    except CorruptArtifact as error:  # perhaps of a later version: what it needs is not known here
        logger.warning("left alone: %s", error)
        return None, True


def _unreferenced(
    storage: Storage, find: Callable[[Sha256], Manifest | None], identity: Sha256, infos: list[ObjectInfo], before: float
) -> Iterator[GcItem]:
    old = [info for info in infos if info.modified <= before]
    if not old or has_live_lease(storage, identity):
        return
    manifest, leave = _manifest_or_leave(find, identity)
    if leave:
        return
    prefix = f"{ARTIFACTS}/{identity}"
    needed = {f"{prefix}/manifest.json"}
    if manifest is not None:
        needed |= {object_key(prefix, entry) for entry in manifest.files}
    for info in old:
        if info.key not in needed:
            yield _item(info, "file no manifest names")


def _spent_parts(
    storage: Storage,
    find: Callable[[Sha256], Manifest | None],
    identity: Sha256,
    infos: list[ObjectInfo],
    before: float,
    *,
    keep_checkpoints: int,
) -> Iterator[GcItem]:
    if has_live_lease(storage, identity):
        return
    manifest, leave = _manifest_or_leave(find, identity)
    if leave:
        return
    if manifest is not None:
        infos = sorted(infos, key=lambda info: not _is_part_json(info))
        yield from (_item(info, "part of a finished artifact") for info in infos)
        return
    groups = parts.by_part(infos)
    whole: list[str] = []
    for name, members in groups.items():
        part = parts.read_part(storage, identity, name)
        if part is not None and parts.has_all(part, identity, members):
            whole.append(name)
            prefix = parts.part_prefix(identity, name)
            needed = {f"{prefix}/part.json"} | {object_key(prefix, entry) for entry in part.files}
            yield from (_item(info, "file no part names") for info in members if info.key not in needed and info.modified <= before)
        else:
            yield from (_item(info, "part that was never finished") for info in members if info.modified <= before)
    checkpoints = sorted((name for name in whole if CHECKPOINT.match(name)), key=lambda name: (int(name.rpartition("-")[2]), name))
    for name in checkpoints[: max(0, len(checkpoints) - keep_checkpoints)]:
        members = sorted(groups[name], key=lambda info: not _is_part_json(info))
        yield from (_item(info, f"checkpoint older than the newest {keep_checkpoints}") for info in members)


def _is_part_json(info: ObjectInfo) -> bool:
    return info.key.count("/") == 3 and info.key.endswith("/part.json")
