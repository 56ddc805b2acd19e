"""The stage: pictures and captions to a complete pipeline. First the VAE, then, on its latents, the UNet with both text encoders."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from schemas.base import Model
from schemas.errors import BadInput
from schemas.manifest import ImageShards, Manifest, Selection, Teacher
from schemas.teacher import TrainTeacherConfig
from stages.diffusion.pipeline import inspect
from stages.encode.crop import centre_crop, crop_pixels
from stages.pictures import decode_rgb
from stages.selected import SelectedPictures
from stages.shards import Sample
from stages.teacher import weights_digest
from stages.train_teacher.autoencoder import AutoencoderMethod, encode_all, standardise
from stages.train_teacher.denoiser import CaptionedLatents, DenoiserMethod
from stages.train_teacher.networks import assemble_pipeline, build_autoencoder, build_text_encoders, build_unet, seeded
from stages.train_teacher.vocabulary import build_tokenizers
from stages.training import train
from stages.training.metrics import write_metrics
from stages.training.randomness import derive_seed
from stages.workspace import Workspace


class Inputs(Model):
    """Reads the selected pictures."""

    images: Manifest[ImageShards]
    selection: Manifest[Selection]


def run(config: TrainTeacherConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Teacher]:
    """Train and publish a teacher. All pictures are held in memory (12 KB each at 64 px), so this is for small ones.

    Raises `BadInput` when a picture is smaller than `resolution_px`, before training.
    """
    device = torch.device(workspace.device)
    pictures, captions, time_ids = load_pictures(SelectedPictures.open(inputs.images, inputs.selection, workspace), config.resolution_px)
    tokenizers = build_tokenizers(captions, config.vocabulary_size, config.max_tokens)

    with seeded(derive_seed(workspace.seed, "autoencoder")):
        vae = build_autoencoder(config.autoencoder, config.resolution_px)
    seed = workspace.seed if config.autoencoder.training.seed is None else config.autoencoder.training.seed
    autoencoder = AutoencoderMethod(vae, config.autoencoder, device)
    autoencoder_rows = train(
        autoencoder,
        lambda indices: pictures[list(indices)],
        len(pictures),
        config.autoencoder.training,
        workspace,
        seed=seed,
        name="autoencoder",
    )
    latents = standardise(vae, encode_all(vae, pictures))

    with seeded(derive_seed(workspace.seed, "denoiser")):
        text_encoders = build_text_encoders(config, tokenizers)
        unet = build_unet(
            config.unet, latent_channels=config.autoencoder.latent_channels, latent_side=latents.shape[-1], text=config.text_encoders
        )
    tokens = [
        tokenizer(captions, padding="max_length", truncation=True, max_length=config.max_tokens, return_tensors="pt").input_ids
        for tokenizer in tokenizers
    ]

    def read(indices: Sequence[int]) -> CaptionedLatents:
        chosen = list(indices)
        return CaptionedLatents(latents[chosen], (tokens[0][chosen], tokens[1][chosen]), time_ids[chosen])

    seed = workspace.seed if config.training.seed is None else config.training.seed
    method = DenoiserMethod(unet, text_encoders, config, device)
    denoiser_rows = train(method, read, len(latents), config.training, workspace, seed=seed, name="denoiser")

    with workspace.folder("pipeline") as folder:
        pipeline = assemble_pipeline(vae, text_encoders, tokenizers, unet, config.prediction_type)
        pipeline.to("cpu", dtype=getattr(torch, config.storage_dtype)).save_pretrained(folder, safe_serialization=True)
        for name in ("text_encoder", "text_encoder_2"):
            load_as_float32(folder / name / "config.json")
        facts = inspect(folder)
        content = Teacher(
            architecture=facts.architecture,
            prediction_type=config.prediction_type,
            resolution=facts.resolution,
            weights_digest=weights_digest(folder),
            parameters=dict(facts.parameters),
        )
        write_metrics(autoencoder_rows, folder / "metrics-autoencoder.parquet")
        write_metrics(denoiser_rows, folder / "metrics-denoiser.parquet")
        return workspace.publish(folder, content)


def load_as_float32(path: Path) -> None:
    """Let a text encoder stored in half precision load in float32 where no type is named, as diffusers loads its own networks."""
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def load_pictures(samples: Iterable[Sample], side: int) -> tuple[Tensor, list[str], Tensor]:
    """Read a selection: pictures (N, 3, side, side) uint8, captions, and time ids (N, 6) as SDXL is conditioned on.

    Raises `BadInput` naming a picture that would have to be enlarged, or when there are none.
    """
    pictures: list[Tensor] = []
    captions: list[str] = []
    time_ids: list[list[float]] = []
    for sample in samples:
        picture, _ = decode_rgb(sample.image)
        if min(picture.size) < side:
            raise BadInput(
                f"train_teacher.resolution_px = {side}: picture {sample.key} is {picture.width} x {picture.height}; expected no smaller"
            )
        crop = centre_crop(picture.width, picture.height, side)
        pictures.append(((crop_pixels(picture, crop) + 1) * 127.5).round().to(torch.uint8))
        captions.append(sample.caption)
        time_ids.append([*crop.original_hw, crop.top, crop.left, side, side])
    if not pictures:
        raise BadInput("train_teacher: the selection holds no picture; expected some to learn from")
    return torch.stack(pictures), captions, torch.tensor(time_ids, dtype=torch.float32)
