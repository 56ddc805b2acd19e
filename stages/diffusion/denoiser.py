"""The one way methods see a network that denoises: the output at x_t, what it means, and its noise schedule."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from stages.diffusion.conditioning import Conditioning
from stages.diffusion.guidance import embed_guidance, guide_imagen
from stages.diffusion.prediction import PredictionType
from stages.diffusion.schedule import NoiseSchedule, append_dims


class Denoiser(Protocol):
    """A teacher, a student or an exact score. Implementations differ in the network; methods do not see it."""

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of its timesteps."""
        ...

    @property
    def prediction(self) -> PredictionType:
        """What its output means."""
        ...

    def __call__(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Output (B, C, h, w) at x_t (B, C, h, w) and timesteps (B,) long, conditioned on B samples."""
        ...


class Prediction(NamedTuple):
    """A denoiser's output read both ways, float32 or wider, each (B, C, h, w)."""

    x0: Tensor
    eps: Tensor


def guided_output(
    denoiser: Denoiser,
    x_t: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    *,
    unconditional: Conditioning | None = None,
    guidance_scale: float | Tensor = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The denoiser's output, guided in the Imagen convention where `guidance_scale` is above 1, or is a tensor (B,) of scales.

    Both halves go through the network in one call, unconditional first, as in diffusers' pipelines, and are put together in `dtype`, or in the type
    they come in where that is None. Raises `ValueError` when guidance is asked for without an unconditional.
    """
    if not isinstance(guidance_scale, Tensor) and guidance_scale <= 1:
        return denoiser(x_t, timesteps, conditioning)
    if unconditional is None:
        raise ValueError(f"guidance_scale {guidance_scale}: expected an unconditional conditioning")
    if unconditional.batch != conditioning.batch:
        unconditional = unconditional.expand(conditioning.batch)
    both = Conditioning.cat([unconditional, conditioning])
    output = denoiser(_twice(x_t), _twice(timesteps), both)
    half_unconditional, half_conditional = output.to(dtype or output.dtype).chunk(2)
    scale = append_dims(guidance_scale, x_t.ndim) if isinstance(guidance_scale, Tensor) else guidance_scale
    return guide_imagen(half_unconditional, half_conditional, scale)


def predict(
    denoiser: Denoiser,
    x_t: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    *,
    unconditional: Conditioning | None = None,
    guidance_scale: float | Tensor = 1.0,
) -> Prediction:
    """x0 and eps of the denoiser's (guided) output; x0 and eps are guided consistently because both are affine in the output."""
    wide = torch.promote_types(x_t.dtype, torch.float32)
    # Guidance in it too: a scale of 6 would make the rounding of a low-precision output six times as large.
    output = guided_output(denoiser, x_t, timesteps, conditioning, unconditional=unconditional, guidance_scale=guidance_scale, dtype=wide)
    alpha, sigma = denoiser.schedule.alpha_sigma(timesteps, x_t.ndim, wide)
    return Prediction(*denoiser.prediction.to_x0_eps(output, x_t, alpha, sigma))


class UNetDenoiser:
    """diffusers' UNet2DConditionModel of SD1.5, SD2.x or SDXL, possibly with a LoRA on it."""

    def __init__(self, unet: Any, schedule: NoiseSchedule, prediction: PredictionType) -> None:
        self.unet = unet
        self.schedule = schedule
        self.prediction = prediction

    def __call__(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Output (B, C, h, w) in the UNet's type.

        Raises `ValueError` when an SDXL-type UNet gets no pooled text or time ids, and one that takes w as an input none.
        """
        return unet_output(self.unet, x_t, timesteps, conditioning)


def unet_output(unet: Any, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, **residuals: Any) -> Tensor:
    """Output (B, C, h, w) of a UNet2DConditionModel, in its type; `residuals` are a ControlNet's, by the argument's name. Raises `ValueError` as
    `UNetDenoiser` does."""
    dtype = next(unet.parameters()).dtype  # `unet.dtype` walks through all modules: a tenth of a small network's pass
    output: Tensor = unet(
        x_t.to(dtype),
        timesteps,
        timestep_cond=guidance_condition(unet, conditioning, x_t.device, dtype),
        encoder_hidden_states=conditioning.prompt_embeds.to(dtype),
        added_cond_kwargs=added_conditions(unet, conditioning, dtype),
        **residuals,
        return_dict=False,
    )[0]
    return output


def added_conditions(unet: Any, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """What an SDXL-type UNet is conditioned on beside the text. Raises `ValueError` when it gets no pooled text or time ids."""
    if unet.config.addition_embed_type != "text_time":
        return None
    if conditioning.pooled is None or conditioning.time_ids is None:
        raise ValueError("conditioning of an SDXL-type UNet: expected pooled text and time ids")
    return {"text_embeds": conditioning.pooled.to(dtype), "time_ids": conditioning.time_ids}


def guidance_condition(unet: Any, conditioning: Conditioning, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """The embedded w (B, D) of a UNet that takes it as an input; None for others, which are not told. Raises `ValueError` when there is none."""
    dim = unet.config.time_cond_proj_dim
    if dim is None:
        return None
    if conditioning.guidance_w is None:
        raise ValueError("conditioning of a UNet with time_cond_proj_dim: expected guidance_w")
    # Where w is, and moved afterwards: sines of large numbers differ from device to device, and diffusers' pipelines take the CPU's.
    return embed_guidance(conditioning.guidance_w, dim).to(device, dtype)


def _twice(x: Tensor) -> Tensor:
    return x.repeat(2, *(1,) * (x.ndim - 1))
