"""Content of what lies outside the store (URL tables, teacher folders, prompt files): digests, and local copies."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import fsspec

from infra.hub import first_line, hub_errors
from infra.store.local import DISK_FULL
from schemas.base import digest
from schemas.errors import BadInput

_CHUNK = 8 * 2**20
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_DATA_SUFFIXES = (".parquet", ".csv", ".txt", ".json", ".jsonl", ".yaml", ".yml", ".safetensors", ".npz", ".tar")


@dataclass(frozen=True)
class HubModel:
    """A model repository on the Hugging Face hub, at a revision (a commit, tag or branch; None: the newest of its main branch)."""

    name: str
    """Such as `stabilityai/stable-diffusion-xl-base-1.0`."""
    revision: str | None = None

    @classmethod
    def parse(cls, address: str) -> Self | None:
        """Read `organisation/name` or `organisation/name@revision`; None for anything that is a path or an address.

        A path that exists, one below a folder that exists, and names of data files are paths.
        """
        match = _HUB_ID.fullmatch(address)
        if match is None or Path(address).exists() or Path(address.partition("/")[0]).is_dir() or address.endswith(_DATA_SUFFIXES):
            return None
        return cls(match["name"], match["revision"])

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def content_digest(address: str) -> str:
    """SHA-256 of a file, or digest over relative paths and SHA-256 of all files of a folder (hidden files aside).

    `address` is a local path, a `file://` or any other address fsspec knows, or a hub id, whose digest is over the commit and its files' names and
    hashes. Raises `BadInput` when nothing is there, or the hub cannot be asked.
    """
    hub = HubModel.parse(address)
    if hub is not None:
        info = _hub_info(hub)
        return digest({"commit": info.sha, "files": sorted([file.rfilename, file.blob_id] for file in info.siblings)})
    with _reading(address):
        system, path = fsspec.core.url_to_fs(address)
        if system.isfile(path):
            return _file_digest(system, path)
        names = sorted(name for name in system.find(path) if not _hidden(name[len(path) :]))
        if not names:
            raise BadInput(f"{address}: nothing is there; expected a file or a folder")
        return digest([[name[len(path) :].lstrip("/"), _file_digest(system, name)] for name in names])


def local_copy(address: str, folder: Path, wanted: Callable[[str], bool] = lambda _path: True) -> Path:
    """Return a local path with the content of `address`: the place itself where it is local, else a copy under `folder`.

    Of a remote folder or hub repository only the files are copied whose relative path is `wanted`. Raises `BadInput` when nothing is there.
    """
    hub = HubModel.parse(address)
    if hub is not None:
        return _hub_copy(hub, folder / hub.name.replace("/", "--"), wanted)
    with _reading(address):
        system, path = fsspec.core.url_to_fs(address)
    if "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,)):
        return Path(path)
    target: Path = folder / str(path).rstrip("/").rsplit("/", 1)[-1]
    with _reading(address):
        if system.isfile(path):
            system.get_file(path, str(target))
            return target
        names = [name for name in system.find(path) if wanted(name[len(path) :].lstrip("/"))]
        for name in names:
            destination = target / name[len(path) :].lstrip("/")
            destination.parent.mkdir(parents=True, exist_ok=True)
            system.get_file(name, str(destination))
    if not names:
        raise BadInput(f"{address}: nothing is there; expected a file or a folder")
    return target


def file_names(address: str) -> list[str]:
    """Paths of the files of a folder or hub repository, relative to it; of a file its own name. Raises `BadInput` where nothing can be asked."""
    hub = HubModel.parse(address)
    if hub is not None:
        return [file.rfilename for file in _hub_info(hub).siblings]
    with _reading(address):
        system, path = fsspec.core.url_to_fs(address)
        if system.isfile(path):
            return [Path(path).name]
        return sorted(str(name)[len(path) :].lstrip("/") for name in system.find(path))


def on_this_machine(address: str) -> Path | None:
    """The path that an address means, where something lies there on this machine."""
    path = Path(address.removeprefix("file://"))
    return path if path.exists() else None


@contextmanager
def _reading(address: str) -> Iterator[None]:
    """Turn what fsspec and the libraries behind it raise for an address that cannot be read into `BadInput`; a full disk stays what it is."""
    try:
        yield
    except Exception as error:
        # botocore's own errors (no credentials, no endpoint) are no OSErrors, and importing it only to name them takes a second.
        known = isinstance(error, OSError | ValueError | ImportError) or type(error).__module__.partition(".")[0] == "botocore"
        if not known or (isinstance(error, OSError) and error.errno in DISK_FULL):
            raise
        raise BadInput(f"{address}: cannot be read ({error})") from error


def _hub_info(hub: HubModel) -> Any:
    from huggingface_hub import HfApi  # noqa: PLC0415  # slow to import, and needed by few recipes

    with _hub_errors(hub):
        return HfApi(endpoint=os.environ.get("HF_ENDPOINT")).model_info(hub.name, revision=hub.revision, files_metadata=True, timeout=30)


def _hub_copy(hub: HubModel, target: Path, wanted: Callable[[str], bool]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    info = _hub_info(hub)
    names = [file.rfilename for file in info.siblings if wanted(file.rfilename)]
    if not names:
        raise BadInput(f"{hub}: the hub repository holds none of the files that are needed")
    with _hub_errors(hub):
        # The patterns are globs: in a name without a wildcard they match that name alone.
        snapshot_download(hub.name, revision=info.sha, local_dir=target, allow_patterns=names, endpoint=os.environ.get("HF_ENDPOINT"))
    return target


@contextmanager
def _hub_errors(hub: HubModel) -> Iterator[None]:
    try:
        yield
    except hub_errors() as error:
        raise BadInput(
            f"{hub}: no such file or folder here, and the hub does not give such a model ({first_line(error)}); "
            "expected an existing path, an address, or a hub id and access to the hub"
        ) from error


def _file_digest(system: fsspec.AbstractFileSystem, path: str) -> str:
    hasher = hashlib.sha256()
    with system.open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))
