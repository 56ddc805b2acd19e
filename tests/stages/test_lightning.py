"""Progressive distillation: targets against diffusers' own scheduler and closed forms, the chain on tiny pipelines, exact resume."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from pydantic import ValidationError
from torch import Tensor, nn

from schemas.errors import BadInput
from schemas.lightning import LightningConfig, LinkConfig, trailing_timesteps
from schemas.manifest import Latents, Manifest, StudentLoRA, StudentUNet, Teacher
from schemas.training import OptimizerConfig
from stages import lightning
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.exact import GaussianMixtureDenoiser
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.prediction import PREDICTION_TYPES, PredictionType
from stages.diffusion.schedule import CLEAN, NoiseSchedule
from stages.lightning import ProgressiveLink, SampleSwitch, teacher_moves
from stages.students import load_student
from stages.training import Draw, train
from stages.training.latent_batches import LatentBatch, reader
from tests.training import artifacts
from tests.training.killing import killed_and_resumed
from tests.training.toys import make_workspace

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULE = NoiseSchedule.from_scheduler_config(BETAS)
ADAM = OptimizerConfig(learning_rate=1e-3)
CPU = torch.device("cpu")
SHAPE = (2, 2, 2)
MEANS = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2))


def config(teacher_steps: int, steps: int, **more: object) -> LinkConfig:
    settings: dict[str, object] = {"teacher_steps": teacher_steps, "steps": steps, "optimizer": ADAM, "training_steps": 10, "batch_size": 4}
    return LinkConfig.model_validate(settings | more)


def classes(numbers: Tensor) -> Conditioning:
    return Conditioning(numbers.float().reshape(-1, 1, 1))


def mixture(kind: str = "epsilon") -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(MEANS, 0.3, schedule=SCHEDULE, prediction=PREDICTION_TYPES[kind], by_class=True)


class SmallStudent(nn.Module):
    """Predicts in any type with a network of its own for each timestep of a grid: enough to fit one jump."""

    def __init__(self, grid: tuple[int, ...], prediction: PredictionType) -> None:
        super().__init__()
        torch.manual_seed(0)
        size = MEANS[0].numel()
        self.grid = grid
        self.networks = nn.ModuleList(nn.Sequential(nn.Linear(size + 3, 64), nn.Tanh(), nn.Linear(64, size)) for _ in grid)
        self._prediction = prediction

    @property
    def schedule(self) -> NoiseSchedule:
        return SCHEDULE

    @property
    def prediction(self) -> PredictionType:
        return self._prediction

    def forward(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        one_hot = nn.functional.one_hot(conditioning.prompt_embeds[:, 0, 0].long(), 3).float()
        inputs = torch.cat([x_t.flatten(1), one_hot], 1)
        outputs = torch.stack([network(inputs) for network in self.networks])
        place = torch.tensor([self.grid.index(t) for t in timesteps.tolist()])
        return outputs[place, torch.arange(len(x_t))].reshape(x_t.shape)


class MixtureSet:
    """Samples of the mixture with their component as the conditioning."""

    def __init__(self, samples: int = 512) -> None:
        generator = torch.Generator().manual_seed(3)
        self.components = torch.randint(3, (samples,), generator=generator)
        self.latents = MEANS[self.components] + 0.3 * torch.randn(samples, *SHAPE, generator=generator)

    def __len__(self) -> int:
        return len(self.components)

    def samples(self, indices: object) -> tuple[Tensor, Conditioning]:
        return self.latents[indices], classes(self.components[indices])  # type: ignore[index]


def a_link(settings: LinkConfig, kind: str = "epsilon", unconditional: Conditioning | None = None) -> tuple[ProgressiveLink, SmallStudent]:
    student = SmallStudent(trailing_timesteps(settings.steps), PREDICTION_TYPES[kind])
    parameters = dict(student.named_parameters())
    link = ProgressiveLink(
        settings, teacher=mixture(kind), student=student, parameters=parameters, tensors=student.state_dict(), unconditional=unconditional
    )
    return link, student


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("teacher_steps", "steps", "scale"), [(128, 32, 6.0), (8, 4, 1.0), (8, 2, 1.0), (4, 1, 1.0)])
def test_the_target_is_ddim_of_diffusers(kind: str, teacher_steps: int, steps: int, scale: float) -> None:
    settings = config(teacher_steps, steps, guidance_scale=scale)
    teacher = mixture(kind)
    link, _ = a_link(settings, kind, classes(torch.tensor([-1])) if scale > 1 else None)
    latents, conditioning = MixtureSet().samples(list(range(24)))
    made = link.prepare(LatentBatch(latents, conditioning), Draw(1, (0,), range(24), CPU))
    scheduler = DDIMScheduler(**BETAS, prediction_type=kind, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(teacher_steps)
    assert tuple(scheduler.timesteps.tolist()) == trailing_timesteps(teacher_steps)
    for row in range(24):
        start = int(made.sample.timesteps[0][row])
        first = scheduler.timesteps.tolist().index(start)
        x = made.sample.x_t[row : row + 1]
        for t, s in zip(range(first, first + teacher_steps // steps), made.sample.timesteps[1:], strict=True):
            timestep = scheduler.timesteps[t]
            output = teacher(x, timestep.reshape(1), conditioning[row])
            if scale > 1:
                empty = teacher(x, timestep.reshape(1), classes(torch.tensor([-1])))
                output = empty + scale * (output - empty)
            # The previous timestep that DDIMScheduler takes is t - 1000 // N: off the grid where N is no divisor of 1000.
            following = scheduler.timesteps.tolist()[t + 1] if t + 1 < teacher_steps else CLEAN
            assert int(s[row]) == following
            scheduler.num_inference_steps = 1000 // (int(timestep) - following) if following != CLEAN else 1
            if int(timestep) - 1000 // scheduler.num_inference_steps not in (following, int(timestep) - 1000):
                x = ddim_by_hand(x, output, int(timestep), following, PREDICTION_TYPES[kind])
            else:
                x = scheduler.step(output, int(timestep), x, return_dict=False)[0]
            scheduler.num_inference_steps = teacher_steps
        torch.testing.assert_close(made.target[row : row + 1], x, rtol=1e-5, atol=1e-5)
