"""Alarms: what raises them, and that going back to an anchor ends with the same bits wherever a run was killed."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, distributed, multiprocessing, nn

from schemas.errors import RunFailed
from schemas.training import OptimizerConfig, TrainingConfig
from schemas.watching import Alarms
from stages.ranks import Parallel
from stages.training import Draw, Figure, Method, Player, Row, Spread, train, write_metrics
from stages.training.alarms import raised
from stages.training.metrics import read_metrics
from stages.workspace import Workspace
from tests.training.mortal import Killed, Mortal
from tests.training.toys import SIZE, make_workspace, read


class Growing(Method[Tensor, Tensor]):
    """A factor that grows as fast as its rate lets it: its outputs leave any band, later where the rate is lower."""

    def __init__(self, config: TrainingConfig, poisoned: int | None = None) -> None:
        self.factor, self.poisoned = nn.Parameter(torch.zeros(6)), poisoned
        self.players = {"student": Player.of({"factor": self.factor}, OptimizerConfig(learning_rate=0.1), config)}

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {"student": {"factor": self.factor.detach()}}

    def prepare(self, batch: Tensor, draw: Draw) -> Tensor:
        return batch + 0.1 * draw.normal("noise", batch.shape[1:])

    def loss(self, player: str, prepared: Tensor, draw: Draw) -> Mapping[str, Figure]:  # noqa: ARG002
        output = (1 + self.factor) * prepared
        loss = -output.square().mean()
        if self.poisoned == draw.key[0]:
            self.poisoned, loss = None, loss * float("nan")
        return {"loss": loss, "x0": Spread.of(output), "reference": Spread.of(prepared)}


ALARMS = Alarms(latent_std_band=(0.5, 1.8), patience=3, action="roll_back", anchor_every=5, rate_factor=0.25)
CONFIG = TrainingConfig(training_steps=26, batch_size=4, checkpoint_every=4, alarms=ALARMS)


def outcome(folder: Path, config: TrainingConfig, workspace: Workspace | None = None) -> tuple[bytes, bytes]:
    method = Growing(config)
    rows = train(method, read, SIZE, config, workspace or make_workspace(folder), seed=7)
    write_metrics(rows, folder / "metrics.parquet")
    return method.factor.detach().numpy().tobytes(), (folder / "metrics.parquet").read_bytes()


def test_it_goes_back_to_an_anchor_of_before_with_lower_rates_and_fresh_noise(tmp_path: Path) -> None:
    outcome(tmp_path, CONFIG)
    rows = read_metrics(tmp_path / "metrics.parquet")
    steps = [int(row["step"]) for row in rows]
    alarms = [number for number, row in enumerate(rows) if "alarm.latent_std" in row]
    assert 1 <= len(alarms) <= 3
    assert steps[-1] == 26
    again = {}
    for number in alarms:
        band = [row["student.x0_std"] / row["student.reference_std"] for row in rows[number - 3 : number + 1]]
        assert band[0] <= 1.8 < min(band[1:])
        anchor = steps[number + 1] - 1
        assert anchor == (steps[number] - 3) // 5 * 5, "the newest anchor before the first bad step"
        assert rows[number + 1]["student.learning_rate"] == rows[number]["student.learning_rate"] / 4
        again[number + 1] = rows[steps.index(anchor + 1)]
    for number, first in again.items():
        assert rows[number]["student.reference_std"] != first["student.reference_std"], "the same noise would lead to the same alarm"


@pytest.mark.parametrize("lives", [4, 5, 7])
def test_wherever_it_is_killed_it_ends_with_the_same_bits(tmp_path: Path, lives: int) -> None:
    """Killed whenever the store has been written to so many times, which a run does some thirty times: between the parts of a roll-back too."""
    whole = outcome(tmp_path / "whole", CONFIG.model_copy(update={"checkpoint_every": 1000}))
    given = make_workspace(tmp_path / "killed")
    for deaths in range(100):
        try:
            again = outcome(tmp_path / "killed", CONFIG, Mortal.of(given, lives))
        except Killed:
            continue
        assert deaths >= 3
        assert again == whole
        return
    pytest.fail("it never ended")


def _process(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world_size)
    own = folder / f"rank-{rank}"
    own.mkdir()
    outcome(own, CONFIG, replace(make_workspace(folder), scratch=own, parallel=Parallel(rank, world_size)))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_go_back_together_where_one_would(tmp_path: Path) -> None:
    outcome(tmp_path, CONFIG)
    (tmp_path / "two").mkdir()
    multiprocessing.spawn(_process, (2, tmp_path / "two"), nprocs=2)
    alone = read_metrics(tmp_path / "metrics.parquet")
    assert any("alarm.latent_std" in row for row in alone)
    for rank in range(2):
        together = read_metrics(tmp_path / "two" / f"rank-{rank}" / "metrics.parquet")
        for one, two in zip(alone, together, strict=True):
            assert two == pytest.approx(one, rel=1e-4), (rank, one["step"])


def test_old_anchors_are_deleted(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"alarms": ALARMS.model_copy(update={"latent_std_band": (0.01, 1e9)})})
    outcome(tmp_path, config)
    names = [part.name for part in make_workspace(tmp_path).parts()]
    assert names == [*(f"checkpoint-{step:08d}" for step in (24, 26)), *(f"checkpoint.anchor-{step:08d}" for step in (20, 25))]


def test_a_value_that_is_not_finite_is_taken_back_too(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"alarms": Alarms(action="roll_back", anchor_every=4)})
    rows = train(Growing(config, poisoned=9), read, SIZE, config, make_workspace(tmp_path), seed=7)
    assert [int(row["step"]) for row in rows] == [*range(1, 11), *range(9, 27)]
    assert rows[9] == {"step": 10, "alarm.non_finite": 1}
    assert all(map(math.isfinite, (value for row in rows for value in row.values())))


def test_after_too_many_and_where_alarms_stop_the_run_fails_with_the_reason(tmp_path: Path) -> None:
    stopping = CONFIG.model_copy(update={"alarms": ALARMS.model_copy(update={"action": "stop"})})
    found = r"step \d+, alarm latent_std: the deviation of the student's latents is [\d.]+, the reference's [\d.]+ \(latent_std_band 0.5 to 1.8\)"
    for _ in range(2):  # a run that fails by itself fails again
        with pytest.raises(
            RunFailed, match=found + r" for 3 steps in a row; .* of step \d+; lower the learning rates, or set alarms.action"
        ):
            outcome(tmp_path / "stops", stopping)
    twice = CONFIG.model_copy(update={"training_steps": 200, "alarms": ALARMS.model_copy(update={"max_roll_backs": 2})})
    with pytest.raises(RunFailed, match=r"for 3 steps in a row, after 2 roll-backs \(alarms.max_roll_backs\); lower the learning rates"):
        outcome(tmp_path / "twice", twice)


def rows_of(*accuracies: tuple[float, float], loss: float = 0.3) -> list[Row]:
    names = ("discriminator.real_accuracy", "discriminator.fake_accuracy")
    return [{"step": step, "discriminator.loss": loss, **dict(zip(names, pair, strict=True))} for step, pair in enumerate(accuracies, 1)]


def test_a_saturated_discriminator_is_right_about_both_for_long_enough() -> None:
    alarms = Alarms(saturated_steps=3, saturated_accuracy=0.9)
    alarm = raised(rows_of((0.5, 0.5), (1, 0.9), (0.9, 1), (1, 1)), alarms)
    assert alarm is not None
    assert (alarm.name, alarm.step, alarm.first_bad) == ("saturated", 4, 2)
    assert raised(rows_of((1, 1), (1, 0.89), (1, 1), (1, 1)), alarms) is None
    assert raised(rows_of((1, 1), (1, 1)), alarms) is None
    assert raised(rows_of((1, 1), (1, 1), (1, 1)), Alarms()) is None
    taken_back = [*rows_of((1, 1), (1, 1), (1, 1)), *rows_of((1, 1), (1, 1))]
    assert raised(taken_back, alarms) is None


def test_a_mean_that_drifts_is_told_in_deviations_of_the_reference() -> None:
    rows: list[Row] = [{"step": 1, "student.x0_mean": 0.9, "student.reference_mean": 0.5, "student.reference_std": 0.5}]
    assert raised(rows, Alarms(latent_mean_drift=0.81, patience=1)) is None
    alarm = raised(rows, Alarms(latent_mean_drift=0.79, patience=1))
    assert alarm is not None
    assert "the mean of the student's latents is 0.9, the reference's 0.5 +- 0.5" in alarm.said


def test_a_discriminator_like_a_coin_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for loss in (0.3, 2 * math.log(2) + 0.005):
            assert raised(rows_of(*[(0.5, 0.5)] * 4, loss=loss), Alarms(saturated_steps=4)) is None
    assert [record.getMessage() for record in caplog.records] == [
        "step 4: the discriminator's loss is 1.391, that of a coin (2 log 2): it tells real from fake no better for 4 steps in a row"
    ]


def test_a_band_without_room_is_refused() -> None:
    with pytest.raises(ValidationError, match="expected the lowest ratio before the highest"):
        Alarms(latent_std_band=(2.0, 0.5))
