"""What adversarial training does to samples of a student that is too small: `python -m benchmarks.mixture [--mixture grid|random] [--seeds 5]`.

The teacher is the exact score of a Gaussian mixture; students of 4, 2 and 1 steps are small networks, trained by the project's own methods in its own
loop on the same data and noise. Each student begins as the one of more steps (the first at random) and is trained with the squared error; from there

- `MSE` goes on as before, for as many steps as
- `adversarial`, half of them with the conditional discriminator and half with the unconditional, takes.

Two steps and one have the stabilisers of SDXL-Lightning 3.7. At one step these are taken away in turn: `no swap` trains at T - 1 on noisy data, where
sampling starts from noise; `no re-noising` judges the clean sample; `no x0 switch` keeps predicting noise. The teacher's own rows show what so many
steps give without training, and `floor` what two sets of true samples differ by. Means and standard deviations over the seeds of training; the
samples that are compared come from the same noise everywhere. The last line is JSON with the table's rows.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.mixture_networks import SCHEDULE, Mixture, MixtureSet, StudentNetwork, make_discriminator, sampled
from infra.store import ArtifactStore
from schemas.adversarial import AdversarialConfig
from schemas.base import digest
from schemas.lightning import LinkConfig
from schemas.manifest import Lineage
from schemas.training import OptimizerConfig
from stages.diffusion.prediction import PREDICTION_TYPES
from stages.lightning.adversarial import AdversarialLink
from stages.lightning.grid import NoisySample
from stages.lightning.regression import ProgressiveLink, SampleSwitch
from stages.students import Student
from stages.training import Draw, Method, train
from stages.training.latent_batches import LatentBatch, reader
from stages.training.randomness import generator
from stages.workspace import Workspace

CHAIN: Final = (4, 2, 1)
STARTS: Final = (999, 749, 499, 249)
LEVELS: Final = (10, 249, 499, 749)
FIGURES: Final = ("energy", "between", "modes")
PROCESSES: Final = 2


@dataclass(frozen=True)
class Setting:
    """What is trained, and how long."""

    mixture: str = "random"
    teacher_steps: int = 16
    width: int = 32
    """Of the student's two layers."""
    judge_width: int = 64
    batch: int = 128
    steps: int = 400
    """Of each part of a student's training; the first student's first part has twice as many."""
    conversion: int = 200
    rate: float = 2e-3
    """Of the squared error."""
    adversarial_rate: float = 5e-4
    judge_rate: float = 2e-3
    samples: int = 2048
    """Of each row."""


@dataclass(frozen=True)
class Arm:
    """How one row's student is trained."""

    name: str
    adversarial: bool = True
    swap: bool = True
    renoise: bool = True
    switch: bool = True


MSE, ADVERSARIAL = Arm("MSE", adversarial=False), Arm("adversarial")
ABLATIONS: Final = (Arm("no swap", swap=False), Arm("no re-noising", renoise=False), Arm("no x0 switch", switch=False))


