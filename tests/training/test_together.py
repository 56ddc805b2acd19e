"""Several processes train one student: torch's elastic agent on gloo."""

import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.progress import NullProgress
from schemas.base import digest
from schemas.errors import BadInput, RunFailed
from schemas.lightning import LinkConfig
from schemas.manifest import Latents, Manifest, Teacher
from stages import lightning
from stages.elastic import Task, processes_for, run_together
from stages.training.metrics import read_metrics
from tests.training import artifacts

pytestmark = pytest.mark.slow

Place = tuple[Path, Manifest[Teacher], Manifest[Latents]]


def settings(**more: object) -> LinkConfig:
    known: dict[str, object] = {"teacher_steps": 8, "steps": 4, "training_steps": 6, "batch_size": 8, "checkpoint_every": 3, "log_every": 3}
    known |= {"optimizer": {"learning_rate": 1e-3}, "adversarial": {"optimizer": {"learning_rate": 1e-3, "betas": (0, 0.99)}}}
    return LinkConfig.model_validate(known | more)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("together")
    teacher = artifacts.make_teacher(folder, "sdxl")
    return folder, teacher, artifacts.make_latents(folder, teacher)


def task(place: Place, config: LinkConfig, name: str) -> Task:
    folder, teacher, latents = place
    scratch = folder / name
    scratch.mkdir()
    workspace = replace(artifacts.workspace(folder, config=config), identity=digest(name), scratch=scratch)
    return Task("lightning", config, lightning.Inputs(teacher=teacher, latents=latents), workspace)


def figures(place: Place, manifest: Manifest[Any]) -> list[dict[str, float]]:
    return list(read_metrics(artifacts.open_store(place[0]).fetch(manifest) / "metrics.parquet"))


def test_two_processes_train_as_one(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "stages")
    config = settings()
    alone = task(place, config, "alone")
    one = figures(place, lightning.run(config, alone.inputs, alone.workspace))
    caplog.clear()
    two = figures(place, run_together(task(place, config, "two"), 2))
    told = [record.getMessage() for record in caplog.records if record.name == "stages.training.loop"]
    assert any(line.startswith("rank 0: step 6/6") for line in told), "what a process logs is told by the one that started it"
    assert not any(line.startswith("rank 1: step") for line in told), "and once"
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for first, second in zip(one, two, strict=True):
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=2e-3, abs=1e-4), (first["step"], name)


class KillOnce(NullProgress):
    """Kills one of the processes when the first steps are done."""

    def __init__(self) -> None:
        self.killed: list[int] = []

    def update(self, done: int, total: int, unit: str, figures: object = None) -> None:  # noqa: ARG002
        if done >= 3 and not self.killed:
            self.killed.append(max(spawned()))
            os.kill(self.killed[0], signal.SIGKILL)


def spawned() -> list[int]:
    """Processes that this one has spawned to work."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # ended meanwhile
            continue
    return found


def test_a_killed_process_is_started_again_and_the_result_is_the_same(place: Place) -> None:
    config = settings(training_steps=24)
    whole = run_together(task(place, config, "whole"), 2)
    wanted = task(place, config, "killed")
    killer = KillOnce()
    again = run_together(replace(wanted, workspace=replace(wanted.workspace, progress=killer)), 2)
    assert len(killer.killed) == 1
    assert {entry.path: entry.sha256 for entry in again.files} == {entry.path: entry.sha256 for entry in whole.files}


def test_what_would_fail_again_is_not_tried_again(place: Place) -> None:
    config = settings(optimizer={"learning_rate": 1e30})
    with pytest.raises(RunFailed, match=r"step \d+, player"):
        run_together(task(place, config, "fails"), 2)
    assert spawned() == []


def test_a_world_that_does_not_fit_is_refused() -> None:
    assert processes_for(settings(), "cpu") == 1
    assert processes_for(settings(world_size=4), "cpu") == 4
    with pytest.raises(BadInput, match="batch_size = 8: expected a multiple of world_size 3 times accumulation_steps 1"):
        processes_for(settings(world_size=3), "cpu")
