"""A copy of a published model outside the store: there whole, or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import BadInput
from stages.publish.variants import DESCRIPTION


def check_destination(destination: str, field: str = "publish.destination") -> Path:
    """Return the folder to export to. Raises `BadInput` when something lies there that is not a published model, or it is not a local path.

    `field` is what the person calls it who named the destination.
    """
    if "://" in destination and not destination.startswith("file://"):
        raise BadInput(f"{field} {destination}: expected a local folder; distill publish --to takes it to object storage")
    path = Path(destination.removeprefix("file://")).expanduser().absolute()
    if path.is_dir() and not any(path.iterdir()):
        return path
    if path.exists() and not _is_ours(path):
        raise BadInput(f"{field} {destination}: something else is there; expected a new folder, or one with a {DESCRIPTION} to replace")
    above = next(parent for parent in path.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise BadInput(f"{field} {destination}: {above} cannot be written to; expected a folder that can be made")
    return path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill; it takes that name, and the place of what was there, when the block ends well, and is removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def export_folder(source: Path, destination: str, field: str = "publish.destination") -> Path:
    """Copy the published model in `source` to `destination`, replacing an earlier one.

    The copy is made beside the destination and takes its name at the end. Raises `BadInput` as `check_destination` does.
    """
    path = check_destination(destination, field)
    with replaced(path) as fresh:
        for file in sorted(item for item in source.rglob("*") if item.is_file()):
            target = fresh / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return path


def _is_ours(path: Path) -> bool:
    try:
        found = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "variants" in found
