"""The discrete noise schedule x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, and the timestep grids of the samplers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from schemas.errors import BadInput
from schemas.lightning import TRAIN_TIMESTEPS, trailing_timesteps

__all__ = [
    "CLEAN",
    "SCHEDULE_KEYS",
    "TRAIN_TIMESTEPS",
    "NoiseSchedule",
    "append_dims",
    "beginning",
    "ddim_solver_timesteps",
    "lcm_timesteps",
    "trailing_timesteps",
]

CLEAN = -1
"""The timestep that means no noise: alpha 1, sigma 0. The last move of a sampler goes to it."""

SCHEDULE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
"""Entries of a diffusers scheduler's configuration that define the noise schedule; the others belong to a sampler."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Cumulative signal power by timestep index 0..T-1; a paper's timestep T is index T - 1."""

    alphas_cumprod: Tensor
    """abar, (T,) float64 on the CPU, strictly decreasing; the values are those of diffusers' schedulers (a float32 product)."""
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from the configuration of any diffusers scheduler with betas.

        Raises `BadInput` for a schedule without betas (flow matching) or of a shape that is not known here.
        """
        return cls(torch.cumprod(1 - _betas(config), dim=0).double())

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def alpha_sigma(self, timesteps: Tensor, ndim: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t) at `timesteps` (B,) long, each (B, 1, ...) with `ndim` dimensions, on the timesteps' device.

        `CLEAN` gives 1 and 0. Raises `IndexError` for other timesteps outside 0..T-1, on a GPU the device's own error for those beyond: a look at
        the values would have the host wait.
        """
        on_host = timesteps.device.type == "cpu" and timesteps.numel() > 0
        if on_host and not (int(timesteps.min()) >= CLEAN and int(timesteps.max()) < self.num_train_timesteps):
            raise IndexError(f"timesteps {timesteps.tolist()}: expected {CLEAN} (clean) or 0..{self.num_train_timesteps - 1}")
        abar = self._with_clean(timesteps.device)[timesteps]
        return append_dims(abar.sqrt().to(dtype), ndim), append_dims((1 - abar).sqrt().to(dtype), ndim)

    def _with_clean(self, device: torch.device) -> Tensor:
        """abar on a device, and 1 behind it, which the index -1 reads."""
        if device not in self._tables:
            self._tables[device] = torch.cat([self.alphas_cumprod, self.alphas_cumprod.new_ones(1)]).to(device)
        return self._tables[device]

    def add_noise(self, x0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (DDPM, arXiv 2006.11239, eq. 4); x0 and eps (B, ...), timesteps (B,) long."""
        alpha, sigma = self.alpha_sigma(timesteps, x0.ndim, torch.promote_types(x0.dtype, torch.float32))
        return (alpha * x0 + sigma * eps).to(x0.dtype)


def append_dims(x: Tensor, ndim: int) -> Tensor:
    """Append dimensions of size 1 to (B,) until it has `ndim`."""
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def lcm_timesteps(steps: int, original_steps: int = 50, train_timesteps: int = TRAIN_TIMESTEPS) -> tuple[int, ...]:
    """Timesteps LCMScheduler samples with, descending: `steps` of the solver's grid at evenly spaced indices, rounded down (diffusers).

    Raises `ValueError` when the solver's grid has fewer than `steps` points.
    """
    if not 1 <= steps <= original_steps:
        raise ValueError(f"{steps} steps: expected 1..{original_steps}, the size of the solver's grid")
    descending = ddim_solver_timesteps(original_steps, train_timesteps)[::-1]
    return tuple(descending[i * original_steps // steps] for i in range(steps))


def ddim_solver_timesteps(steps: int = 50, train_timesteps: int = TRAIN_TIMESTEPS) -> tuple[int, ...]:
    """Grid of the solver of consistency distillation, ascending: k i - 1 for i = 1..N with skip k = T / N (LCM, arXiv 2310.04378, 4.3)."""
    skip = train_timesteps // steps
    return tuple(skip * i - 1 for i in range(1, steps + 1))


def beginning(config: Mapping[str, Any], timesteps: int) -> dict[str, Any]:
    """A scheduler's configuration with the first `timesteps` of a noise schedule, as betas one by one. Raises `BadInput` as `NoiseSchedule` does."""
    return {"num_train_timesteps": timesteps, "trained_betas": _betas(config)[:timesteps].tolist()}


def _betas(config: Mapping[str, Any]) -> Tensor:
    """Betas in float32, operation for operation as diffusers computes them, so that our schedule is the published sampler's."""
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    else:
        missing = [key for key in ("beta_start", "beta_end", "beta_schedule") if key not in config]
        if missing:
            raise BadInput(
                f"scheduler {config.get('_class_name', '')}: its configuration has no {', '.join(missing)}; expected a beta schedule"
            )
        start, end, steps = config["beta_start"], config["beta_end"], config.get("num_train_timesteps", TRAIN_TIMESTEPS)
        kind = config["beta_schedule"]
        if kind == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float32)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
        else:
            raise BadInput(
                f"scheduler {config.get('_class_name', '')}: beta_schedule {kind!r} is not supported; expected linear or scaled_linear"
            )
    return _zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) so that its last value is 0 (arXiv 2305.08891, algorithm 1)."""
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    abar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
