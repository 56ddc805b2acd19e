"""Run a stage in a process of its own that can be killed as a machine kills: `python -m tests.stages.killed JOB.json`.

The job is `Job` as JSON. With `die_after_parts` the process ends itself by SIGKILL at the moment when that many parts are kept.
"""

import logging
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from infra.store import ArtifactStore
from schemas.base import Model, digest
from schemas.manifest import Manifest
from stages.registry import stage
from stages.workspace import Workspace
from tests.workspaces import make_workspace, open_store

ROOT = Path(__file__).resolve().parent.parent.parent


class Job(Model):
    """One run of one stage."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str] = {}
    """Identities."""
    outside: dict[str, str] = {}
    folder: str
    """Where the store is, and scratch."""
    identity: str
    """Any text."""
    seed: int = 0
    patches: dict[str, int] = {}
    """Module constants, as `module:name`, to make chunks small."""
    die_after_parts: int | None = None


def run(job: Job) -> Manifest:
    """Run the job here."""
    kind = stage(job.stage)
    for target, value in job.patches.items():
        module, _, name = target.partition(":")
        setattr(import_module(module), name, value)
    function, inputs_class = kind.load()
    store = open_store(Path(job.folder))
    inputs = inputs_class.model_validate({name: found(store, identity) for name, identity in job.inputs.items()})
    workspace = make_workspace(Path(job.folder), store, identity=job.identity, outside=job.outside, seed=job.seed)
    if job.die_after_parts is not None:
        _arm(job.die_after_parts)
    return function(kind.config.model_validate(job.config), inputs, workspace)


def found(store: ArtifactStore, identity: str) -> Manifest:
    """An artifact that must exist."""
    manifest = store.find(identity)
    assert manifest is not None
    return manifest


def parts_of(job: Job) -> list[str]:
    """Names of the parts that the job's runs have kept so far."""
    return [part.name for part in open_store(Path(job.folder)).parts(digest(job.identity))]


def start(job: Job) -> subprocess.Popen[str]:
    """Run the job in a process of its own."""
    path = Path(job.folder) / f"{digest(job.model_dump(mode='json'))[:12]}.json"
    path.write_text(job.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "tests.stages.killed", str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as in the test's own process: the order of a sum depends on the number of threads
    )


def run_until_it_dies(job: Job) -> None:
    """Run the job in a process of its own and check that it ended by SIGKILL."""
    process = start(job)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output


def _arm(parts: int) -> None:
    save_part = Workspace.save_part
    kept = 0

    def save_and_die(self: Workspace, *arguments: Any, **named: Any) -> Any:
        nonlocal kept
        part = save_part(self, *arguments, **named)
        kept += 1
        if kept == parts:
            os.kill(os.getpid(), signal.SIGKILL)
        return part

    Workspace.save_part = save_and_die  # type: ignore[method-assign]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    run(Job.model_validate_json(Path(sys.argv[1]).read_text()))
