"""A ControlNet beside a UNet (arXiv 2302.05543), and the edges of pictures as its condition."""

from typing import Any, Final

import torch
from torch import Tensor

from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import UNetDenoiser, added_conditions, unet_output

_LUMA: Final = (0.299, 0.587, 0.114)
"""Rec. 601."""
_SOBEL: Final = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))


class ControlledDenoiser(UNetDenoiser):
    """A UNet whose skip connections and middle get a ControlNet's residuals, as diffusers' ControlNet pipelines add them."""

    def __init__(self, denoiser: UNetDenoiser, controlnet: Any, condition: Tensor, scale: float) -> None:
        """`condition` (B, 3, H, W) in 0..1 is of the B pictures that are sampled; the residuals are multiplied by `scale`."""
        super().__init__(denoiser.unet, denoiser.schedule, denoiser.prediction)
        self.controlnet, self.condition, self.scale = controlnet, condition, scale

    def __call__(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """As of a UNet; of a multiple of B samples, such as the two halves of guidance, each B have the same condition."""
        dtype = next(self.controlnet.parameters()).dtype
        down, middle = self.controlnet(
            x_t.to(dtype),
            timesteps,
            encoder_hidden_states=conditioning.prompt_embeds.to(dtype),
            controlnet_cond=self.condition.to(dtype).repeat(len(x_t) // len(self.condition), 1, 1, 1),
            conditioning_scale=self.scale,
            added_cond_kwargs=added_conditions(self.controlnet, conditioning, dtype),
            return_dict=False,
        )
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return unet_output(self.unet, x_t, timesteps, conditioning, **residuals)


def edges(pictures: Tensor) -> Tensor:
    """Edges (B, 3, H, W) of pictures (B, 3, H, W) in 0..1: the length of the luma's Sobel gradient, in each picture as a share of its largest, in
    three equal channels; zeros where there is none."""
    luma = (pictures * pictures.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    sobel = pictures.new_tensor(_SOBEL)
    kernels = torch.stack([sobel, sobel.T]).unsqueeze(1)
    padded = torch.nn.functional.pad(luma, (1, 1, 1, 1), mode="replicate")
    length = torch.nn.functional.conv2d(padded, kernels).square().sum(1, keepdim=True).sqrt()
    largest = length.amax((1, 2, 3), keepdim=True)
    return torch.where(largest > 0, length / largest.clamp(min=torch.finfo(length.dtype).tiny), 0.0).expand(-1, 3, -1, -1)
