"""Rows that earlier evaluations on the store hold: an entry more, or a student more, costs its own rows and no other."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from schemas.base import Sha256, digest
from schemas.errors import CorruptArtifact
from schemas.manifest import Evaluation, Manifest
from stages.evaluate.metrics.catalogue import View
from stages.evaluate.rows import Row
from stages.evaluate.samples import Sampler
from stages.registry import stage
from stages.workspace import Workspace

logger = logging.getLogger(__name__)

_NAMES = ("model", "family", "on")
"""Fields of a row that say what it is called and not how it is drawn."""


def key_of(**made_of: Any) -> Sha256:
    """Digest of all that a row's files follow from."""
    return digest({"revision": stage("evaluate").revision, **made_of})


def row_key(row: Row, sampler: Sampler, looks: Mapping[str, Any], shown: Sequence[View], weights: Mapping[str, Any]) -> Sha256:
    """Digest of all that a row's samples and features follow from; `looks` says how features are made of them, `weights` by
    digests what draws it, and on what pictures."""
    drawn = {name: value for name, value in asdict(row).items() if name not in _NAMES}
    shared = {"prompts": sampler.prompts.digest, "seed": sampler.seed, "batch_size": sampler.batch_size}
    return key_of(row=drawn, looks=dict(looks), shown=list(shown), weights=dict(weights), **shared)


def samples_folder(folder: Path, slug: str) -> Path:
    """Where an evaluation's folder has the shards of a row."""
    return folder / "samples" / slug


def features_file(folder: Path, slug: str) -> Path:
    """Where it has a row's features."""
    return folder / "features" / f"{slug}.safetensors"


def numbers_file(folder: Path, name: str) -> Path:
    """Where it has one number a picture of a row, by the metric's name and the row's."""
    return folder / "numbers" / f"{name}.safetensors"


def copy_row(folder: Path, known: str, slug: str) -> None:
    """Give a row's files in an evaluation's folder a second name."""
    shutil.copytree(samples_folder(folder, known), samples_folder(folder, slug))
    shutil.copyfile(features_file(folder, known), features_file(folder, slug))


class PastRows:
    """Finished rows by their key."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    @cached_property
    def _held(self) -> dict[Sha256, tuple[Manifest, str]]:
        """Manifest of the evaluation and name of the files, by key. Every manifest of the store is read, once."""
        found: dict[Sha256, tuple[Manifest, str]] = {}
        for manifest in self._workspace.store.manifests():
            if isinstance(manifest.content, Evaluation):
                found |= {key: (manifest, slug) for slug, key in manifest.content.rows.items()}
        return found

    def take(self, key: Sha256, slug: str, folder: Path) -> bool:
        """Copy a row's files into an evaluation's folder, under this slug; False where no evaluation holds it whole."""

        def files(manifest: Manifest, known: str) -> dict[str, Path]:
            there = Path()
            shards = samples_folder(there, known)
            samples = (entry.path for entry in manifest.files if Path(entry.path).parent == shards)
            return {features_file(there, known).as_posix(): features_file(folder, slug)} | {
                path: samples_folder(folder, slug) / Path(path).name for path in samples
            }

        return self._take(key, slug, files)

    def take_numbers(self, key: Sha256, name: str, folder: Path) -> bool:
        """The same for numbers of single pictures."""
        return self._take(key, name, lambda _manifest, known: {numbers_file(Path(), known).as_posix(): numbers_file(folder, name)})

    def _take(self, key: Sha256, name: str, files: Callable[[Manifest, str], dict[str, Path]]) -> bool:
        """`files` says by the manifest, and the name that its evaluation knows them by, which files go where."""
        if key not in self._held:
            return False
        manifest, known = self._held[key]
        moved = files(manifest, known)
        try:
            source = self._workspace.fetch(manifest, sorted(moved))
        except (CorruptArtifact, FileNotFoundError) as error:
            logger.warning("%s of evaluation %s is made anew: %s", known, manifest.identity[:12], error)
            return False
        for path, target in moved.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target)
        logger.info("%s: as in evaluation %s", name, manifest.identity[:12])
        return True
