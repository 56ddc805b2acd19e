"""What a stage is given beside its configuration and inputs: where to read, write and report. Nothing here may change a result."""

import functools
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from infra.progress import NullProgress, Progress
from infra.store import ArtifactStore, Part
from schemas.errors import CorruptArtifact
from schemas.manifest import C, Cost, Lineage, Manifest
from stages.meter import Meter
from stages.ranks import Parallel


@dataclass(frozen=True)
class Workspace:
    """The surroundings of one run of one stage."""

    store: ArtifactStore
    identity: str
    """Identity of the artifact being made."""
    lineage: Lineage
    scratch: Path
    """An empty folder of this run, deleted afterwards."""
    seed: int = 0
    """The recipe's seed, already part of the identity; a section's own seed goes before it."""
    device: str = "cpu"
    outside: Mapping[str, str] = field(default_factory=dict)
    """Address of every outside file the plan digested, by name (the URL table, the teacher's folder)."""
    parallel: Parallel = field(default_factory=Parallel)
    """Which process this is of those that make the artifact together. Only the first writes to the store; the others wait for it."""
    progress: Progress = field(default_factory=NullProgress)
    tensorboard: Path | None = None
    """Folder in which training tells its figures as it goes on. None: nowhere."""
    meter: Meter = field(default_factory=Meter)
    """Runs from the stage's start."""

    def fetch(self, manifest: Manifest[Any], paths: Sequence[str] | None = None) -> Path:
        """Return a local folder with the artifact's files (all, or those named), verified. Read only."""
        return self.store.fetch(manifest, paths)

    def release(self, manifest: Manifest[Any], paths: Sequence[str] | None = None) -> None:
        """Say that fetched files (all of the artifact, or those named) are done with, so that they may leave this machine's disk."""
        self.store.release(manifest, paths)

    def read_range(self, manifest: Manifest[Any], path: str, start: int, stop: int) -> bytes:
        """Read bytes `start..stop-1` of a file where it lies, unverified."""
        return self.store.read_range(manifest, path, start, stop)

    def publish(self, folder: Path, content: C, kept: Mapping[str, tuple[Part, str]] | None = None) -> Manifest[C]:
        """Make the artifact exist: upload every file of `folder`, manifest last. Another writer's finished artifact is adopted.

        `kept` adds files of finished pieces, by their path in the artifact (the piece, the path in it), without bringing them here. Of several
        processes only the first publishes; the others wait for it.
        """
        if not self.parallel.leads:
            self.parallel.wait()
            published = self.store.find(self.identity)
            assert published is not None, "the first process has published it"
            return published  # type: ignore[return-value]
        cost = functools.reduce(Cost.plus, self.store.spent(self.identity), self.meter.cost())
        lineage = self.lineage.model_copy(update={"cost": cost, "finished_at": datetime.now(UTC)})
        manifest: Any = self.store.publish(folder, identity=self.identity, content=content, lineage=lineage, kept=kept)  # type: ignore[arg-type]
        self.parallel.wait()
        return manifest  # type: ignore[no-any-return]

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """A fresh folder in scratch, removed at the end of the block."""
        path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.scratch))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    # Parts: finished shards and checkpoints of an unfinished stage. They survive the process; the runner deletes them once the artifact exists.
    def save_part(self, name: str, folder: Path, note: Mapping[str, JsonValue] | None = None) -> Part:
        """Keep a finished piece of the stage (a shard, a checkpoint) on the store, atomically."""
        assert self.parallel.leads, "the first process saves for all"
        return self.store.save_part(self.identity, name, folder, note or {})

    def parts(self) -> list[Part]:
        """Complete pieces that this run or a killed one before it has kept, sorted by name."""
        return self.store.parts(self.identity)

    def load_part(self, part: Part, destination: Path, paths: Sequence[str] | None = None) -> Path:
        """Copy a piece (all its files, or those named) into `destination`, verified.

        A damaged one is removed, so that the next run makes it again; raises `CorruptArtifact`.
        """
        try:
            return self.store.load_part(self.identity, part, destination, paths)
        except CorruptArtifact as error:
            self.delete_parts([part.name])
            raise CorruptArtifact(f"{error}\nthis finished piece of an unfinished stage is removed: run the same command again") from error

    def delete_parts(self, names: Sequence[str]) -> None:
        """Delete pieces by name."""
        self.store.delete_parts(self.identity, names)
