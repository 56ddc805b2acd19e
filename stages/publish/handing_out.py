"""Handing a published model out: to a folder, to object storage, or to the Hugging Face hub."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from infra.hub import card_metadata, check_repository, check_token, upload_model
from infra.store.filesystem import Storage, open_storage
from infra.store.settings import StoreSettings
from schemas.errors import BadInput
from stages.publish.export import check_destination, export_folder
from stages.publish.variants import DESCRIPTION
from stages.sample import read_description
from stages.teacher import sha256

logger = logging.getLogger(__name__)

_HUB: Final = "hub:"
_FIELD: Final = "--to"


@dataclass(frozen=True)
class HandingOut:
    """What goes where; looked at, and nothing sent yet."""

    where: str
    files: tuple[Path, ...]
    """Relative to the model's folder, sorted."""
    sizes: tuple[int, ...]
    """Bytes."""
    send: Callable[[], str]
    """Sends all; returns where it lies."""


def prepare_handing_out(folder: Path, to: str, settings: StoreSettings, *, private: bool = False) -> HandingOut:
    """Look at the model in `folder` and at the destination: a path, `s3://bucket/prefix`, or `hub:owner/name`.

    Raises `BadInput` for a folder that is no published model, a destination where something else lies or that cannot be written, and for the hub a
    card whose metadata it would not read, and a missing token. `settings` say how object storage is reached.
    """
    description = read_description(folder)
    files = tuple(sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()))
    sizes = tuple((folder / path).stat().st_size for path in files)
    if to.startswith(_HUB):
        name = to.removeprefix(_HUB)
        check_repository(name)
        check_token()
        told = card_metadata(folder)
        logger.info("card: %s", ", ".join(f"{field} {told[field]}" for field in ("license", "library_name", "base_model") if field in told))
        message = f"{description.name}: {len(description.variants)} variants, {len(description.styles)} styles"
        return HandingOut(
            f"{to}{' (private)' if private else ''}", files, sizes, lambda: upload_model(folder, name, private=private, message=message)
        )
    if private:
        raise BadInput(f"--private: {to} is no repository of the hub; expected it with --to hub:owner/name alone")
    if to.startswith("s3://"):
        storage = open_storage(to, settings)
        known = _known_objects(storage, to)
        return HandingOut(storage.address, files, sizes, lambda: _upload(folder, files, storage, known))
    path = check_destination(to, _FIELD)
    return HandingOut(str(path), files, sizes, lambda: str(export_folder(folder, to, _FIELD)))


def _known_objects(storage: Storage, to: str) -> frozenset[str]:
    """Keys that lie at the destination. Raises `BadInput` where they are not those of a published model."""
    storage.check()
    known = frozenset(found.key for found in storage.objects(""))
    if known and DESCRIPTION not in known:
        raise BadInput(
            f"{_FIELD} {to}: something else is there, such as {min(known)}; expected an empty prefix, or a {DESCRIPTION} to replace"
        )
    return known


def _upload(folder: Path, files: tuple[Path, ...], storage: Storage, known: frozenset[str]) -> str:
    """The description goes first and comes last: a model without one is not whole."""
    storage.delete([DESCRIPTION] if DESCRIPTION in known else [])
    for path in sorted(files, key=lambda path: path.as_posix() == DESCRIPTION):
        local = folder / path
        storage.upload(local, path.as_posix(), local.stat().st_size, sha256(local))
    storage.delete(sorted(known - {path.as_posix() for path in files}))
    return storage.address
