"""Deterministic moves along the probability-flow ODE, and the consistency function. Parity with diffusers' schedulers is tested."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import Denoiser, predict
from stages.diffusion.schedule import append_dims


def ddim_step(x0: Tensor, eps: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    """x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s) eps (DDIM, arXiv 2010.02502, eq. 12 with no noise)."""
    return alpha_s * x0 + sigma_s * eps


def euler_step(x: Tensor, x0: Tensor, k_t: Tensor, k_s: Tensor) -> Tensor:
    """x + (k_s - k_t) (x - x0) / k_t with k = sqrt(1 - abar) / sqrt(abar) and x = x_t / sqrt(abar_t) (EDM, arXiv 2206.00364, algorithm 1).

    The same move as `ddim_step` in the variance-exploding frame.
    """
    return x + (x - x0) / k_t * (k_s - k_t)


def ddim_move(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    conditioning: Conditioning,
    *,
    unconditional: Conditioning | None = None,
    guidance_scale: float | Tensor = 1.0,
) -> Tensor:
    """One DDIM move t -> s with one (guided, Imagen convention) call of the denoiser; t, s (B,) long, s may be `CLEAN`.

    Returns x_s in float32 or wider.
    """
    x0, eps = predict(denoiser, x_t, t, conditioning, unconditional=unconditional, guidance_scale=guidance_scale)
    return ddim_step(x0, eps, *denoiser.schedule.alpha_sigma(s, x_t.ndim, x0.dtype))


def ddim_moves(
    denoiser: Denoiser,
    x_t: Tensor,
    timesteps: Sequence[Tensor],
    conditioning: Conditioning,
    *,
    unconditional: Conditioning | None = None,
    guidance_scale: float | Tensor = 1.0,
) -> Tensor:
    """DDIM moves through `timesteps`, each (B,) long, the first that of `x_t`: n + 1 of them make n moves (SDXL-Lightning, arXiv 2402.13929, 2.3)."""
    for t, s in pairwise(timesteps):
        moved = ddim_move(denoiser, x_t, t, s, conditioning, unconditional=unconditional, guidance_scale=guidance_scale)
        x_t = torch.where(append_dims(t == s, x_t.ndim), x_t, moved)  # a sample that has arrived stays as it is
    return x_t


class BoundaryScalings(NamedTuple):
    """Coefficients of the consistency function f = c_skip x_t + c_out x0."""

    c_skip: Tensor
    c_out: Tensor


def boundary_scalings(timesteps: Tensor, ndim: int = 4, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> BoundaryScalings:
    """c_skip = sd^2 / ((s t)^2 + sd^2), c_out = s t / sqrt((s t)^2 + sd^2) at timesteps (B,), each (B, 1, ...) float32.

    Consistency models (arXiv 2303.01469) appendix C in LCM's form (arXiv 2310.04378), so that f(x, 0) = x.
    """
    scaled = append_dims(timesteps.double(), ndim) * timestep_scaling
    power = scaled**2 + sigma_data**2
    return BoundaryScalings((sigma_data**2 / power).float(), (scaled / power.sqrt()).float())


def consistency(x0: Tensor, x_t: Tensor, scalings: BoundaryScalings) -> Tensor:
    """f(x_t, t) = c_skip(t) x_t + c_out(t) x0 (LCM, arXiv 2310.04378, eq. 9)."""
    return scalings.c_skip * x_t + scalings.c_out * x0


def lcm_step(denoised: Tensor, noise: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    """x_s = sqrt(abar_s) f + sqrt(1 - abar_s) noise: multistep consistency sampling (arXiv 2303.01469, algorithm 1).

    The last step of a sampler takes f itself.
    """
    return alpha_s * denoised + sigma_s * noise
