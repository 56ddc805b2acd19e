"""Training of the VAE: reconstruct pictures through a narrow, nearly normal latent space (latent diffusion, arXiv 2112.10752, 3.1)."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from schemas.teacher import AutoencoderConfig
from stages.training.method import Method, Player
from stages.training.randomness import Draw


class AutoencoderMethod(Method[Tensor, tuple[Tensor, Tensor]]):
    """One player, the VAE. A batch is pictures (B, 3, H, W) uint8; prepared are crops in -1..1 and the noise of their latents."""

    def __init__(self, vae: Any, config: AutoencoderConfig, device: torch.device) -> None:
        self.vae = vae.to(device, memory_format=torch.channels_last).train()
        self.config = config
        self.downscale = 2 ** (len(config.block_out_channels) - 1)
        self.players = {"autoencoder": Player.of(dict(vae.named_parameters()), config.optimizer, config.training)}

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The VAE."""
        return {"vae": self.vae.state_dict()}

    def prepare(self, batch: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Cut crops at places that are multiples of the VAE's factor, and draw the latents' noise."""
        pixels = batch.to(draw.device).float() / 127.5 - 1
        side = self.config.crop_px
        if side is not None and side < pixels.shape[-1]:
            places = (pixels.shape[-1] - side) // self.downscale + 1
            tops, lefts = (draw.integers(name, places).tolist() for name in ("top", "left"))
            pixels = torch.stack(
                [
                    picture[:, top * self.downscale :, left * self.downscale :][:, :side, :side]
                    for picture, top, left in zip(pixels, tops, lefts, strict=True)
                ]
            )
        latent_side = pixels.shape[-1] // self.downscale
        noise = draw.normal("latents", (self.config.latent_channels, latent_side, latent_side))
        return pixels.contiguous(memory_format=torch.channels_last), noise

    def loss(self, player: str, prepared: tuple[Tensor, Tensor], draw: Draw) -> Mapping[str, Tensor]:  # noqa: ARG002
        """L1 + L2 + edge_weight * L1 of the finite differences + kl_weight * KL(posterior | standard normal), means over all entries."""
        pixels, noise = prepared
        posterior = self.vae.encode(pixels).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        restored = self.vae.decode(mean + (0.5 * log_variance).exp() * noise).sample.float()
        absolute, square = F.l1_loss(restored, pixels), F.mse_loss(restored, pixels)
        edges = sum(
            (F.l1_loss(torch.diff(restored, dim=axis), torch.diff(pixels, dim=axis)) for axis in (-1, -2)), start=torch.zeros_like(absolute)
        )
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = absolute + square + self.config.edge_weight * edges + self.config.kl_weight * divergence
        return {"loss": loss, "l1": absolute, "mse": square, "edges": edges, "kl": divergence, "latents_std": mean.std()}


@torch.no_grad()
def encode_all(vae: Any, pictures: Tensor, batch: int = 64) -> Tensor:
    """Posterior means (N, C, h, w) of pictures (N, 3, H, W) uint8, not yet scaled."""
    vae.eval()
    return torch.cat([vae.encode(part.to(vae.device).float() / 127.5 - 1).latent_dist.mean.cpu() for part in torch.split(pictures, batch)])


@torch.no_grad()
def standardise(vae: Any, latents: Tensor) -> Tensor:
    """Give the VAE latents of mean 0 and one spread in every channel, and set its scaling factor; returns the scaled latents.

    The channels' own means and spreads are folded into the 1 x 1 convolutions beside the latents, so that decoding is unchanged and one
    scaling factor, all that the diffusers layout has, is enough.
    """
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    overall = spread.square().mean().sqrt()
    channels = len(mean)
    factor = (overall / spread).to(vae.device)
    centre = mean.to(vae.device)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:channels] *= factor[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - centre) * factor
    before.bias[channels:] += 2 * factor.log()
    after.bias += after.weight[:, :, 0, 0] @ centre
    after.weight /= factor[None, :, None, None]
    vae.register_to_config(scaling_factor=float(1 / overall))
    return (latents - mean[:, None, None]) / spread[:, None, None]
