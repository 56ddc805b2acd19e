"""Random diffusers pipelines small enough for every test: SD1.5-type, SD2.x-type with v-prediction, SDXL-type. Seconds to use, kilobytes to save.

`ssd-1b` is SDXL's with a UNet pruned as segmind's SSD-1B is: no attention in the middle, and by layer as many transformer blocks as are left.
"""

from pathlib import Path
from typing import Any, Literal

import torch

from infra.torchvision_ops import define_missing_ops

define_missing_ops()

from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: E402

Kind = Literal["sd15", "sd2-v", "sdxl", "ssd-1b"]
KINDS: tuple[Kind, ...] = ("sd15", "sd2-v", "sdxl")

LATENT_SIZE = 8
MAX_TOKENS = 12
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, in CLIP's order ("!" first)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(code) for code in kept]
    return symbols + [chr(256 + i) for i in range(256 - len(symbols))]


def tokenizer(pad_token: str = "<|endoftext|>", max_tokens: int = MAX_TOKENS) -> CLIPTokenizer:
    """A CLIP tokenizer over bytes with a few merges: 512 symbols, 5 merges, start and end."""
    symbols = byte_symbols()
    merges = ["t h", "th e</w>", "r e", "re d</w>", "c a"]
    words = symbols + [f"{symbol}</w>" for symbol in symbols] + [merge.replace(" ", "") for merge in merges]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(merge.split()) for merge in merges], pad_token=pad_token, model_max_length=max_tokens)


def _text_config(words: CLIPTokenizer, hidden: int, projection: int, activation: str = "quick_gelu") -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=projection,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        hidden_act=activation,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def _vae(scaling_factor: float, force_upcast: bool) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=2 * LATENT_SIZE,
        scaling_factor=scaling_factor,
        force_upcast=force_upcast,
    )


def _unet(cross_attention_dim: int, **more: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": LATENT_SIZE,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": cross_attention_dim,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(settings | more))


def build(kind: Kind, seed: int = 0) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Return a random pipeline of the kind; equal seeds give equal weights. The global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = _sdxl(_PRUNED if kind == "ssd-1b" else {}) if kind in ("sdxl", "ssd-1b") else _sd(v_prediction=kind == "sd2-v")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _sd(v_prediction: bool) -> StableDiffusionPipeline:
    words = tokenizer("!" if v_prediction else "<|endoftext|>")
    more = {"use_linear_projection": True, "attention_head_dim": (2, 4)} if v_prediction else {}
    scheduler: Any = (
        DDIMScheduler(**_BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        if v_prediction
        else PNDMScheduler(**_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    )
    return StableDiffusionPipeline(
        vae=_vae(0.18215, force_upcast=False),
        text_encoder=CLIPTextModel(_text_config(words, 16, 16)).eval(),
        tokenizer=words,
        unet=_unet(16, **more).eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


_PRUNED: dict[str, Any] = {
    "transformer_layers_per_block": [1, [2]],
    "reverse_transformer_layers_per_block": [[1, 3], 1],
    "mid_block_type": "UNetMidBlock2D",
}


def _sdxl(more: dict[str, Any]) -> StableDiffusionXLPipeline:
    first, second = tokenizer(), tokenizer("!")
    return StableDiffusionXLPipeline(
        vae=_vae(0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(_text_config(first, 16, 16)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(second, 24, 20, "gelu")).eval(),
        tokenizer=first,
        tokenizer_2=second,
        unet=_unet(
            16 + 24,
            **{"attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 2), "use_linear_projection": True} | more,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=20 + 6 * 4,
        ).eval(),
        scheduler=EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def save(kind: Kind, folder: Path, seed: int = 0) -> Path:
    """Write a random pipeline of the kind in diffusers layout (safetensors) and return its folder."""
    build(kind, seed).save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_clip(folder: Path) -> Path:
    """A random CLIP model with its processor in transformers' layout, saved in `folder`: pictures of 32 px, the tokenizer above."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPVisionConfig

    words = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, projection_dim=12, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    text = _text_config(words, 16, 12)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12))
    model.save_pretrained(folder, safe_serialization=True)
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), words)
    processor.save_pretrained(folder)
    return folder
