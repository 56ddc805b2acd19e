"""Recipe sections that say where the teacher comes from: `teacher` loads one, `train_teacher` makes a small one."""

from collections.abc import Iterator
from typing import Annotated, Literal

from schemas.base import Field, Mistake, Model, NotIdentity
from schemas.training import OptimizerConfig, PositiveInt, TrainingConfig


class TeacherConfig(Model):
    """`teacher`: any diffusers text-to-image pipeline with a UNet (SD1.5, SD2.x, SDXL)."""

    source: Annotated[str, NotIdentity]
    """Folder in diffusers layout, hub id, or address of one on object storage. Identity has the weights' digest, not the place."""
    revision: Annotated[str | None, NotIdentity] = None
    """Revision on the hub. null: the newest."""
    variant: Annotated[str | None, NotIdentity] = None
    """File variant on the hub, such as `fp16`."""


class AutoencoderConfig(Model):
    """The VAE to train: diffusers' AutoencoderKL."""

    block_out_channels: tuple[PositiveInt, ...]
    """Channels by level; n levels shrink a picture by 2^(n-1)."""
    layers_per_block: PositiveInt = 1
    latent_channels: PositiveInt = 4
    norm_num_groups: PositiveInt = 8
    kl_weight: Annotated[float, Field(ge=0)] = 1e-6
    edge_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the L1 distance between image gradients, which keeps outlines sharp."""
    training: TrainingConfig
    optimizer: OptimizerConfig


class TextEncoderConfig(Model):
    """One CLIP text encoder to train together with the UNet."""

    hidden_size: PositiveInt
    layers: PositiveInt = 2
    heads: PositiveInt = 2


class UNetConfig(Model):
    """The denoiser: diffusers' UNet2DConditionModel with SDXL's text_time conditioning."""

    block_out_channels: tuple[PositiveInt, ...]
    layers_per_block: PositiveInt = 1
    attention_levels: tuple[bool, ...]
    """For each level whether it has transformer blocks."""
    transformer_layers: PositiveInt = 1
    attention_head_dim: PositiveInt = 32
    norm_num_groups: PositiveInt = 16
    addition_time_embed_dim: PositiveInt = 16


class TrainTeacherConfig(Model):
    """`train-teacher`: a small SDXL-type pipeline from scratch (VAE, two text encoders, UNet)."""

    resolution_px: PositiveInt = 64
    max_tokens: Annotated[int, Field(ge=4, le=77)] = 16
    """Length of a tokenised caption, with its start and end."""
    autoencoder: AutoencoderConfig
    text_encoders: tuple[TextEncoderConfig, TextEncoderConfig]
    unet: UNetConfig
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of samples trained with the unconditional embedding, for classifier-free guidance (arXiv 2207.12598)."""
    snr_gamma: Annotated[float, Field(gt=0)] | None = 5.0
    """Min-SNR loss weighting (arXiv 2303.09556). null: unweighted."""
    training: TrainingConfig
    optimizer: OptimizerConfig
    storage_dtype: Literal["float32", "float16"] = "float16"
    """Type of the weights in the published files."""


def _levels_agree(config: TrainTeacherConfig) -> Iterator[Mistake]:
    levels = len(config.unet.block_out_channels)
    if len(config.unet.attention_levels) != levels:
        yield (
            ("unet", "attention_levels"),
            list(config.unet.attention_levels),
            f"expected {levels}, one for each of unet.block_out_channels",
        )


TrainTeacherConfig.cross_checks = (_levels_agree,)
