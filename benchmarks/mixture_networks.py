"""The networks of `benchmarks.mixture`: a student and a discriminator too small for what they are asked, and the mixture itself."""

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from stages.diffusion.conditioning import Conditioning
from stages.diffusion.discriminator import Discriminator
from stages.diffusion.exact import GaussianMixtureDenoiser
from stages.diffusion.prediction import PREDICTION_TYPES
from stages.diffusion.schedule import CLEAN, NoiseSchedule, trailing_timesteps
from stages.diffusion.solvers import ddim_moves

SCHEDULE: Final = NoiseSchedule.from_scheduler_config(
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
)
TRAINING_SAMPLES: Final = 32_768
_OUTSIDE: Final = 3.09
"""Standard normal quantile of .999: so few of a mode's own samples lie outside its ball."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Equal Gaussians at `means` (K, d, 1, 1)."""

    means: Tensor
    std: float

    @classmethod
    def grid(cls, side: int = 5, std: float = 0.1) -> "Mixture":
        """`side` x `side` modes in the plane, from -1.5 to 1.5."""
        line = torch.linspace(-1.5, 1.5, side)
        return cls(torch.cartesian_prod(line, line).reshape(-1, 2, 1, 1), std)

    @classmethod
    def random(cls, modes: int = 32, dims: int = 8, std: float = 0.3) -> "Mixture":
        """Means drawn once from a standard normal."""
        return cls(torch.randn(modes, dims, 1, 1, generator=torch.Generator().manual_seed(11)), std)

    @property
    def dims(self) -> int:
        """d."""
        return self.means.shape[1]

    @property
    def denoiser(self) -> GaussianMixtureDenoiser:
        """Its exact score, as a teacher."""
        return GaussianMixtureDenoiser(self.means, self.std, schedule=SCHEDULE)

    def samples(self, count: int, seed: int) -> Tensor:
        """Samples (count, d, 1, 1)."""
        random = torch.Generator().manual_seed(seed)
        chosen = self.means[torch.randint(len(self.means), (count,), generator=random)]
        return chosen + self.std * torch.randn(chosen.shape, generator=random)

    def figures(self, x: Tensor, truth: Tensor) -> dict[str, float]:
        """Energy distance to `truth`, share of `x` in no mode's ball, and modes with at least a quarter of the samples due to them."""
        # The ball of a mode holds .999 of its samples: quantile of chi square by Wilson and Hilferty's cube.
        spread = 2 / (9 * self.dims)
        radius = self.std * math.sqrt(self.dims * (1 - spread + _OUTSIDE * math.sqrt(spread)) ** 3)
        nearest, mode = torch.cdist(x.flatten(1), self.means.flatten(1)).min(1)
        inside = nearest <= radius
        counts = torch.bincount(mode[inside], minlength=len(self.means))
        return {
            "energy": energy_distance(x.flatten(1), truth.flatten(1)),
            "between": 1 - float(inside.float().mean()),
            "modes": float((counts >= len(x) / len(self.means) / 4).sum()),
        }


class MixtureSet:
    """Samples of a mixture as an encoded set; nothing is conditioned on."""

    def __init__(self, mixture: Mixture) -> None:
        self.latents = mixture.samples(TRAINING_SAMPLES, seed=3)

    def __len__(self) -> int:
        return len(self.latents)

    def samples(self, indices: Any) -> tuple[Tensor, Conditioning]:
        """Latents (B, d, 1, 1), and a conditioning that says nothing."""
        chosen = self.latents[torch.as_tensor(indices)]
        return chosen, nothing(len(chosen))


def nothing(batch: int) -> Conditioning:
    """The conditioning of networks that have none."""
    return Conditioning(torch.zeros(batch, 1, 1))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of samples (n, d), without bias: below zero by chance where both are of one distribution."""
    within = [float(torch.cdist(one, one).sum()) / (len(one) * (len(one) - 1)) for one in (x, y)]
    return 2 * float(torch.cdist(x, y).mean()) - sum(within)


@torch.no_grad()
def sampled(denoiser: Any, steps: int, dims: int, count: int) -> Tensor:
    """Samples from noise, always the same, in `steps` DDIM moves on the trailing grid."""
    noise = torch.randn(count, dims, 1, 1, generator=torch.Generator().manual_seed(1))
    timesteps = [torch.full((count,), t) for t in (*trailing_timesteps(steps), CLEAN)]
    return ddim_moves(denoiser, noise, timesteps, nothing(count))


class TimedLayers(nn.Module):
    """Two layers of `width`, each told the timestep."""

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dims, width), nn.Linear(width, width)])
        self.times = nn.ModuleList([nn.Linear(8, width), nn.Linear(8, width)])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, width) of x (B, dims) and an embedded timestep (B, 8)."""
        for layer, timed in zip(self.layers, self.times, strict=True):
            x = silu(layer(x) + timed(time))
        return x


def embedded(timesteps: Tensor) -> Tensor:
    """Four frequencies (B, 8) of timesteps (B,)."""
    angle = timesteps[:, None] / 1000 * math.pi * torch.tensor([0.5, 1, 2, 4])
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class StudentNetwork(nn.Module):
    """A denoiser of two small layers, and beside them x_t times a number that depends on the timestep, as a UNet's skip connections give."""

    def __init__(self, dims: int, width: int, *, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = TimedLayers(dims, width)
            self.out, self.skip = nn.Linear(width, dims), nn.Linear(8, 1)
        self.schedule, self.prediction = SCHEDULE, PREDICTION_TYPES["epsilon"]

    def forward(self, x_t: Tensor, timesteps: Tensor, _conditioning: Conditioning) -> Tensor:
        """Output (B, d, 1, 1)."""
        x, time = x_t.flatten(1), embedded(timesteps)
        output: Tensor = self.out(self.layers(x, time)) + self.skip(time) * x
        return output.reshape(x_t.shape)


class Encoder(TimedLayers):
    """d of a discriminator."""

    def forward(self, x: Tensor, timesteps: Tensor, _conditioning: Conditioning) -> Tensor:  # type: ignore[override]
        """Features (B, width)."""
        return super().forward(x.flatten(1), embedded(timesteps.clamp(min=0)))


def make_discriminator(dims: int, width: int, *, conditional: bool, seed: int) -> Discriminator[Any]:
    """A discriminator of one or both of x_s and x_t."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Sequential(nn.Linear(width * (2 if conditional else 1), width), nn.SiLU(), nn.Linear(width, 1), nn.Flatten(0))
        return Discriminator(Encoder(dims, width), head, conditional=conditional)
