"""The loop: exact resume, accumulation, players, averages, stops."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from schemas.errors import RunFailed
from schemas.training import OptimizerConfig, TrainingConfig
from stages.training import Draw, train
from tests.training.toys import DATA, SIZE, Duel, Regression, make_workspace, read, run

CONFIG = TrainingConfig(
    training_steps=20, batch_size=8, accumulation_steps=2, checkpoint_every=6, log_every=5, lr_schedule="cosine", warmup_steps=3
)


class Interrupted(Regression):
    """Is stopped in the middle of a step, once."""

    def __init__(self, config: TrainingConfig, at: int, error: BaseException) -> None:
        super().__init__(config)
        self.left, self.error = at, error

    def loss(self, player: str, prepared: tuple[Tensor, Tensor], draw: Draw) -> Mapping[str, Tensor]:
        if self.left == 0:
            raise self.error
        self.left -= 1
        return super().loss(player, prepared, draw)


def parts(folder: Path) -> list[str]:
    return [part.name for part in make_workspace(folder).parts()]


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    kind = "duel"
    config = CONFIG.model_copy(update={"training_steps": 300, "checkpoint_every": 25})
    whole = run(tmp_path / "whole", kind, config)
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "tests.training.toys", str(folder), kind, config.model_dump_json()]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(folder.glob("store/parts/*/checkpoint-00000050/part.json")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert parts(folder)
    assert "checkpoint-00000300" not in parts(folder)
    assert run(folder, kind, config) == whole


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_a_stopped_run_saves_its_last_completed_step(tmp_path: Path, error: BaseException) -> None:
    whole = run(tmp_path / "whole", "regression", CONFIG)
    with pytest.raises(type(error)):
        train(Interrupted(CONFIG, at=2 * 9 + 1, error=error), read, SIZE, CONFIG, make_workspace(tmp_path / "stopped"), seed=7)
    assert parts(tmp_path / "stopped") == ["checkpoint-00000006", "checkpoint-00000009"]
    assert run(tmp_path / "stopped", "regression", CONFIG) == whole


def test_only_the_newest_two_checkpoints_are_kept_and_a_finished_run_is_only_loaded(tmp_path: Path) -> None:
    first = run(tmp_path, "regression", CONFIG)
    assert parts(tmp_path) == ["checkpoint-00000018", "checkpoint-00000020"]
    method = Interrupted(CONFIG, at=0, error=AssertionError("a finished run trained again"))
    rows = train(method, read, SIZE, CONFIG, make_workspace(tmp_path), seed=7)
    assert len(rows) == 20
    assert run(tmp_path, "regression", CONFIG) == first


def test_two_runs_of_one_stage_keep_their_own_checkpoints_and_noise(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    one = train(Regression(CONFIG), read, SIZE, CONFIG, workspace, seed=7, name="autoencoder")
    two = train(Regression(CONFIG), read, SIZE, CONFIG, workspace, seed=7)
    assert one != two
    names = [part.name for part in workspace.parts()]
    assert names == ["autoencoder-00000018", "autoencoder-00000020", "checkpoint-00000018", "checkpoint-00000020"]


def test_a_batch_gives_the_same_weights_however_it_is_cut(tmp_path: Path) -> None:
    weights = []
    for accumulation in (1, 4):
        config = CONFIG.model_copy(update={"accumulation_steps": accumulation})
        assert config.identity_fields() == CONFIG.identity_fields(), "fewer devices go on with what more had begun"
        method = Regression(config, dropout=0.0)
        train(method, read, SIZE, config, make_workspace(tmp_path / str(accumulation)), seed=7)
        weights.append(method.network[0].weight.detach().clone())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def first_moments(folder: Path) -> dict[str, Tensor]:
    """Adam's first moment of each player in the newest checkpoint, flattened."""
    workspace = make_workspace(folder)
    part = workspace.load_part(workspace.parts()[-1], folder / "part")
    moments = {}
    for player in ("generator", "discriminator"):
        tensors = load_file(part / f"optimizer-{player}.safetensors")
        moments[player] = torch.cat([value.flatten() for name, value in sorted(tensors.items()) if name.endswith("exp_avg")])
    return moments


def test_players_have_their_own_clipping_and_learn_only_in_their_turn(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"training_steps": 3, "lr_schedule": "constant", "warmup_steps": 0})
    free, clipped = Duel(config), Duel(config, (None, 1e-3))
    rows = train(free, read, SIZE, config, make_workspace(tmp_path / "free"), seed=7)
    train(clipped, read, SIZE, config, make_workspace(tmp_path / "clipped"), seed=7)
    expected = [("generator", True, False)] * 2 + [("discriminator", False, True)] * 4
    assert free.frozen == expected * 3
    assert rows[0]["discriminator.grad_norm"] > 1e-3
    assert rows[0]["generator.grad_norm"] > 1e-3
    moments = {name: first_moments(tmp_path / name) for name in ("free", "clipped")}
    # with beta 0 the first moment is the gradient itself
    assert moments["clipped"]["discriminator"].norm() == pytest.approx(1e-3, rel=1e-3)
    assert moments["free"]["discriminator"].norm() > 1e-2
    assert moments["clipped"]["generator"].norm() > 1e-2
    assert [row["discriminator.learning_rate"] for row in rows] == pytest.approx([0.03 * (1 - k / 5) for k in (1, 3, 5)])
    assert [row["generator.learning_rate"] for row in rows] == [0.01] * 3


