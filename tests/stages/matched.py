"""Small generators, exact scores and made-up pairs for the tests of distribution matching."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from schemas.dmd import DmdConfig
from schemas.manifest import Latents, Manifest, Pairs, Teacher
from schemas.pairs import PairsConfig
from stages import pairs
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.exact import GaussianMixtureDenoiser
from stages.diffusion.prediction import PREDICTION_TYPES, PredictionType
from stages.diffusion.schedule import NoiseSchedule
from stages.dmd.matching import DistributionMatching
from stages.students import Student
from tests.stages.consistent import NULL, SmallStudent
from tests.stages.mixtures import MEANS, SCHEDULE, SHAPE, classes
from tests.training import artifacts


def config(**more: object) -> DmdConfig:
    settings: dict[str, object] = {"training_steps": 4, "batch_size": 4, "warmup_steps": 0, "regression": {"distance": "l2"}}
    return DmdConfig.model_validate(settings | more)


class AffineGenerator(nn.Module):
    """G(z) = a z + b, said as x0: its outputs are N(b, a^2) exactly."""

    def __init__(self, a: float, b: float, schedule: NoiseSchedule = SCHEDULE) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (a, b))
        self.schedule, self.prediction = schedule, PREDICTION_TYPES["sample"]

    def forward(self, x_t: Tensor, _timesteps: Tensor, _conditioning: Conditioning) -> Tensor:
        return self.a * x_t + self.b

    def exact_score(self) -> GaussianMixtureDenoiser:
        return GaussianMixtureDenoiser(self.b.detach().reshape(1, 1, 1, 1), abs(float(self.a.detach())), schedule=SCHEDULE)


class SmallJudge(nn.Module):
    """Logits of x_t and its timestep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.network = nn.Sequential(nn.Linear(MEANS[0].numel() + 1, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0))

    def forward(self, x_t: Tensor, timesteps: Tensor, _conditioning: Conditioning) -> Tensor:
        logits: Tensor = self.network(torch.cat([x_t.flatten(1), timesteps[:, None] / 1000], 1))
        return logits


@dataclass
class Judging:
    """A judge as the method takes it."""

    network: SmallJudge

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self.network.named_parameters())

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self.network.state_dict()

    def __call__(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        logits: Tensor = self.network(x_t, timesteps, conditioning)
        return logits


class MadeUpPairs:
    """Noise and what some map makes of it."""

    def __init__(self, count: int = 64) -> None:
        random = torch.Generator().manual_seed(13)
        self.noise = torch.randn(count, *SHAPE, generator=random)
        self.components = torch.randint(3, (count,), generator=random)
        self.outputs = MEANS[self.components] + 0.3 * self.noise

    def __len__(self) -> int:
        return len(self.noise)

    def pairs(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Conditioning]:
        chosen = list(indices)
        return self.noise[chosen], self.outputs[chosen], classes(self.components[chosen])


def in_training(network: Any) -> Student:
    return Student(network, dict(network.named_parameters()), network.state_dict())


def l2(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().mean()


def a_matching(settings: DmdConfig, kind: str = "epsilon") -> DistributionMatching:
    """The method on small networks and an exact teacher, with all that its configuration asks for."""
    prediction: PredictionType = PREDICTION_TYPES[kind]
    student, fake = SmallStudent(prediction), SmallStudent(prediction)
    with torch.no_grad():
        for parameter in fake.parameters():
            parameter.mul_(0.9)
    teacher = GaussianMixtureDenoiser(MEANS, 0.3, schedule=SCHEDULE, prediction=prediction, by_class=True)
    return DistributionMatching(
        settings,
        teacher=teacher,
        student=in_training(student),
        fake=in_training(fake),
        unconditional=NULL,
        distance=None if settings.regression is None else l2,
        judge=None if settings.gan is None else Judging(SmallJudge()),
    )


def make_pairs(folder: Path, teacher: Manifest[Teacher], latents: Manifest[Latents]) -> Manifest[Pairs]:
    """What the stage `pairs` makes of a tiny teacher, on the store in `folder`."""
    settings = PairsConfig(count=10, sampler="ddim", steps=2, guidance_scale=3.0, batch_size=5)
    return pairs.run(settings, pairs.Inputs(teacher=teacher, latents=latents), artifacts.workspace(folder, config=settings))
