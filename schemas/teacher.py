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
    variant: str | None = None
    """File variant, such as `fp16`. Part of the identity: one folder may hold several."""

    @property
    def address(self) -> str:
        """Where the teacher is: the source, with the hub's revision as in `organisation/name@revision`."""
        return self.source if self.revision is None else f"{self.source}@{self.revision}"


class AutoencoderConfig(Model):
    """The VAE to train: diffusers' AutoencoderKL, without attention."""

    block_out_channels: tuple[PositiveInt, ...]
    """Channels by level; n levels shrink a picture by 2^(n-1)."""
    layers_per_block: PositiveInt = 1
    latent_channels: PositiveInt = 4
    norm_num_groups: PositiveInt = 8
    crop_px: PositiveInt | None = None
    """Side of the random crops it is trained on. null: whole pictures. A network of convolutions learns as much from a crop, for less."""
    kl_weight: Annotated[float, Field(ge=0)] = 1e-4
    """Weight of the divergence from a standard normal, a mean over latents (latent diffusion, arXiv 2112.10752)."""
    edge_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the L1 distance between the pictures' finite differences, which keeps outlines sharp."""
    training: TrainingConfig
    optimizer: OptimizerConfig


class TextEncoderConfig(Model):
    """One CLIP text encoder, trained together with the UNet."""

    hidden_size: PositiveInt
    projection_dim: PositiveInt
    layers: PositiveInt = 2
    heads: PositiveInt = 2
    initializer_factor: Annotated[float, Field(gt=0)] = 1.0
    """Scale of CLIP's initial weights; a small encoder without pretraining needs larger ones."""


class UNetConfig(Model):
    """The denoiser: diffusers' UNet2DConditionModel with SDXL's text_time conditioning."""

    block_out_channels: tuple[PositiveInt, ...]
    layers_per_block: PositiveInt = 1
    attention_levels: tuple[bool, ...]
    """For each level whether it has transformer blocks."""
    transformer_layers: PositiveInt = 1
    attention_heads: tuple[PositiveInt, ...]
    """For each level the number of attention heads (diffusers calls it attention_head_dim)."""
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
    vocabulary_size: Annotated[int, Field(ge=514)] = 1024
    """Entries of the tokenizers' vocabulary: bytes, merges learnt from the captions, start and end."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of samples trained with the unconditional embedding, for classifier-free guidance (arXiv 2207.12598)."""
    random_size_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of samples trained with an original size drawn between `resolution_px` and 32 times that, so that a teacher of small pictures
    accepts the time ids of any."""
    snr_gamma: Annotated[float, Field(gt=0)] | None = 5.0
    """Min-SNR loss weighting (arXiv 2303.09556). null: unweighted."""
    training: TrainingConfig
    optimizer: OptimizerConfig
    storage_dtype: Literal["float32", "float16"] = "float16"
    """Type of the weights in the published files."""


def _levels_agree(config: TrainTeacherConfig) -> Iterator[Mistake]:
    levels = len(config.unet.block_out_channels)
    for name in ("attention_levels", "attention_heads"):
        found = list(getattr(config.unet, name))
        if len(found) != levels:
            yield ("unet", name), found, f"expected {levels}, one for each of unet.block_out_channels"


TrainTeacherConfig.cross_checks = (_levels_agree,)