def test_the_average_follows_its_recursion_and_is_what_training_ends_with(tmp_path: Path) -> None:
    decay = 0.8
    seen: list[Tensor] = []

    class Watched(Regression):
        def prepare(self, batch: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
            if draw.positions[0] == 0:
                seen.append(self.network[0].weight.detach().clone())
            return super().prepare(batch, draw)

    config = CONFIG.model_copy(update={"ema_decay": decay})
    plain = Regression(CONFIG)
    train(plain, read, SIZE, CONFIG, make_workspace(tmp_path / "plain"), seed=7)
    averaged = Watched(config)
    train(averaged, read, SIZE, config, make_workspace(tmp_path / "averaged"), seed=7)
    expected = seen[0].clone()
    for weight in [*seen[1:], plain.network[0].weight.detach()]:
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(averaged.network[0].weight.detach(), expected)


@pytest.mark.parametrize(("where", "culprit"), [("loss", "output_std is nan"), ("gradient", "the gradient of 0.weight is not finite")])
def test_nan_stops_the_run_with_step_player_and_culprit(tmp_path: Path, where: str, culprit: str) -> None:
    class Poisoned(Regression):
        steps = 0

        def prepare(self, batch: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
            self.steps += draw.positions[0] == 0
            return super().prepare(batch, draw)

        def loss(self, player: str, prepared: tuple[Tensor, Tensor], draw: Draw) -> Mapping[str, Tensor]:
            named = dict(super().loss(player, prepared, draw))
            if self.steps == 15 and where == "loss":
                named["output_std"] = named["output_std"] * float("nan")
            if self.steps == 15 and where == "gradient":
                named["loss"] = named["loss"] + (self.network[0].weight.sum() * 0.0).sqrt()
            return named

    with pytest.raises(RunFailed, match=rf"step 15, player student: {culprit}; the last good checkpoint is that of step 12"):
        train(Poisoned(CONFIG), read, SIZE, CONFIG, make_workspace(tmp_path), seed=7)
    assert parts(tmp_path) == ["checkpoint-00000006", "checkpoint-00000012"]


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("network-discriminator", "missing piece network-discriminator"),
        ("optimizer-generator", "missing piece optimizer-generator"),
        ("average-generator", "missing piece average-generator"),
        ("optimizer-stranger", "unknown piece optimizer-stranger"),
    ],
)
def test_a_checkpoint_without_a_piece_or_with_a_strange_one_is_refused_by_name(tmp_path: Path, piece: str, message: str) -> None:
    run(tmp_path, "duel", CONFIG)
    workspace = make_workspace(tmp_path)
    newest = workspace.parts()[-1]
    folder = workspace.load_part(newest, tmp_path / "part")
    if message.startswith("missing"):
        (folder / f"{piece}.safetensors").unlink()
    else:
        state = json.loads((folder / "state.json").read_text())
        state["pieces"][piece] = []
        (folder / "state.json").write_text(json.dumps(state))
        (folder / f"{piece}.safetensors").write_bytes((folder / "network-generator.safetensors").read_bytes())
    workspace.save_part(newest.name, folder, newest.note)
    with pytest.raises(RunFailed, match=f"checkpoint-00000020.*{message}"):
        run(tmp_path, "duel", CONFIG)


def test_a_tensor_missing_from_a_piece_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, "regression", CONFIG)
    workspace = make_workspace(tmp_path)
    newest = workspace.parts()[-1]
    folder = workspace.load_part(newest, tmp_path / "part")
    tensors = load_file(folder / "optimizer-student.safetensors")
    del tensors["0.bias/exp_avg"]
    save_file(tensors, folder / "optimizer-student.safetensors")
    workspace.save_part(newest.name, folder, newest.note)
    with pytest.raises(RunFailed, match=r"missing tensor of optimizer-student 0\.bias/exp_avg"):
        run(tmp_path, "regression", CONFIG)


def test_a_method_that_forgets_a_network_is_refused(tmp_path: Path) -> None:
    class Forgetful(Duel):
        def state(self) -> Mapping[str, Mapping[str, Tensor]]:
            return {"generator": self.generator.state_dict()}

    with pytest.raises(ValueError, match="player discriminator: the method's state\\(\\) lacks the parameter weight"):
        train(Forgetful(CONFIG), read, SIZE, CONFIG, make_workspace(tmp_path), seed=7)


def test_bfloat16_keeps_float32_weights_and_learns(tmp_path: Path) -> None:
    config = CONFIG.model_copy(
        update={"precision": "bfloat16", "training_steps": 100, "batch_size": 32, "warmup_steps": 0, "lr_schedule": "constant"}
    )
    method = Regression(config, OptimizerConfig(learning_rate=2e-2), dropout=0.0)
    rows = train(method, read, SIZE, config, make_workspace(tmp_path), seed=7)
    assert all(parameter.dtype == torch.float32 for parameter in method.network.parameters())
    assert rows[-1]["student.loss"] < 0.5 * rows[0]["student.loss"] < DATA.square().mean()
