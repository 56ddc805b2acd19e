"""Workspaces for tests of stages: a store in a folder, and what the runner would have filled in."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from infra.store import ArtifactStore
from schemas.base import digest
from schemas.manifest import Lineage
from stages.workspace import Workspace


def open_store(folder: Path) -> ArtifactStore:
    """Return a store at `folder`/store."""
    return ArtifactStore.open(f"file://{folder / 'store'}")


def make_workspace(
    tmp_path: Path,
    store: ArtifactStore,
    *,
    identity: str = "test",
    device: str = "cpu",
    outside: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Workspace:
    """Return a workspace with scratch below `tmp_path`. `identity` is any text: its digest serves."""
    return Workspace(
        store=store,
        identity=digest(identity),
        lineage=Lineage(stage="test", node="test", revision=1, config={}, inputs={}),
        scratch=Path(tempfile.mkdtemp(prefix="scratch-", dir=tmp_path)),
        seed=seed,
        device=device,
        outside=outside or {},
    )
