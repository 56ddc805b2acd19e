"""Training of the UNet and both text encoders by the denoising loss (DDPM, arXiv 2006.11239; SDXL's conditioning, arXiv 2307.01952)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from schemas.teacher import TrainTeacherConfig
from stages.denoising import min_snr_weight, stratified_timesteps
from stages.diffusion.prediction import prediction_type
from stages.diffusion.schedule import NoiseSchedule
from stages.train_teacher.networks import BETAS
from stages.training.method import Method, Player
from stages.training.randomness import Draw


@dataclass(frozen=True)
class CaptionedLatents:
    """Scaled latents (B, C, h, w), token ids (B, L) for each encoder, and time ids (B, 6)."""

    latents: Tensor
    tokens: tuple[Tensor, Tensor]
    time_ids: Tensor


@dataclass(frozen=True)
class Noised:
    """A prepared micro-batch."""

    x_t: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor
    """(B,): the loss weight of each sample."""
    keep: Tensor
    """(B,): 0 where the caption is dropped, else 1."""
    tokens: tuple[Tensor, Tensor]
    time_ids: Tensor


class DenoiserMethod(Method[CaptionedLatents, Noised]):
    """One player: UNet and text encoders together."""

    def __init__(self, unet: Any, text_encoders: tuple[Any, Any], config: TrainTeacherConfig, device: torch.device) -> None:
        self.unet = unet.to(device, memory_format=torch.channels_last).train()
        self.text_encoders = [encoder.to(device).train() for encoder in text_encoders]
        self.config = config
        self.schedule = NoiseSchedule.from_scheduler_config(BETAS)
        self.prediction = prediction_type(config.prediction_type)
        named = {f"{name}.{key}": value for name, network in self._networks().items() for key, value in network.named_parameters()}
        self.players = {"denoiser": Player.of(named, config.optimizer, config.training)}

    def _networks(self) -> dict[str, Any]:
        return {"unet": self.unet, "text_encoder": self.text_encoders[0], "text_encoder_2": self.text_encoders[1]}

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """All three networks."""
        return {name: network.state_dict() for name, network in self._networks().items()}

    def prepare(self, batch: CaptionedLatents, draw: Draw) -> Noised:
        """Noise each sample to a timestep of its own."""
        latents = batch.latents.to(draw.device)
        eps = draw.normal("eps", latents.shape[1:])
        timesteps = stratified_timesteps(draw, self.config.training.batch_size, self.schedule.num_train_timesteps)
        alpha, sigma = self.schedule.alpha_sigma(timesteps)
        return Noised(
            x_t=self.schedule.add_noise(latents, eps, timesteps).contiguous(memory_format=torch.channels_last),
            timesteps=timesteps,
            target=self.prediction.from_x0_eps(latents, eps, alpha, sigma),
            weight=min_snr_weight(alpha.flatten() ** 2 / sigma.flatten() ** 2, self.config.snr_gamma, self.config.prediction_type),
            keep=(draw.uniform("caption") >= self.config.caption_dropout).float(),
            tokens=(batch.tokens[0].to(draw.device), batch.tokens[1].to(draw.device)),
            time_ids=self._varied_sizes(batch.time_ids.to(draw.device), draw),
        )

    def _varied_sizes(self, time_ids: Tensor, draw: Draw) -> Tensor:
        """Replace the original size of some samples by a square one, uniform in its logarithm, and their crop by none."""
        side = (self.config.resolution_px * torch.exp2(5 * draw.uniform("size"))).round()
        nothing, target = torch.zeros_like(side), torch.full_like(side, self.config.resolution_px)
        varied = torch.stack([side, side, nothing, nothing, target, target], dim=1)
        return torch.where((draw.uniform("vary") < self.config.random_size_fraction)[:, None], varied, time_ids)

    def loss(self, player: str, prepared: Noised, draw: Draw) -> Mapping[str, Tensor]:  # noqa: ARG002
        """Weighted squared error of the prediction. A dropped caption is zeros, as SDXL's pipeline gives for no prompt."""
        hidden, pooled = encode_tokens(self.text_encoders, prepared.tokens)
        output = self.unet(
            prepared.x_t,
            prepared.timesteps,
            encoder_hidden_states=hidden * prepared.keep[:, None, None],
            added_cond_kwargs={"text_embeds": pooled * prepared.keep[:, None], "time_ids": prepared.time_ids},
            return_dict=False,
        )[0]
        error = (output.float() - prepared.target).square().mean((1, 2, 3))
        return {"loss": (prepared.weight * error).mean(), "mse": error.mean()}


def encode_tokens(text_encoders: Sequence[Any], tokens: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Hidden states (B, L, F1 + F2) and pooled (B, P), as StableDiffusionXLPipeline.encode_prompt does: penultimate states side by side."""
    first = text_encoders[0](tokens[0], output_hidden_states=True)
    second = text_encoders[1](tokens[1], output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds
