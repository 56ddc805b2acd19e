"""A mixture of three Gaussians by class, for tests whose teacher's score is known exactly."""

import torch
from torch import Tensor

from stages.diffusion.conditioning import Conditioning
from stages.diffusion.schedule import NoiseSchedule

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULE = NoiseSchedule.from_scheduler_config(BETAS)
CPU = torch.device("cpu")
SHAPE = (2, 2, 2)
MEANS = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2))


def classes(numbers: Tensor) -> Conditioning:
    return Conditioning(numbers.float().reshape(-1, 1, 1))


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