class BatchDraw(Draw):
    """One generator for all samples of a batch: in batches of hundreds of points, one for each would take most of the time."""

    def normal(self, purpose: str, shape: Any) -> Tensor:
        """See the base."""
        return torch.randn(len(self.positions), *shape, generator=generator(self.seed, *self.key, purpose))

    def uniform(self, purpose: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """See the base."""
        return low + (high - low) * torch.rand(len(self.positions), generator=generator(self.seed, *self.key, purpose))

    def integers(self, purpose: str, high: int) -> Tensor:
        """See the base."""
        return torch.randint(high, (len(self.positions),), generator=generator(self.seed, *self.key, purpose))


class OnPoints:
    """A method on points in place of pictures, with the swap of 3.5 or without."""

    swap = True

    def prepare(self, batch: LatentBatch, draw: Draw) -> Any:
        """The method's, with numbers drawn for the whole batch."""
        return super().prepare(batch, BatchDraw(draw.seed, draw.key, draw.positions, draw.device))  # type: ignore[misc]

    def sample(self, batch: LatentBatch, draw: Draw) -> NoisySample:
        """The method's; without the swap, with the forward process at T - 1 too."""
        made: NoisySample = super().sample(batch, draw)  # type: ignore[misc]
        if self.swap:
            return made
        eps = draw.normal("noise", batch.latents.shape[1:])
        return replace(made, x_t=SCHEDULE.add_noise(batch.latents, eps, made.timesteps[0]))


class Progressive(OnPoints, ProgressiveLink):
    """The squared error."""


class Switch(OnPoints, SampleSwitch):
    """The switch to x0."""


class Adversarial(OnPoints, AdversarialLink):
    """The adversarial objective."""


@cache
def a_mixture(name: str) -> tuple[Mixture, MixtureSet, Tensor]:
    """By name, with the set to train on and true samples to compare with."""
    mixture = Mixture.grid() if name == "grid" else Mixture.random()
    return mixture, MixtureSet(mixture), mixture.samples(4096, seed=5)


@dataclass(frozen=True)
class Run:
    """One seed's training."""

    setting: Setting
    seed: int

    def rows(self) -> list[dict[str, Any]]:
        """Every student's figures."""
        torch.set_num_threads(1)
        mixture, _, truth = a_mixture(self.setting.mixture)
        found = []

        def measure(student: StudentNetwork, arm: str, few: int) -> None:
            samples = sampled(student, few, mixture.dims, self.setting.samples)
            found.append({"steps": few, "arm": arm, "seed": self.seed} | mixture.figures(samples, truth))

        previous = StudentNetwork(mixture.dims, self.setting.width, seed=self.seed)
        for few in CHAIN:
            begun = self.begun(previous, few, MSE)
            measure(begun, "before", few)
            for arm in (MSE, ADVERSARIAL, *(ABLATIONS if few == 1 else ())):
                apart = not (arm.swap and arm.switch)  # what its first part does otherwise too
                student = self.finished(self.begun(previous, few, arm) if apart else begun, few, arm)
                measure(student, arm.name, few)
                if arm is MSE:
                    following = student
            previous = following
        return found

    def begun(self, start: StudentNetwork, few: int, arm: Arm) -> StudentNetwork:
        """The first part, with the squared error; one step says x0."""
        student = copy.deepcopy(start).requires_grad_(True)
        if few == 1 and arm.switch:
            frozen = copy.deepcopy(start).requires_grad_(False)
            student.prediction = PREDICTION_TYPES["sample"]
            config = self.config(few, self.setting.conversion)
            self.train(Switch(config, teacher=frozen, student=as_student(student)), config, arm, "switch")
        config = self.config(few, self.setting.steps * (2 if few == CHAIN[0] else 1), lr_schedule="constant")
        self.train(Progressive(config, teacher=self.teacher(), student=as_student(student)), config, arm, "begin")
        return student

    def finished(self, start: StudentNetwork, few: int, arm: Arm) -> StudentNetwork:
        """The second part."""
        student = copy.deepcopy(start).requires_grad_(True)
        if not arm.adversarial:
            config = self.config(few, self.setting.steps)
            self.train(Progressive(config, teacher=self.teacher(), student=as_student(student)), config, arm, "finish")
            return student
        for conditional in (True, False):
            discriminator = make_discriminator(self.dims, self.setting.judge_width, conditional=conditional, seed=self.seed)
            objective = AdversarialConfig(
                conditional=conditional,
                optimizer=OptimizerConfig(learning_rate=self.setting.judge_rate, betas=(0.0, 0.99)),
                renoise_timesteps=LEVELS if few <= 2 and arm.renoise else (),
            )
            optimizer = OptimizerConfig(learning_rate=self.setting.adversarial_rate, betas=(0.0, 0.99))
            config = self.config(few, self.setting.steps // 2, adversarial=objective, optimizer=optimizer)
            link = Adversarial(config, teacher=self.teacher(), student=as_student(student), discriminator=discriminator)
            self.train(link, config, arm, "conditional" if conditional else "unconditional")
        return student

    @property
    def dims(self) -> int:
        """Of the mixture."""
        return a_mixture(self.setting.mixture)[0].dims

    def teacher(self) -> Any:
        """The exact one, at every step count."""
        return a_mixture(self.setting.mixture)[0].denoiser

    def config(self, few: int, steps: int, **more: Any) -> LinkConfig:
        """Of one part."""
        settings: dict[str, Any] = {
            "teacher_steps": self.setting.teacher_steps,
            "steps": few,
            "start_timesteps": STARTS if few <= 2 else None,
            "training_steps": steps,
            "batch_size": self.setting.batch,
            "lr_schedule": "cosine",
            "checkpoint_every": 10 * steps,
            "log_every": 10 * steps,
            "optimizer": OptimizerConfig(learning_rate=self.setting.rate),
        }
        return LinkConfig(**settings | more)

    def train(self, method: Method[Any, Any], config: LinkConfig, arm: Arm, name: str) -> None:
        """The loop."""
        assert isinstance(method, OnPoints)
        method.swap = arm.swap
        latents = a_mixture(self.setting.mixture)[1]
        with tempfile.TemporaryDirectory(prefix="mixture-") as place:
            store = ArtifactStore.open(f"file://{place}")
            lineage = Lineage(stage="mixture", node="mixture", revision=1, config={}, inputs={})
            workspace = Workspace(store, digest("mixture"), lineage, Path(place))
            train(method, reader(latents), len(latents), config, workspace, seed=self.seed, name=f"{name}-{config.steps}")


def as_student(network: StudentNetwork) -> Student:
    """All of it in training."""
    return Student(network, dict(network.named_parameters()), network.state_dict())


def table(setting: Setting, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation of every row over the seeds, and in how many of them its energy distance is below `MSE`'s."""
    mixture, _, truth = a_mixture(setting.mixture)
    found: list[dict[str, Any]] = [{"steps": 0, "arm": "floor"} | mixture.figures(mixture.samples(setting.samples, seed=6), truth)]
    for steps in (setting.teacher_steps, *CHAIN):
        samples = sampled(mixture.denoiser, steps, mixture.dims, setting.samples)
        found.append({"steps": steps, "arm": "teacher"} | mixture.figures(samples, truth))
    for steps, arm in dict.fromkeys((row["steps"], row["arm"]) for row in rows):
        own = [row for row in rows if (row["steps"], row["arm"]) == (steps, arm)]
        beside = {row["seed"]: row for row in rows if (row["steps"], row["arm"]) == (steps, MSE.name)}
        one: dict[str, Any] = {"steps": steps, "arm": arm}
        for name in FIGURES:
            values = [row[name] for row in own]
            one |= {name: statistics.mean(values), f"{name}_std": statistics.stdev(values) if len(values) > 1 else 0.0}
            one[f"{name}_lower"] = sum(row[name] < beside[row["seed"]][name] for row in own)
        found.append(one)
    return found


def shown(row: Mapping[str, Any], seeds: int) -> str:
    """A row for people."""
    text = f"{row['steps'] or '':>5}  {row['arm']:14}"
    for name, places in zip(FIGURES, (4, 3, 1), strict=True):
        text += f"  {row[name]:8.{places}f}" + (f" ± {row[f'{name}_std']:.{places}f}" if f"{name}_std" in row else " " * (places + 5))
    compared = row["arm"] not in ("floor", "teacher", MSE.name)
    return text + (f"  {row['energy_lower']}/{seeds}, {row['between_lower']}/{seeds}" if compared else "")


def main() -> None:
    """Print the table, and its rows as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    for name, default in vars(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = vars(parser.parse_args())
    seeds = given.pop("seeds")
    setting = Setting(**given)
    torch.set_num_threads(1)
    with ProcessPoolExecutor(min(PROCESSES, seeds), get_context("spawn")) as pool:
        rows = [row for one in pool.map(partial(_rows, setting), range(seeds)) for row in one]
    made = table(setting, rows)
    head = "steps  arm             energy distance     share between     modes        below MSE's: energy, between\n"
    sys.stdout.write(head + "\n".join(shown(row, seeds) for row in made) + "\n")
    sys.stdout.write(
        json.dumps([{key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()} for row in made]) + "\n"
    )


def _rows(setting: Setting, seed: int) -> list[dict[str, Any]]:
    return Run(setting, seed).rows()


if __name__ == "__main__":
    main()
