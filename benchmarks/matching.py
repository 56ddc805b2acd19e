"""What regression does for the modes of a one-step generator: `python -m benchmarks.matching [--mixture grid|random] [--seeds 3]`.

The teacher is the exact score of a Gaussian mixture. One small network is first trained to denoise samples of it; generator and fake score begin as
that network, as in DMD they begin as the teacher, and are trained by the project's own method in its own loop, all on the same data and noise:

- `matching` by matching distributions alone,
- `regression` by that and squared error on pairs of the teacher's deterministic sampler, which is DMD,
- `pairs alone` by the squared error alone, and
- `GAN` by matching and a discriminator against the data, with five updates of the fake score for each of the generator, which is DMD2.

`before` is where all begin, `floor` what two sets of true samples differ by. Modes are those with at least a quarter of the samples due to them.
Means and standard deviations over the seeds of training. The last line is JSON with the table's rows.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.mixture import BatchDraw, a_mixture, as_student
from benchmarks.mixture_networks import SCHEDULE, Encoder, MixtureSet, StudentNetwork, nothing
from infra.store import ArtifactStore
from schemas.base import digest
from schemas.dmd import DmdConfig
from schemas.finetune import FinetuneConfig
from schemas.manifest import Lineage
from schemas.training import OptimizerConfig, TrainingConfig
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.prediction import PREDICTION_TYPES
from stages.diffusion.schedule import CLEAN, trailing_timesteps
from stages.diffusion.solvers import ddim_moves
from stages.dmd.batches import DmdBatch, batch_reader
from stages.dmd.generator import generate
from stages.dmd.matching import DistributionMatching
from stages.dmd.warm_up import PairRegression
from stages.finetune import Denoising
from stages.training import Draw, Figure, train
from stages.training.latent_batches import LatentBatch, reader
from stages.workspace import Workspace

ARMS: Final = ("matching", "regression", "pairs alone", "GAN")
FIGURES: Final = ("energy", "between", "modes")
LAST: Final = SCHEDULE.num_train_timesteps - 1


@dataclass(frozen=True)
class Setting:
    """What is trained, and how long."""

    mixture: str = "grid"
    width: int = 96
    """Of the two layers of every network."""
    batch: int = 128
    begin: int = 1500
    """Steps of denoising."""
    begin_modes: int = 0
    """Modes whose samples the first training sees, those first in the mixture; 0: all."""
    steps: int = 1500
    """Of each arm."""
    rate: float = 1e-3
    """Of denoising and of the fake score."""
    student_rate: float = 5e-4
    pairs: int = 8192
    weight: float = 0.25
    """lambda."""
    most_noise: float = 0.98
    """Highest timestep at which distributions are compared, as a share of T."""
    samples: int = 2048
    """Of each row."""


class Denoised(Denoising):
    """The first training, with numbers drawn for the whole batch."""

    def prepare(self, batch: LatentBatch, draw: Draw) -> Any:
        """See the base."""
        return super().prepare(batch, BatchDraw(draw.seed, draw.key, draw.positions, draw.device))


class Matched(DistributionMatching):
    """The method, with numbers drawn for the whole batch."""

    def loss(self, player: str, prepared: DmdBatch, draw: Draw) -> Mapping[str, Figure]:
        """See the base."""
        return super().loss(player, prepared, BatchDraw(draw.seed, draw.key, draw.positions, draw.device))


class PointPairs:
    """Noise, and where the teacher's deterministic sampler takes it in 50 steps."""

    def __init__(self, mixture: str, count: int) -> None:
        teacher = a_mixture(mixture)[0]
        self.noise = torch.randn(count, teacher.dims, 1, 1, generator=torch.Generator().manual_seed(21))
        timesteps = [torch.full((count,), t) for t in (*trailing_timesteps(50), CLEAN)]
        self.outputs = ddim_moves(teacher.denoiser, self.noise, timesteps, nothing(count))

    def __len__(self) -> int:
        return len(self.noise)

    def pairs(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Conditioning]:
        """See `stages.dmd.batches.Pairs`."""
        chosen = torch.as_tensor(indices)
        return self.noise[chosen], self.outputs[chosen], nothing(len(chosen))


