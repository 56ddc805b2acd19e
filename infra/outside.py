"""Content of what lies outside the store (URL tables, teacher folders, prompt files): digests, and local copies."""

import hashlib
from pathlib import Path

import fsspec

from schemas.base import digest
from schemas.errors import BadInput

_CHUNK = 8 * 2**20


def content_digest(address: str) -> str:
    """SHA-256 of a file, or digest over relative paths and SHA-256 of all files of a folder (hidden files aside).

    `address` is a local path, a `file://` or any other address fsspec knows. Raises `BadInput` when nothing is there.
    """
    system, path = fsspec.core.url_to_fs(address)
    try:
        if system.isfile(path):
            return _file_digest(system, path)
        names = sorted(name for name in system.find(path) if not _hidden(name[len(path) :]))
    except (OSError, ValueError) as error:
        raise BadInput(f"{address}: cannot be read ({error})") from error
    if not names:
        raise BadInput(f"{address}: nothing is there; expected a file or a folder")
    return digest([[name[len(path) :].lstrip("/"), _file_digest(system, name)] for name in names])


def local_copy(address: str, folder: Path) -> Path:
    """Return a local path with the content of `address`: the place itself where it is local, else a copy under `folder`."""
    system, path = fsspec.core.url_to_fs(address)
    if "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,)):
        return Path(path)
    target = folder / str(path).rstrip("/").rsplit("/", 1)[-1]
    if system.isfile(path):
        system.get_file(path, str(target))
        return target
    for name in system.find(path):
        destination = target / name[len(path) :].lstrip("/")
        destination.parent.mkdir(parents=True, exist_ok=True)
        system.get_file(name, str(destination))
    return target


def _file_digest(system: fsspec.AbstractFileSystem, path: str) -> str:
    hasher = hashlib.sha256()
    with system.open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))
