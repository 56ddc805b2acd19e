"""How a few-step generator is called: once at its fixed timestep, or along its grid on its own outputs (DMD 3.1; DMD2 4.5)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import Denoiser, predict
from stages.training import Draw


def generate(denoiser: Denoiser, x_t: Tensor, timestep: int, conditioning: Conditioning) -> Tensor:
    """G(x_t) = the prediction of x0 (B, C, h, w) at one timestep, float32 or wider. At a generator's first timestep x_t is pure noise."""
    return predict(denoiser, x_t, _filled(timestep, x_t), conditioning).x0


@torch.no_grad()
def roll_out(denoiser: Denoiser, noise: Tensor, timesteps: Sequence[int], conditioning: Conditioning, fresh: Sequence[Tensor]) -> Tensor:
    """The generator's own noisy input (B, C, h, w) at the last of `timesteps`, from pure `noise` at the first (backward simulation, DMD2 4.5).

    Each call's x0 is noised to the next timestep with one of `fresh`, so there are as many as moves. One timestep gives the noise itself.
    """
    x_t = noise
    for t, s, eps in zip(timesteps[:-1], timesteps[1:], fresh, strict=True):
        x_t = denoiser.schedule.add_noise(generate(denoiser, x_t, t, conditioning), eps, _filled(s, x_t))
    return x_t


def drawn_input(
    denoiser: Denoiser, timesteps: Sequence[int], shape: Sequence[int], conditioning: Conditioning, draw: Draw
) -> tuple[Tensor, int]:
    """What the generator is called with in one turn, and its timestep: one of its grid, the same for all samples of the step."""
    calls = 1 + draw.shared_integer("grid", len(timesteps))
    fresh = [draw.normal(f"fresh-{call}", shape) for call in range(1, calls)]
    return roll_out(denoiser, draw.normal("noise", shape), timesteps[:calls], conditioning, fresh), timesteps[calls - 1]


def _filled(timestep: int, like: Tensor) -> Tensor:
    return torch.full((len(like),), timestep, device=like.device)
