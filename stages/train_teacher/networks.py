"""The untrained networks of a small SDXL-type pipeline, from a configuration and a seed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from schemas.teacher import AutoencoderConfig, TextEncoderConfig, TrainTeacherConfig, UNetConfig

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
"""SDXL's and SD1.5's noise schedule."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw the networks' initial weights from `seed`, and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build_autoencoder(config: AutoencoderConfig, resolution_px: int) -> Any:
    """AutoencoderKL with latents of side resolution / 2^(levels - 1)."""
    levels = len(config.block_out_channels)
    kind: Any = AutoencoderKL
    vae = kind(
        in_channels=3,
        out_channels=3,
        latent_channels=config.latent_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=False,
        sample_size=resolution_px,
        force_upcast=False,
    )
    with torch.no_grad():
        _let_pictures_through(vae)
        # Begin with little sampling noise: at its default it drowns a picture that has barely been learnt.
        vae.quant_conv.bias[config.latent_channels :] = -5.0
    return vae


def _let_pictures_through(vae: Any) -> None:
    """Give convolutions variance-preserving weights and residual branches a tenth of theirs (in the spirit of Fixup, arXiv 1901.09321).

    The skip path then carries the picture from the first step on. With torch's default initialisation a small VAE learns nothing but the mean
    colour for hundreds of steps.
    """
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight *= 0.1
    for half in (vae.encoder, vae.decoder):
        torch.nn.init.normal_(half.conv_in.bias, std=0.3)  # plain areas would be all zeros before the first normalisation


def build_text_encoders(config: TrainTeacherConfig, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> tuple[Any, Any]:
    """SDXL's pair: the second one has the projection that gives the pooled embedding."""
    first, second = (
        _text_config(encoder, tokenizer, config.max_tokens) for encoder, tokenizer in zip(config.text_encoders, tokenizers, strict=True)
    )
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def _text_config(config: TextEncoderConfig, tokenizer: CLIPTokenizer, max_tokens: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=2 * config.hidden_size,
        projection_dim=config.projection_dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=max_tokens,
        initializer_factor=config.initializer_factor,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_unet(config: UNetConfig, *, latent_channels: int, latent_side: int, text: tuple[TextEncoderConfig, TextEncoderConfig]) -> Any:
    """UNet2DConditionModel that takes both encoders' hidden states side by side, the second's pooled embedding, and six time ids."""
    down = tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention_levels)
    up = tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention_levels))
    kind: Any = UNet2DConditionModel
    return kind(
        sample_size=latent_side,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=down,
        up_block_types=up,
        transformer_layers_per_block=config.transformer_layers,
        attention_head_dim=config.attention_heads,
        cross_attention_dim=text[0].hidden_size + text[1].hidden_size,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=config.addition_time_embed_dim,
        projection_class_embeddings_input_dim=text[1].projection_dim + 6 * config.addition_time_embed_dim,
        norm_num_groups=config.norm_num_groups,
    )


def assemble_pipeline(
    vae: Any, text_encoders: tuple[Any, Any], tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], unet: Any, prediction_type: str
) -> Any:
    """The pipeline that diffusers saves and loads; zeros stand for no prompt, as in SDXL base."""
    kind: Any = StableDiffusionXLPipeline
    scheduler: Any = EulerDiscreteScheduler
    return kind(
        vae=vae,
        text_encoder=text_encoders[0],
        text_encoder_2=text_encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=scheduler(**BETAS, prediction_type=prediction_type, timestep_spacing="trailing"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