class PointJudge:
    """A head on features of its own: what `StudentNetwork` makes of a point has no bottleneck."""

    def __init__(self, dims: int, width: int, *, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder, self.head = Encoder(dims, width), nn.Linear(width, 1)
        network = nn.ModuleList([self.encoder, self.head])
        self.parameters, self.tensors = dict(network.named_parameters()), network.state_dict()

    def __call__(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Logits (B,)."""
        logits: Tensor = self.head(self.encoder(x_t, timesteps, conditioning)).flatten()
        return logits


@dataclass(frozen=True)
class Run:
    """One seed's training."""

    setting: Setting
    seed: int

    def rows(self, pairs: PointPairs) -> list[dict[str, Any]]:
        """Every arm's figures."""
        setting = self.setting
        mixture, data, truth = a_mixture(setting.mixture)
        begun = StudentNetwork(mixture.dims, setting.width, seed=self.seed)
        begun.prediction = PREDICTION_TYPES["sample"]
        config = FinetuneConfig(network="unet", caption_dropout=0, **self.shared(setting.begin, setting.rate))
        seen = data if setting.begin_modes == 0 else MixtureSet(replace(mixture, means=mixture.means[: setting.begin_modes]))
        self.train(Denoised(config, as_student(begun), unconditional=nothing(1)), reader(seen), len(seen), config, "begin")
        found = [self.row(begun, "before", truth)]
        for arm in ARMS:
            student, fake = (copy.deepcopy(begun).requires_grad_(True) for _ in range(2))
            config = self.config(arm)
            if arm == "pairs alone":
                self.train(PairRegression(config, as_student(student)), batch_reader(None, pairs), len(pairs), config, "pairs")
            else:
                method = Matched(
                    config,
                    teacher=mixture.denoiser,
                    student=as_student(student),
                    fake=as_student(fake),
                    distance=None if config.regression is None else mse_loss,
                    judge=None if config.gan is None else PointJudge(mixture.dims, setting.width, seed=self.seed),
                )
                read = batch_reader(None, pairs) if config.regression is not None else batch_reader(data, None)
                self.train(method, read, len(pairs) if config.regression is not None else len(data), config, "arm")
            found.append(self.row(student, arm, truth))
        return found

    def row(self, student: StudentNetwork, arm: str, truth: Tensor) -> dict[str, Any]:
        """What a generator makes of noise that is the same for all."""
        noise = torch.randn(self.setting.samples, truth.shape[1], 1, 1, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            samples = generate(student, noise, LAST, nothing(len(noise)))
        return {"arm": arm, "seed": self.seed} | a_mixture(self.setting.mixture)[0].figures(samples, truth)

    def shared(self, steps: int, rate: float) -> dict[str, Any]:
        """Settings of every training."""
        return {
            "training_steps": steps,
            "batch_size": self.setting.batch,
            "lr_schedule": "cosine",
            "checkpoint_every": 10 * steps,
            "log_every": 10 * steps,
            "optimizer": OptimizerConfig(learning_rate=rate),
        }

    def config(self, arm: str) -> DmdConfig:
        """Of one arm."""
        paired = {"distance": "l2", "weight": self.setting.weight}
        return DmdConfig.model_validate(
            self.shared(self.setting.steps, self.setting.student_rate)
            | {
                "warmup_steps": 0,
                "noise_range": (0.02, self.setting.most_noise),
                "guidance_scale": 1.0,
                "fake_optimizer": OptimizerConfig(learning_rate=self.setting.rate),
                "regression": paired if arm in ("regression", "pairs alone") else None,
                "gan": {} if arm == "GAN" else None,
                "fake_updates": 5 if arm == "GAN" else 1,
            }
        )

    def train(self, method: Any, read: Any, samples: int, config: TrainingConfig, name: str) -> None:
        """The loop."""
        with tempfile.TemporaryDirectory(prefix="matching-") as place:
            store = ArtifactStore.open(f"file://{place}")
            lineage = Lineage(stage="matching", node="matching", revision=1, config={}, inputs={})
            train(method, read, samples, config, Workspace(store, digest("matching"), lineage, Path(place)), seed=self.seed, name=name)


def table(setting: Setting, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation of every arm over the seeds."""
    mixture, _, truth = a_mixture(setting.mixture)
    found: list[dict[str, Any]] = [{"arm": "floor"} | mixture.figures(mixture.samples(setting.samples, seed=6), truth)]
    for arm in ("before", *ARMS):
        own = [row for row in rows if row["arm"] == arm]
        one: dict[str, Any] = {"arm": arm}
        for name in FIGURES:
            values = [row[name] for row in own]
            one |= {name: statistics.mean(values), f"{name}_std": statistics.stdev(values) if len(values) > 1 else 0.0}
        found.append(one)
    return found


def shown(row: Mapping[str, Any]) -> str:
    """A row for people."""
    text = f"{row['arm']:12}"
    for name, places in zip(FIGURES, (4, 3, 1), strict=True):
        text += f"  {row[name]:8.{places}f}" + (f" ± {row[f'{name}_std']:.{places}f}" if f"{name}_std" in row else " " * (places + 5))
    return text


def main() -> None:
    """Print the table, and its rows as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    for name, default in vars(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = vars(parser.parse_args())
    seeds = given.pop("seeds")
    setting = Setting(**given)
    torch.set_num_threads(1)
    pairs = PointPairs(setting.mixture, setting.pairs)
    made = table(setting, [row for seed in range(seeds) for row in Run(setting, seed).rows(pairs)])
    sys.stdout.write("arm           energy distance     share between     modes\n" + "\n".join(map(shown, made)) + "\n")
    sys.stdout.write(
        json.dumps([{key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()} for row in made]) + "\n"
    )


if __name__ == "__main__":
    main()
