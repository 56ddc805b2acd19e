"""Stage `lightning`: one link of progressive distillation with a mean-squared-error target (SDXL-Lightning, arXiv 2402.13929, 2.3 and 3.6)."""

import copy
from typing import Any

import torch

from schemas.base import Model
from schemas.errors import BadInput
from schemas.lightning import LinkConfig, trailing_timesteps
from schemas.manifest import Latents, Manifest, StudentLoRA, StudentUNet, Teacher
from stages.diffusion.denoiser import Denoiser, UNetDenoiser
from stages.diffusion.lora import add_lora, load_lora
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.prediction import PREDICTION_TYPES, PredictionType
from stages.latents import LatentSet
from stages.lightning.regression import ProgressiveLink, SampleSwitch
from stages.students import check_teacher, load_student, ready_for_training, save_student, trainable, trained_tensors
from stages.training import train
from stages.training.latent_batches import reader
from stages.training.randomness import derive_seed
from stages.workspace import Workspace


class Inputs(Model):
    """What a link reads."""

    teacher: Manifest[Teacher]
    latents: Manifest[Latents]
    previous: Manifest[StudentUNet | StudentLoRA] | None = None
    """The link before; its student is this link's teacher and where this link's student starts. None: the first link."""


def run(config: LinkConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Any]:
    """Train the student of one link and publish its UNet or LoRA."""
    check_teacher(inputs.teacher, inputs.latents, inputs.previous)
    seed = workspace.seed if config.seed is None else config.seed
    latents = LatentSet.open(inputs.latents, workspace)
    teacher, unet = _networks(config, inputs, workspace, derive_seed(seed, "lora"))
    student = UNetDenoiser(unet, teacher.schedule, _student_prediction(config, teacher))
    unconditional = latents.unconditional(1) if config.guidance_scale > 1 else None

    if student.prediction is not teacher.prediction and config.conversion_steps:
        conversion = config.model_copy(
            update={"training_steps": config.conversion_steps, "lr_schedule": "constant", "warmup_steps": 0, "ema_decay": None}
        )
        switch = SampleSwitch(conversion, teacher=teacher, student=student, parameters=trainable(unet), tensors=trained_tensors(unet))
        train(switch, reader(latents), len(latents), conversion, workspace, seed=seed, name="conversion")
    link = ProgressiveLink(
        config,
        teacher=teacher,
        student=student,
        parameters=trainable(unet),
        tensors=trained_tensors(unet),
        unconditional=unconditional,
    )
    rows = train(link, reader(latents), len(latents), config, workspace, seed=seed)

    content = _content(config, inputs, student)
    with workspace.folder("student") as folder:
        save_student(unet, folder, content, rows)
        return workspace.publish(folder, content)


def _networks(config: LinkConfig, inputs: Inputs, workspace: Workspace, lora_seed: int) -> tuple[UNetDenoiser, Any]:
    """The link's teacher, frozen, and the UNet its student trains, started from the teacher's weights."""
    pipeline = TeacherPipeline.load(workspace.fetch(inputs.teacher), workspace.device)
    previous = inputs.previous
    teacher = pipeline.denoiser()
    if previous is not None:
        teacher = load_student(pipeline, previous, workspace.fetch(previous), merged=True)
    if config.network == "unet":
        unet = copy.deepcopy(teacher.unet)
        unet.requires_grad_(True)
    else:
        unet = _lora_unet(config, pipeline, previous, workspace, lora_seed)
    teacher.unet.requires_grad_(False).to(memory_format=torch.channels_last)
    return teacher, ready_for_training(unet, gradient_checkpointing=config.gradient_checkpointing)


def _lora_unet(
    config: LinkConfig, pipeline: TeacherPipeline, previous: Manifest[StudentUNet | StudentLoRA] | None, workspace: Workspace, seed: int
) -> Any:
    """The base teacher with an adapter, so that the published LoRA is relative to the base and fits other models made from it."""
    unet = copy.deepcopy(pipeline.unet)
    if previous is None:
        add_lora(unet, config.lora_rank, config.lora_alpha, seed=seed)
        return unet
    content = previous.content
    if not isinstance(content, StudentLoRA) or (content.rank, content.alpha) != (config.lora_rank, config.lora_alpha):
        raise BadInput(
            f"the link {config.teacher_steps} -> {config.steps} trains a LoRA of rank {config.lora_rank} and alpha {config.lora_alpha}: expected the "
            "same of the link before, because a LoRA is published relative to the base teacher"
        )
    load_lora(unet, workspace.fetch(previous))
    return unet


def _student_prediction(config: LinkConfig, teacher: Denoiser) -> PredictionType:
    return teacher.prediction if config.prediction == "teacher" else PREDICTION_TYPES[config.prediction]


def _content(config: LinkConfig, inputs: Inputs, student: Denoiser) -> StudentUNet | StudentLoRA:
    facts: dict[str, Any] = {
        "method": "lightning-mse",
        "steps": (config.steps,),
        "timesteps": {config.steps: trailing_timesteps(config.steps, student.schedule.num_train_timesteps)},
        "sampler": "trailing",
        "prediction_type": student.prediction.name,
        "guidance_scale": 1.0,
        "teacher": inputs.teacher.identity,
        "training_steps": config.training_steps,
    }
    if config.network == "lora":
        return StudentLoRA(**facts, rank=config.lora_rank, alpha=config.lora_alpha)
    return StudentUNet(**facts)
