"""Classifier-free guidance (arXiv 2207.12598) in its two conventions, guide_imagen(u, c, w + 1) = guide_lcm(c, u, w), and as a network's input.

Any affine function of the model's output may be guided: eps, v, x0 or the score give the same result at one x_t.
"""

from typing import Any

import torch
from torch import Tensor, nn

EMBEDDED_DIM = 256
"""Values that w is embedded in (diffusers' scripts)."""


def guide_imagen(unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
    """u + s (c - u): 1 is no guidance. Imagen (arXiv 2205.11487) eq. 2, diffusers' pipelines, SDXL-Lightning, DMD2."""
    return unconditional + scale * (conditional - unconditional)


def guide_lcm(conditional: Tensor, unconditional: Tensor, w: float | Tensor) -> Tensor:
    """c + w (c - u): 0 is no guidance. LCM (arXiv 2310.04378) eq. 14."""
    return conditional + w * (conditional - unconditional)


def embed_guidance(w: Tensor, dim: int) -> Tensor:
    """(B, dim) float32 of w (B,): sin and cos of 1000 w at frequencies from 1 to 1/10,000, those of timesteps (LCM, arXiv 2310.04378, 4.2).

    Equal, bit for bit, to `get_guidance_scale_embedding` of diffusers' pipelines, which give it the scale of their call less 1.
    """
    half = dim // 2
    rate = torch.log(torch.tensor(10_000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -rate)
    angles = (w.float() * 1000.0)[:, None] * frequencies.to(w.device)[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def add_guidance_input(unet: Any, dim: int = EMBEDDED_DIM) -> None:
    """Have a UNet take w in the place of guidance, as `timestep_cond` of `dim` values: `time_cond_proj_dim` in diffusers' configuration.

    The new projection is zero, so that the UNet begins as what it was (ControlNet, arXiv 2302.05543); diffusers' scripts draw it at random.
    """
    embedding = unet.time_embedding
    weight = embedding.linear_1.weight
    embedding.cond_proj = nn.Linear(dim, embedding.linear_1.in_features, bias=False, device=weight.device, dtype=weight.dtype)
    nn.init.zeros_(embedding.cond_proj.weight)
    unet.register_to_config(time_cond_proj_dim=dim)


def takes_guidance(unet: Any) -> bool:
    """Whether a UNet takes w as an input."""
    return unet.config.time_cond_proj_dim is not None
