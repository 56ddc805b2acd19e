"""A small student, an exact teacher and a set for the tests of consistency distillation."""

import copy

import torch
from torch import Tensor, nn

from schemas.lcm import LcmConfig
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.exact import GaussianMixtureDenoiser
from stages.diffusion.prediction import PREDICTION_TYPES, PredictionType
from stages.diffusion.schedule import NoiseSchedule
from stages.lcm.distillation import ConsistencyDistillation, TargetNetwork
from stages.students import Student
from tests.stages.mixtures import MEANS, SCHEDULE

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
