"""A small student, an exact teacher and a set for the tests of consistency distillation."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from schemas.lcm import LcmConfig
from schemas.training import OptimizerConfig
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.exact import GaussianMixtureDenoiser
from stages.diffusion.prediction import PREDICTION_TYPES, PredictionType
from stages.diffusion.schedule import NoiseSchedule, ddim_solver_timesteps
from stages.diffusion.solvers import ddim_move
from stages.lcm.distillation import ConsistencyDistillation, TargetNetwork
from stages.students import Student
from stages.training import Row, train
from stages.training.latent_batches import reader
from stages.workspace import Workspace
from tests.stages.mixtures import MEANS, SCHEDULE, SHAPE, MixtureSet

NULL = Conditioning(torch.full((1, 1, 1), -1.0))


def config(**more: object) -> LcmConfig:
    settings: dict[str, object] = {"training_steps": 10, "batch_size": 4, "warmup_steps": 2, "lora_rank": 4, "lora_alpha": 8}
    return LcmConfig.model_validate(settings | more)


class SmallStudent(nn.Module):
    """A network with t as an input, in any prediction type."""

    def __init__(self, prediction: PredictionType, schedule: NoiseSchedule = SCHEDULE) -> None:
        super().__init__()
        torch.manual_seed(0)
        size = MEANS[0].numel()
        self.network = nn.Sequential(nn.Linear(size + 4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, size))
        self.schedule, self.prediction = schedule, prediction

    def forward(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        one_hot = nn.functional.one_hot(conditioning.prompt_embeds[:, 0, 0].long(), 3).float()
        output: Tensor = self.network(torch.cat([x_t.flatten(1), one_hot, timesteps[:, None] / 1000], 1)).reshape(x_t.shape)
        return output


def a_method(settings: LcmConfig, kind: str) -> tuple[ConsistencyDistillation, SmallStudent, GaussianMixtureDenoiser]:
    """The method, its student and its teacher; with a target network where a UNet is trained."""
    prediction = PREDICTION_TYPES[kind]
    student = SmallStudent(prediction)
    teacher = GaussianMixtureDenoiser(MEANS, 0.3, schedule=SCHEDULE, prediction=prediction, by_class=True)
    averaged = copy.deepcopy(student).requires_grad_(False)
    target = TargetNetwork(averaged, {name: parameter.detach() for name, parameter in averaged.named_parameters()})
    method = ConsistencyDistillation(
        settings,
        teacher=teacher,
        student=Student(student, dict(student.named_parameters()), student.state_dict()),
        target=target if settings.network == "unet" else None,
        unconditional=NULL,
    )
    return method, student, teacher


class Endpoints:
    """The loop's observer: how far a student's consistency function is, in one call from pure noise, from where its solver's moves lead."""

    SAMPLES = 64

    def __init__(self, method: ConsistencyDistillation, student: SmallStudent, teacher: GaussianMixtureDenoiser, every: int) -> None:
        self.method, self.student, self.every = method, student, every
        self.conditioning = MixtureSet().samples(list(range(self.SAMPLES)))[1]
        self.noise = torch.randn(self.SAMPLES, *SHAPE, generator=torch.Generator().manual_seed(9))
        steps = method.config.ddim_timesteps
        self.ends = self.noise
        for at in reversed(ddim_solver_timesteps(steps)):
            t = torch.full((self.SAMPLES,), at)
            self.ends = ddim_move(teacher, self.ends, t, (t - 1000 // steps).clamp(min=0), self.conditioning)

    def observe(self, _step: int, _rows: Sequence[Row]) -> dict[str, float]:
        """Squared error by the variance of the endpoints."""
        last = torch.full((self.SAMPLES,), 999)
        value = self.method.consistency_function(self.student, self.noise, last, self.conditioning)
        return {"student.error": float((value - self.ends).square().mean() / self.ends.var())}


def convergence(ddim_timesteps: int, workspace: Workspace, *, training_steps: int = 200, every: int = 25) -> dict[int, float]:
    """By training step the error to the ODE's endpoint of a student whose solver's grid has so many timesteps: k = 1000 / `ddim_timesteps`."""
    data = MixtureSet()
    settings = config(
        guidance_w=0.0, loss="l2", training_steps=training_steps, batch_size=128, checkpoint_every=10 * training_steps, warmup_steps=10,
        ddim_timesteps=ddim_timesteps, optimizer=OptimizerConfig(learning_rate=5e-3),
    )  # fmt: skip
    method, student, teacher = a_method(settings, "sample")
    observer = Endpoints(method, student, teacher, every)
    rows = train(method, reader(data), len(data), settings, workspace, seed=1, observer=observer)
    return {int(row["step"]): row["student.error"] for row in rows if "student.error" in row}
