"""A toy chain on a store of its own for every test."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

from infra.store import ArtifactStore
from schemas.loading import parse_recipe
from schemas.recipe import Recipe
from stages.registry import STAGES
from tests.flows import toy

ROOT = Path(__file__).resolve().parents[2]
ENGINE = "from tests.flows import toy; toy.install(); from flows.flow_run import main; main()"
"""What a worker starts for a run."""
COMMAND = "from tests.flows import toy; toy.install(); from flows.cli import main; main()"
PATIENCE_SECONDS = 600
"""For a machine that is busy otherwise: a flow run's process needs ten seconds of a quiet one before it begins."""


def wait_until(done: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        if found := done():
            return found
        time.sleep(0.2)
    pytest.fail(f"{what} did not happen in {PATIENCE_SECONDS} s")


@dataclass
class ToyChain:
    """A recipe, its inputs and its store in one folder."""

    folder: Path
    sections: dict[str, Any] = field(default_factory=dict)

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore.open(self.address)

    @property
    def address(self) -> str:
        return f"file://{self.folder / 'store'}"

    def data(self, **changes: dict[str, Any]) -> dict[str, Any]:
        sections: dict[str, dict[str, Any]] = {
            "ingest": {"table": str(self.folder / "table.csv")},
            "measure": {},
            "select": {},
            "encode": {},
            "teacher": {"source": str(self.folder / "teacher")},
        }
        return {"name": "toy", **{name: value | changes.get(name, {}) for name, value in sections.items()}}

    def recipe(self, **changes: dict[str, Any]) -> Recipe:
        return parse_recipe(self.data(**changes))

    def runs(self) -> list[str]:
        """Stages whose bodies ran since the last call, in order."""
        log = self.folder / "runs.log"
        lines = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def fail(self, stage: str, error: str, times: int = 1) -> None:
        (self.folder / f"{stage}.fail").write_text(f"{error} {times}")

    def command(
        self, *arguments: str, server: str | None = None, output: int | IO[str] = subprocess.PIPE, code: str = COMMAND, **environment: str
    ) -> "subprocess.Popen[str]":
        """Start the command line, or other `code`, with the toys registered."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "DISTILL"))}
        clean |= {"PYTHONPATH": str(ROOT), "TOY_FOLDER": str(self.folder), "DISTILL_STORE_ADDRESS": self.address, "OMP_NUM_THREADS": "1"}
        clean |= {"PREFECT_HOME": str(self.folder / "prefect"), "XDG_CACHE_HOME": str(self.folder / "cache"), "COLUMNS": "200"}
        if server is not None:
            clean["PREFECT_API_URL"] = server
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=self.folder, env=clean | environment, text=True, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
            preexec_fn=_hear_interrupts,  # noqa: PLW1509 - tests start no threads that hold locks here
        )  # fmt: skip

    def run(self, *arguments: str, server: str | None = None, **environment: str) -> tuple[int, str, str]:
        """Run the command line to its end: exit code, stdout, stderr."""
        process = self.command(*arguments, server=server, **environment)
        output, errors = process.communicate(timeout=300)
        return process.returncode, output, errors

    def recipe_file(self, **changes: dict[str, Any]) -> str:
        import yaml

        path = self.folder / "toy.yaml"
        path.write_text(yaml.safe_dump(self.data(**changes)))
        return str(path)


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ToyChain:
    for name in toy.NAMES:
        monkeypatch.setitem(STAGES, name, STAGES[name])
    toy.install()
    monkeypatch.setenv("TOY_FOLDER", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "table.csv").write_text("url,caption\nhttp://a/1.png,one\nhttp://a/2.png,two\nhttp://a/3.png,three")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "weights.bin").write_bytes(bytes(range(32)))
    return ToyChain(tmp_path)


def _hear_interrupts() -> None:
    """A test run started in the background of a script ignores Ctrl-C, and would hand that on to what it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
