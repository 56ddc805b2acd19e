"""Sampling through diffusers' own scheduler objects, operation for operation like its pipelines, so that a plain pipeline call gives equal bits."""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from schemas.errors import BadInput
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import Denoiser, guided_output
from stages.diffusion.schedule import SCHEDULE_KEYS, TRAIN_TIMESTEPS, beginning

LCM_TRAILING = "lcm-trailing"

SAMPLERS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "trailing": (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "lcm": (LCMScheduler, {}),
    LCM_TRAILING: (LCMScheduler, {}),
    "ddim": (DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False}),
    "pndm": (PNDMScheduler, {"timestep_spacing": "trailing", "skip_prk_steps": True, "set_alpha_to_one": True}),
    "heun": (HeunDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "dpmpp": (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}),
}
"""Scheduler class and settings by sampler. `trailing`: Euler (the same moves as DDIM) on the trailing grid, as SDXL-Lightning is sampled (arXiv
2402.13929, 3.5); `lcm`: multistep consistency sampling with a grid of 50 points; `lcm-trailing`: with a grid of as many points as there are steps,
which is the trailing one, as DMD2's students are sampled (arXiv 2405.14867, 4.4). The others are a teacher's, deterministic, from pure noise on the
trailing grid to the clean state: DDIM (arXiv 2010.02502), PNDM without its Runge-Kutta steps (arXiv 2202.09778), Heun (arXiv 2206.00364),
DPM-Solver++ of second order, multistep (arXiv 2211.01095)."""


def make_scheduler(sampler: str, scheduler_config: Mapping[str, Any], prediction_type: str, grid: Sequence[int] = ()) -> Any:
    """The diffusers scheduler to sample with and to publish: the teacher's noise schedule, everything else the sampler's own.

    A teacher's own sampler settings (Karras sigmas, clipping, step offset) are left behind. For a `grid` of timesteps, descending, that begins below
    T - 1 the schedule ends where the grid begins, so that plain pipelines begin there too. Raises `BadInput` for an unknown sampler, and for one
    whose scheduler cannot have the teacher's noise schedule.
    """
    if sampler not in SAMPLERS:
        raise BadInput(f"sampler {sampler!r}: expected one of {', '.join(SAMPLERS)}")
    schedule = {key: scheduler_config[key] for key in SCHEDULE_KEYS if key in scheduler_config}
    if grid and grid[0] + 1 < schedule.get("num_train_timesteps", TRAIN_TIMESTEPS):
        schedule = beginning(schedule, grid[0] + 1)
    kind, settings = SAMPLERS[sampler]
    if sampler == LCM_TRAILING:
        settings = {"original_inference_steps": len(grid)}
    known = inspect.signature(kind.__init__).parameters
    for key in [key for key in schedule if key not in known]:
        if schedule.pop(key):
            able = [name for name, (other, _) in SAMPLERS.items() if key in inspect.signature(other.__init__).parameters]
            raise BadInput(f"sampler {sampler!r}: knows no {key}, which the teacher's schedule has; expected one of {', '.join(able)}")
    return kind(**schedule, **settings, prediction_type=prediction_type)


def check_sampler(sampler: str, scheduler_config: Mapping[str, Any], prediction_type: str, steps: int) -> None:
    """Raise `BadInput` unless the sampler can take `steps` steps of the teacher's schedule on the trailing grid with its prediction type."""
    scheduler = make_scheduler(sampler, scheduler_config, prediction_type)
    scheduler.set_timesteps(steps)
    train_timesteps = scheduler.config.num_train_timesteps
    if train_timesteps % steps:
        raise BadInput(
            f"sampler {sampler!r}: {steps} steps leave its grid; expected a divisor of {train_timesteps}, the teacher's timesteps"
        )
    nothing = torch.zeros(1, 1, 1, 1)
    try:
        scheduler.step(nothing, scheduler.timesteps[0], nothing)
    except (ValueError, NotImplementedError) as error:
        raise BadInput(f"sampler {sampler!r}: cannot take a teacher of prediction_type {prediction_type} ({error})") from error


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor,
    conditioning: Conditioning,
    *,
    scheduler: Any,
    steps: int,
    guidance_scale: float = 1.0,
    unconditional: Conditioning | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Latents (B, C, h, w) from `noise` (B, C, h, w) of unit variance in `steps` calls of the denoiser.

    `guidance_scale` is Imagen's; above 1 it needs `unconditional`. `generator`, one or one an image, gives the noise an LCM step adds: the same
    generators handed to a diffusers pipeline, which draws the starting noise from them first, give the same images. `callback(step, latents)` sees
    the latents after each step.
    """
    scheduler.set_timesteps(steps, device=noise.device)
    begin = getattr(scheduler, "set_begin_index", None)
    if begin is not None:
        begin(0)
    random = list(generator) if isinstance(generator, Sequence) else generator
    extra = {"generator": random} if _takes_generator(scheduler) else {}
    latents: Tensor = noise * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        output = guided_output(
            denoiser,
            scheduler.scale_model_input(latents, timestep),
            timestep.long().expand(len(latents)),
            conditioning,
            unconditional=unconditional,
            guidance_scale=guidance_scale,
        )
        latents = scheduler.step(output, timestep, latents, **extra, return_dict=False)[0]
        if callback is not None:
            callback(step, latents)
    return latents


def image_generator(seed: int, index: int) -> torch.Generator:
    """The random generator of one image, a function of (seed, index) only. It lives on the CPU, so that devices agree."""
    hashed = hashlib.sha256(f"image/{seed}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(hashed[:8], "big") >> 1)


def draw_noise(
    generators: Sequence[torch.Generator],
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Starting noise (B, *shape), one draw a generator, as diffusers' pipelines draw it from `generator=[...]`: in the type of the text encoders."""
    noise: Tensor = randn_tensor((len(generators), *shape), generator=list(generators), device=torch.device(device), dtype=dtype)
    return noise


def starting_noise(seed: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """Starting noise (1, *shape) of one image: the first draw of `image_generator(seed, index)`."""
    return draw_noise([image_generator(seed, index)], shape)


def _takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters
