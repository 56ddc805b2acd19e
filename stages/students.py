"""Students as files: a UNet or a LoRA in diffusers' layout. Whatever reads or writes a student goes through here."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from schemas.errors import BadInput
from schemas.manifest import EncodedManifest, Manifest, StudentLoRA, StudentManifest, StudentUNet, Teacher
from stages.diffusion.denoiser import Denoiser, UNetDenoiser
from stages.diffusion.lora import LORA_FILE, load_lora, merge_lora, save_lora
from stages.diffusion.lora_merged import merge_in_training
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.prediction import PREDICTION_TYPES

UNET_FOLDER = "unet"
METRICS_FILE = "metrics.parquet"


def load_student(pipeline: TeacherPipeline, manifest: StudentManifest, folder: Path, *, merged: bool = False) -> UNetDenoiser:
    """Load a student from its artifact's folder, in evaluation mode, on the teacher's device and in its type.

    A LoRA is put on a copy of the teacher's UNet, which stays as it is; `merged` adds it into the weights, which is faster to run and differs from
    the adapter in the last bits. Raises `BadInput` when the student belongs to another teacher's architecture.
    """
    content = manifest.content
    if isinstance(content, StudentLoRA):
        unet = copy.deepcopy(pipeline.unet)
        load_lora(unet, folder)
        if merged:
            merge_lora(unet)
    else:
        try:
            unet = type(pipeline.unet).from_pretrained(
                folder / UNET_FOLDER, use_safetensors=True, local_files_only=True, dtype=pipeline.dtype
            )
        except (OSError, ValueError) as error:
            raise BadInput(f"student {manifest.identity[:12]}: its UNet cannot be loaded ({str(error).strip().splitlines()[0]})") from error
    unet = unet.to(pipeline.device).eval()
    return UNetDenoiser(unet, pipeline.schedule, PREDICTION_TYPES[content.prediction_type])


def weight_files(manifest: StudentManifest) -> list[str]:
    """The files that a student is loaded from: not its figures, pictures and report, nor the other weights that lie beside them."""
    return [entry.path for entry in manifest.files if entry.path == LORA_FILE or entry.path.startswith(f"{UNET_FOLDER}/")]


def save_unet(unet: Any, folder: Path) -> None:
    """Write `unet/` in diffusers' layout, one safetensors file. The bytes depend on configuration and weights alone."""
    target = folder / UNET_FOLDER
    unet.to(memory_format=torch.contiguous_format)
    unet.save_pretrained(target, safe_serialization=True, max_shard_size="1TB")
    path = target / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)  # where it was once loaded from: a place, not a property
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_weights(unet: Any, folder: Path, content: StudentUNet | StudentLoRA) -> None:
    """Write a student's UNet or its LoRA."""
    if isinstance(content, StudentLoRA):
        save_lora(unet, folder)
    else:
        save_unet(unet, folder)


def ready_for_training(unet: Any, *, gradient_checkpointing: bool) -> Any:
    """Put a UNet, or the one under a LoRA, in training mode, in the memory layout that convolutions are fastest in; returns it."""
    unet.train().to(memory_format=torch.channels_last)
    merge_in_training(unet)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


@dataclass(frozen=True, eq=False)
class Student:
    """A network in training, as a method sees it."""

    denoiser: Denoiser
    parameters: Mapping[str, nn.Parameter]
    """Those that are trained, by name."""
    tensors: Mapping[str, Tensor]
    """The live tensors that a checkpoint must hold: the trained parameters, and the buffers."""

    @classmethod
    def of_unet(cls, denoiser: UNetDenoiser) -> "Student":
        """All of a UNet, or its LoRA where `add_lora` froze the rest."""
        parameters = {name: parameter for name, parameter in denoiser.unet.named_parameters() if parameter.requires_grad}
        whole = len(parameters) == len(list(denoiser.unet.parameters()))
        tensors = {name: parameter.detach() for name, parameter in parameters.items()}
        return cls(denoiser, parameters, tensors | dict(denoiser.unet.named_buffers()) if whole else tensors)


def check_teacher(teacher: Manifest[Teacher], latents: EncodedManifest, *students: StudentManifest | None) -> None:
    """Refuse latents or a student of another teacher. Raises `BadInput` naming both."""
    made_for = [("latents", latents.content.teacher)]
    made_for += [(f"student {student.identity[:12]}", student.content.teacher) for student in students if student is not None]
    for what, identity in made_for:
        if identity != teacher.identity:
            raise BadInput(f"{what}: made with the teacher {identity[:12]}; expected those of {teacher.identity[:12]}")
