"""The same tests run against a folder and against a real S3 server."""

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.store import ArtifactStore, StoreSettings
from schemas.manifest import ImageShards, Lineage

CONTENT = ImageShards(rows_in_table=3, images=2, shards=1)
LINEAGE = Lineage(stage="ingest", node="ingest", revision=1, config={}, inputs={})

Write = Callable[..., Path]


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.service)])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of an empty store; the environment reaches it."""
    monkeypatch.setenv("DISTILL_STORE_CACHE_DIR", str(tmp_path / "cache"))
    if request.param == "file":
        return f"file://{tmp_path / 'store'}"
    server = request.getfixturevalue("seaweedfs")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{server.bucket}/{uuid.uuid4().hex}"


@pytest.fixture
def store(address: str) -> ArtifactStore:
    return ArtifactStore.open(address, StoreSettings(transfer_workers=4, retries=3))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write("name", {"a/b": b"..."})` makes a folder with these files."""

    def make(name: str, files: dict[str, bytes]) -> Path:
        folder = tmp_path / "scratch" / name
        folder.mkdir(parents=True)
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        return folder

    return make


@pytest.fixture
def other_process() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """`other_process("publish", address, ...)` runs `tests.infra.store_process`; whatever still lives at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.infra.store_process", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
