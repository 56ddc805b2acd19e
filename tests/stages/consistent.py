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

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULE = NoiseSchedule.from_scheduler_config(BETAS)
CPU = torch.device("cpu")
SHAPE = (2, 2, 2)
MEANS = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2))
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


class MixtureSet:
    def __init__(self, samples: int = 512) -> None:
        generator = torch.Generator().manual_seed(3)
        self.components = torch.randint(3, (samples,), generator=generator)
        self.latents = MEANS[self.components] + 0.3 * torch.randn(samples, *SHAPE, generator=generator)

    def __len__(self) -> int:
        return len(self.components)

    def samples(self, indices: object) -> tuple[Tensor, Conditioning]:
        return self.latents[indices], Conditioning(self.components[indices].float().reshape(-1, 1, 1))  # type: ignore[index]


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
