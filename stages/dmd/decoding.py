"""The distance of DMD's regression on decoded pictures, with a gradient: through the teacher's VAE or a tiny decoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from infra.outside import local_copy
from schemas.dmd import DmdConfig
from schemas.errors import BadInput
from schemas.manifest import Manifest, Teacher
from stages.diffusion.pipeline import TeacherPipeline
from stages.perceptual import build
from stages.workspace import Workspace

OUTSIDE_VGG, OUTSIDE_DECODER = "regression.vgg", "regression.decoder"
"""Names of what lies outside the store, as in the recipe."""

Decode = Callable[[Tensor], Tensor]
"""From scaled latents (B, C, h, w) to pictures (B, 3, H, W), about -1..1."""


class DecodedDistance(nn.Module):
    """Mean perceptual distance of the pictures that latents are decoded to (DMD eq. 9)."""

    def __init__(self, decode: Decode, distance: nn.Module) -> None:
        super().__init__()
        self.decode, self.distance = decode, distance

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        """A scalar for scaled latents (B, C, h, w), with a gradient for x alone."""
        with torch.no_grad():
            expected = self.decode(reference)
        distances: Tensor = self.distance(self.decode(x), expected)
        return distances.mean()


def open_distance(config: DmdConfig, teacher: Manifest[Teacher], workspace: Workspace) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Load what the recipe compares outputs with; None where it does not. Raises `BadInput` for weights that cannot be had or do not fit."""
    if config.regression is None:
        return None
    if config.regression.distance == "l2":
        return mse_loss
    weights = local_copy(workspace.outside[OUTSIDE_VGG], workspace.scratch) if OUTSIDE_VGG in workspace.outside else None
    distance = build(config.regression, weights).to(workspace.device)
    pipeline = TeacherPipeline.load(
        workspace.fetch(teacher), workspace.device, only=frozenset() if OUTSIDE_DECODER in workspace.outside else frozenset({"vae"})
    )
    network: Any = pipeline.vae
    if OUTSIDE_DECODER in workspace.outside:
        network = tiny_decoder(local_copy(workspace.outside[OUTSIDE_DECODER], workspace.scratch), pipeline.latent_shape[0])
    return DecodedDistance(decoder(network.to(workspace.device), gradient_checkpointing=config.gradient_checkpointing), distance)


def decoder(network: Any, *, gradient_checkpointing: bool = False) -> Decode:
    """What an AutoencoderKL or an AutoencoderTiny makes of scaled latents. Freezes it; `gradient_checkpointing` has its activations computed again in
    the backward pass."""
    network.requires_grad_(False)
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return lambda latents: network.decode(latents / network.config.scaling_factor, return_dict=False)[0]


def tiny_decoder(folder: Path, channels: int) -> Any:
    """The AutoencoderTiny in a folder. Raises `BadInput` where there is none, or one for latents of other than so many channels."""
    kind: Any = diffusers.AutoencoderTiny
    try:
        tiny = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except (OSError, RuntimeError, ValueError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"dmd.regression.decoder {folder}: cannot be loaded ({first_line}); expected an AutoencoderTiny") from error
    if (found := tiny.config.latent_channels) != channels:
        raise BadInput(f"dmd.regression.decoder {folder}: decodes latents of {found} channels; expected the teacher's {channels}")
    return tiny.eval()
