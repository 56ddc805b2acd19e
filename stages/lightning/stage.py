"""Stage `lightning`: one link of progressive distillation, or one phase of it (SDXL-Lightning, arXiv 2402.13929)."""

import copy
from typing import Any

import torch

from schemas.base import Model
from schemas.errors import BadInput
from schemas.lightning import LinkConfig, trailing_timesteps
from schemas.manifest import Latents, Manifest, StudentLoRA, StudentUNet, Teacher
from stages.diffusion.denoiser import Denoiser, UNetDenoiser
from stages.diffusion.discriminator import unet_discriminator
from stages.diffusion.lora import add_lora, load_lora
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.prediction import PREDICTION_TYPES
from stages.latents import LatentSet
from stages.lightning.adversarial import AdversarialLink
from stages.lightning.regression import ProgressiveLink, SampleSwitch
from stages.students import check_teacher, load_student, ready_for_training, save_student, trainable, trained_tensors
from stages.training import Method, train
from stages.training.latent_batches import LatentBatch, reader
from stages.training.randomness import derive_seed
from stages.workspace import Workspace


class Inputs(Model):
    """What a link reads."""

    teacher: Manifest[Teacher]
    latents: Manifest[Latents]
    source: Manifest[StudentUNet | StudentLoRA] | None = None
    """The student of an earlier link, which teaches. None: the teacher itself does."""
    start: Manifest[StudentUNet | StudentLoRA] | None = None
    """The student that this one goes on from. None: it starts as the teacher."""


def run(config: LinkConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Any]:
    """Train the student of one link, or of one phase of it, and publish its UNet or LoRA."""
    check_teacher(inputs.teacher, inputs.latents, inputs.source, inputs.start)
    seed = workspace.seed if config.seed is None else config.seed
    latents = LatentSet.open(inputs.latents, workspace, inputs.teacher)
    pipeline = TeacherPipeline.load(workspace.fetch(inputs.teacher), workspace.device)
    teacher = _frozen(pipeline, inputs.source, workspace)
    start, unet = _student(config, pipeline, teacher, inputs, workspace, seed=seed)
    student = UNetDenoiser(
        unet, teacher.schedule, PREDICTION_TYPES[config.prediction] if config.prediction != "teacher" else start.prediction
    )
    trained: dict[str, Any] = {"student": student, "parameters": trainable(unet), "tensors": trained_tensors(unet)}

    if student.prediction is not start.prediction and config.conversion_steps:
        conversion = config.model_copy(
            update={"training_steps": config.conversion_steps, "lr_schedule": "constant", "warmup_steps": 0, "ema_decay": None}
        )
        switch = SampleSwitch(conversion, teacher=start, **trained)
        train(switch, reader(latents), len(latents), conversion, workspace, seed=seed, name="conversion")
    link = _method(config, teacher, latents, trained, seed=seed)
    rows = train(link, reader(latents), len(latents), config, workspace, seed=seed)

    content = _content(config, inputs, student)
    with workspace.folder("student") as folder:
        save_student(unet, folder, content, rows)
        return workspace.publish(folder, content)


def _method(
    config: LinkConfig, teacher: UNetDenoiser, latents: LatentSet, trained: dict[str, Any], *, seed: int
) -> Method[LatentBatch, Any]:
    if config.adversarial is None:
        unconditional = latents.unconditional(1) if config.guidance_scale > 1 else None
        return ProgressiveLink(config, teacher=teacher, unconditional=unconditional, **trained)
    discriminator = unet_discriminator(
        teacher.unet, latents.latent_shape, conditional=config.adversarial.conditional, seed=derive_seed(seed, "discriminator")
    )
    ready_for_training(discriminator.encoder.unet, gradient_checkpointing=config.gradient_checkpointing)
    return AdversarialLink(config, teacher=teacher, discriminator=discriminator, **trained)


def _frozen(pipeline: TeacherPipeline, student: Manifest[StudentUNet | StudentLoRA] | None, workspace: Workspace) -> UNetDenoiser:
    """The denoiser of a student, its LoRA merged, or of the teacher itself."""
    denoiser = pipeline.denoiser() if student is None else load_student(pipeline, student, workspace.fetch(student), merged=True)
    denoiser.unet.requires_grad_(False).to(memory_format=torch.channels_last)
    return denoiser


def _student(
    config: LinkConfig, pipeline: TeacherPipeline, teacher: UNetDenoiser, inputs: Inputs, workspace: Workspace, *, seed: int
) -> tuple[UNetDenoiser, Any]:
    """What the student starts as, frozen, and the UNet that is trained from there: whole, or the base teacher's with an adapter.

    A LoRA is relative to the base, so that the published one fits other models made from it. It keeps the base's prediction type, which is all that
    is asked of its start: the student it goes on from is not loaded a second time, merged.
    """
    start = pipeline.denoiser()
    if config.network == "unet":
        start = teacher if inputs.start == inputs.source else _frozen(pipeline, inputs.start, workspace)
        unet = copy.deepcopy(start.unet)
        unet.requires_grad_(True)
    else:
        unet = copy.deepcopy(pipeline.unet)
        if inputs.start is None:
            add_lora(unet, config.lora_rank, config.lora_alpha, seed=derive_seed(seed, "lora"))
        else:
            content = inputs.start.content
            if not isinstance(content, StudentLoRA) or (content.rank, content.alpha) != (config.lora_rank, config.lora_alpha):
                raise BadInput(
                    f"the link {config.teacher_steps} -> {config.steps} trains a LoRA of rank {config.lora_rank} and alpha {config.lora_alpha}: "
                    "expected the same of the student it starts from, because a LoRA is published relative to the base teacher"
                )
            load_lora(unet, workspace.fetch(inputs.start))
    return start, ready_for_training(unet, gradient_checkpointing=config.gradient_checkpointing)


def _content(config: LinkConfig, inputs: Inputs, student: Denoiser) -> StudentUNet | StudentLoRA:
    facts: dict[str, Any] = {
        "method": "lightning-mse" if config.adversarial is None else "lightning",
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
