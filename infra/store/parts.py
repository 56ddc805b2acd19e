"""Parts: finished pieces of a stage that is not finished itself, such as shards and checkpoints. `part.json` is written last."""

import logging
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import JsonValue, StringConstraints, TypeAdapter, ValidationError

from infra.store.filesystem import ObjectInfo, Storage
from infra.store.transfer import in_parallel, object_key, scan, upload_missing
from schemas.base import Model, Sha256
from schemas.errors import BadInput
from schemas.manifest import Cost, FileEntry

logger = logging.getLogger(__name__)

PARTS = "parts"
PartName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
_part_name = TypeAdapter(PartName)


class Part(Model):
    """A finished piece of an unfinished artifact: exists if and only if its `part.json` and all its files do."""

    name: PartName
    note: dict[str, JsonValue] = {}
    """What the stage wants to know of it without opening a file, such as the training step."""
    files: tuple[FileEntry, ...]
    """Sorted by path."""


def part_prefix(identity: Sha256, name: str) -> str:
    return f"{PARTS}/{identity}/{name}"


def save(storage: Storage, identity: Sha256, name: str, folder: Path, note: Mapping[str, object], *, workers: int) -> Part:
    """Upload a folder as a part. A part of that name that is there is replaced, at once."""
    try:
        _part_name.validate_python(name)
    except ValidationError as error:
        raise BadInput(f"part name {name!r}: expected letters, digits, dots, dashes and underscores") from error
    part = Part.model_validate({"name": name, "note": dict(note), "files": scan(folder, workers)})
    prefix = part_prefix(identity, name)
    upload_missing(storage, folder, prefix, part.files, workers)
    storage.put(f"{prefix}/part.json", part.model_dump_json(indent=1).encode())
    return part


def complete(storage: Storage, identity: Sha256, workers: int) -> list[Part]:
    """Return the whole parts, sorted by name. A torn one is left out, so the stage makes it again."""
    groups = by_part(storage.objects(f"{PARTS}/{identity}/"))
    names = [
        name for name, infos in sorted(groups.items()) if any(info.key == f"{part_prefix(identity, name)}/part.json" for info in infos)
    ]
    found = in_parallel(lambda name: read_part(storage, identity, name), names, workers)
    return [part for part in found if part is not None and has_all(part, identity, groups[part.name])]


SPENT = "spent"
"""In the place of a part's name, but no part: what attempts cost that ended before the artifact was made. Goes with the parts."""


def note_spent(storage: Storage, identity: Sha256, cost: Cost) -> None:
    """Remember what an attempt cost."""
    storage.put(f"{part_prefix(identity, SPENT)}/{uuid.uuid4().hex}.json", cost.model_dump_json().encode())


def spent(storage: Storage, identity: Sha256) -> list[Cost]:
    """Return what earlier attempts cost. A note that cannot be read is left out."""
    found = []
    for info in storage.objects(f"{part_prefix(identity, SPENT)}/"):
        try:
            found.append(Cost.model_validate_json(storage.read(info.key)))
        except (FileNotFoundError, ValidationError) as error:
            logger.warning("%s/%s cannot be read and is left out: %s", storage.address, info.key, error)
    return found


def by_part(infos: Iterable[ObjectInfo]) -> dict[str, list[ObjectInfo]]:
    """Group the objects of one identity by the part they belong to."""
    groups: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in infos:
        groups[info.key.split("/", 3)[2]].append(info)
    return dict(groups)


def read_part(storage: Storage, identity: Sha256, name: str) -> Part | None:
    """Return what `part.json` says, or None where there is none that can be read."""
    key = f"{part_prefix(identity, name)}/part.json"
    try:
        part = Part.model_validate_json(storage.read(key))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        logger.warning("%s/%s cannot be read and is left out: %s", storage.address, key, error)
        return None
    return part if part.name == name else None


def has_all(part: Part, identity: Sha256, infos: list[ObjectInfo]) -> bool:
    """True where every file of the part is among the objects with its size."""
    sizes = {info.key: info.size for info in infos}
    prefix = part_prefix(identity, part.name)
    return all(sizes.get(object_key(prefix, entry)) == entry.size for entry in part.files)


def delete(storage: Storage, groups: dict[str, list[ObjectInfo]], identity: Sha256, names: Iterable[str]) -> None:
    """Delete parts by name: first what makes each exist, then its files."""
    chosen = [name for name in names if name in groups]
    storage.delete([f"{part_prefix(identity, name)}/part.json" for name in chosen])
    storage.delete([info.key for name in chosen for info in groups[name]])
