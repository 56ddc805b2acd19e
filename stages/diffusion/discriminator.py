"""The discriminator of SDXL-Lightning (arXiv 2402.13929, 3.3): a denoiser's encoder and mid block over one or two noise levels, and a small head."""

import copy
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import added_conditions

Features = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""d(x, t, c): features (B, C, h, w) of x (B, ...) at timesteps (B,) long."""

HEAD_GROUPS = 32
_GROUP_CHANNELS = 8
FINAL_SIDE = 4
"""Side of the feature map that the head's last convolution sees whole, as DMD2's head for SDXL does (arXiv 2405.14867)."""


class UNetEncoder(nn.Module):
    """d: a UNet2DConditionModel up to and with its mid block, its weights a copy of the given UNet's."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        halved = copy.copy(unet)  # the decoder is left out before anything is copied: half the memory of a UNet
        halved._modules = {name: module for name, module in unet._modules.items() if name not in _DECODER}
        self.unet = copy.deepcopy(halved)
        self.unet.requires_grad_(True)
        self.channels = int(unet.config.block_out_channels[-1])
        """C of the features."""
        self.downscale = 2 ** (len(unet.config.block_out_channels) - 1)
        """Latent pixels by one pixel of the features."""

    def forward(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Mid-block features (B, C, h, w) of x (B, C', H, W) at timesteps (B,) long; those of the clean state are taken at timestep 0."""
        return encoder_features(self.unet, x, timesteps, conditioning)


def encoder_features(unet: Any, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Mid-block features (B, C, h, w) of a UNet, with or without its decoder; of one without a mid block those of its last down block.

    Arguments as of `UNetEncoder.forward`.
    """
    dtype = unet.conv_in.weight.dtype
    x = x.to(dtype)
    text = conditioning.prompt_embeds.to(dtype)
    added = added_conditions(unet, conditioning, dtype)
    emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=timesteps.clamp(min=0)), None)
    if (more := unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added or {})) is not None:
        emb = emb + more
    text = unet.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added or {})
    hidden = unet.conv_in(x)
    for block in (*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block])):  # a pruned UNet may have no middle
        arguments = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        output = block(hidden, emb, **arguments)
        hidden = output[0] if isinstance(output, tuple) else output  # a down block also gives what its skip connections carry
    features: Tensor = hidden
    return features


_DECODER = ("up_blocks", "conv_norm_out", "conv_act", "conv_out")


class DiscriminatorHead(nn.Sequential):
    """Convolutions that halve a feature map until one looks at all that is left, and a projection to one number.

    Blocks of [convolution 4 x 4 of stride 2, GroupNorm 32, SiLU] (SDXL-Lightning 3.3). How many is not published: here as many as bring the map to
    4 pixels on its shorter side, which for the 32 x 32 map of SDXL gives the head of DMD2 (arXiv 2405.14867): 32 -> 16 -> 8 -> 4 -> 1.
    """

    def __init__(self, in_channels: int, height: int, width: int, hidden_channels: int | None = None) -> None:
        """`height`, `width` of the features (pixels); `hidden_channels` as wide as the UNet's mid block where not given."""
        channels = hidden_channels or in_channels
        layers: list[nn.Module] = []
        while min(height, width) >= 2 * FINAL_SIDE:
            layers += _block(in_channels, channels, 4, stride=2, padding=1)
            in_channels, height, width = channels, height // 2, width // 2
        layers += _block(in_channels, channels, (min(height, FINAL_SIDE), min(width, FINAL_SIDE)), stride=FINAL_SIDE, padding=0)
        super().__init__(*layers, nn.Conv2d(channels, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(0))


def _block(in_channels: int, channels: int, kernel: int | tuple[int, int], *, stride: int, padding: int) -> list[nn.Module]:
    # Fewer groups for narrow networks: on the last map, of one pixel, a group of one channel would be normalised to nothing.
    groups = next((count for count in (HEAD_GROUPS, 16, 8, 4, 2) if channels % count == 0 and channels // count >= _GROUP_CHANNELS), 1)
    return [nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=padding), nn.GroupNorm(groups, channels), nn.SiLU()]


E = TypeVar("E", bound=Features)


class Discriminator(nn.Module, Generic[E]):
    """Logits of being the teacher's.

    Conditional (eq. 22): head(concat(d(x_s, s, c), d(x_t, t, c))); unconditional (eq. 23): head(d(x_s, s, c)), the text still given. The sigmoid is
    left to the loss.
    """

    def __init__(self, encoder: E, head: nn.Module, *, conditional: bool) -> None:
        super().__init__()
        self.encoder: E = encoder
        self.head = head
        self.conditional = conditional

    def forward(self, x_s: Tensor, s: Tensor, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Logits (k B,) of x_s at s (k B, ...), the batch k times over, such as real and fake, given x_t at t (B, ...); timesteps long.

        x_t, the same for all k, is looked at once.
        """
        times = len(x_s) // len(x_t)
        repeated = Conditioning.cat([conditioning] * times)
        if not self.conditional:
            return self._score(self.encoder(x_s, s, repeated))
        if x_s.requires_grad:  # the student's turn: apart, because nothing flows back through what is said of x_t
            of_x_s, of_x_t = self.encoder(x_s, s, repeated), self.encoder(x_t, t, conditioning)
        else:
            both = self.encoder(torch.cat([x_s, x_t]), torch.cat([s, t]), Conditioning.cat([repeated, conditioning]))
            of_x_s, of_x_t = both[: len(x_s)], both[len(x_s) :]
        return self._score(torch.cat([of_x_s, of_x_t.repeat(times, *(1,) * (of_x_t.ndim - 1))], dim=1))

    def _score(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(features)
        return logits.float()


def unet_discriminator(unet: Any, latent_shape: tuple[int, int, int], *, conditional: bool, seed: int) -> Discriminator[UNetEncoder]:
    """Make a discriminator that starts as the denoiser sees: the UNet's weights copied, the head random as a function of `seed` alone."""
    encoder = UNetEncoder(unet)
    return Discriminator(encoder, unet_head(unet, latent_shape, looks=2 if conditional else 1, seed=seed), conditional=conditional)


def unet_head(unet: Any, latent_shape: tuple[int, int, int], *, looks: int = 1, seed: int) -> DiscriminatorHead:
    """A head for a UNet's mid-block features of latents of this shape, several `looks` side by side. Random as a function of `seed` alone."""
    channels = int(unet.config.block_out_channels[-1])
    downscale = 2 ** (len(unet.config.block_out_channels) - 1)
    height, width = (-(-side // downscale) for side in latent_shape[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = DiscriminatorHead(channels * looks, height, width, channels)
    return head.to(next(unet.parameters()).device)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-log p - log(1 - p^), the mean over samples, of logits (B,) (SDXL-Lightning eq. 18; DMD2, arXiv 2405.14867, 4.3)."""
    return (softplus(-real_logits) + softplus(fake_logits)).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """-log p^, the mean over samples, of logits (B,) (SDXL-Lightning eq. 19; DMD2 4.3)."""
    return softplus(-fake_logits).mean()
