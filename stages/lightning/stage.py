"""Stage `lightning`: one link of progressive distillation, or one phase of it (SDXL-Lightning, arXiv 2402.13929)."""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from schemas.base import Model
from schemas.errors import BadInput
from schemas.lightning import LinkConfig, trailing_timesteps
from schemas.manifest import EncodedManifest, Manifest, StudentLoRA, StudentManifest, StudentUNet, Teacher
from schemas.recipe import Recipe
from stages.diffusion.denoiser import Denoiser, UNetDenoiser
from stages.diffusion.discriminator import Discriminator, UNetEncoder, unet_discriminator
from stages.diffusion.lora import add_lora, load_lora
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.prediction import PREDICTION_TYPES
from stages.encoded import Encoded, open_encoded
from stages.lightning.adversarial import AdversarialLink
from stages.lightning.regression import ProgressiveLink, SampleSwitch
from stages.students import Student, check_teacher, load_student, ready_for_training, weight_files
from stages.training import Method, Row, train
from stages.training.latent_batches import LatentBatch, reader
from stages.training.randomness import derive_seed
from stages.training.sharding import shard
from stages.watching import StudentWatch, check_watch, publish_student
from stages.workspace import Workspace


class Inputs(Model):
    """What a link reads."""

    teacher: Manifest[Teacher]
    latents: EncodedManifest
    """What the student is trained on."""
    source: StudentManifest | None = None
    """The student of an earlier link, which teaches. None: the teacher itself does."""
    start: StudentManifest | None = None
    """The student that this one goes on from. None: it starts as the teacher."""


def preflight(config: LinkConfig, outside: Mapping[str, str], _recipe: Recipe) -> None:
    """Look for what the looks at the student will need. Raises `BadInput`."""
    check_watch("lightning", config, outside)


def run(config: LinkConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Any]:
    """Train the student of one link, or of one phase of it, and publish its UNet or LoRA."""
    check_teacher(inputs.teacher, inputs.latents, inputs.source, inputs.start)
    seed = workspace.seed if config.seed is None else config.seed
    latents = open_encoded(inputs.latents, workspace, inputs.teacher)
    teacher = _frozen(inputs, inputs.source, workspace)
    discriminator = _discriminator(config, teacher, latents, workspace, seed=seed)
    start, unet = _student(config, teacher, inputs, workspace, seed=seed)
    if config.teacher_precision == "bfloat16":  # now that the student and the discriminator have taken over the float32 weights
        teacher.unet.bfloat16()
    prediction = PREDICTION_TYPES[config.prediction] if config.prediction != "teacher" else start.prediction
    student = Student.of_unet(UNetDenoiser(shard(unet, config, workspace.parallel), teacher.schedule, prediction))

    converted: list[Row] = []
    if prediction is not start.prediction and config.conversion_steps:
        optimizer = config.conversion_optimizer or config.optimizer
        conversion = config.model_copy(update={"training_steps": config.conversion_steps, "optimizer": optimizer, "ema_decay": None})
        switch = SampleSwitch(conversion, teacher=start, student=student)
        converted = train(switch, reader(latents), len(latents), conversion, workspace, seed=seed, name="conversion")
        del switch
    del start  # a network of its own where it is not the teacher
    link = _method(config, teacher, latents, student, discriminator)
    content = _content(config, inputs, student.denoiser)
    watch = StudentWatch.open(config, student, content, teacher=inputs.teacher, latents=latents, workspace=workspace)
    rows = train(link, reader(latents), len(latents), config, workspace, seed=seed, observer=watch)
    return publish_student(student, content, rows, config, workspace, watch=watch, converted=converted)


def _method(
    config: LinkConfig, teacher: UNetDenoiser, latents: Encoded, student: Student, discriminator: Discriminator[UNetEncoder] | None
) -> Method[LatentBatch, Any]:
    if discriminator is not None:
        return AdversarialLink(config, teacher=teacher, student=student, discriminator=discriminator)
    unconditional = latents.unconditional(1) if config.guidance_scale > 1 else None
    return ProgressiveLink(config, teacher=teacher, student=student, unconditional=unconditional)


def _discriminator(
    config: LinkConfig, teacher: UNetDenoiser, latents: Encoded, workspace: Workspace, *, seed: int
) -> Discriminator[UNetEncoder] | None:
    """The adversarial link's, ready to be trained."""
    if config.adversarial is None:
        return None
    discriminator = unet_discriminator(
        teacher.unet, latents.latent_shape, conditional=config.adversarial.conditional, seed=derive_seed(seed, "discriminator")
    )
    ready_for_training(discriminator.encoder.unet, gradient_checkpointing=config.gradient_checkpointing)
    return shard(discriminator, config, workspace.parallel)


def _frozen(inputs: Inputs, student: StudentManifest | None, workspace: Workspace) -> UNetDenoiser:
    """The denoiser of a student, its LoRA merged, or of the teacher itself. Nothing else of the pipeline stays loaded."""
    pipeline = TeacherPipeline.load(workspace.fetch(inputs.teacher), workspace.device, only=frozenset({"unet"}))
    denoiser = (
        pipeline.denoiser()
        if student is None
        else load_student(pipeline, student, workspace.fetch(student, weight_files(student)), merged=True)
    )
    denoiser.unet.requires_grad_(False).to(memory_format=torch.channels_last)
    return denoiser


def _student(config: LinkConfig, teacher: UNetDenoiser, inputs: Inputs, workspace: Workspace, *, seed: int) -> tuple[UNetDenoiser, Any]:
    """What the student starts as, frozen, and the UNet that is trained from there: whole, or the base teacher's with an adapter.

    Both are one network where nothing asks for what the student started as. A LoRA is relative to the base, so that the published one fits other
    models made from it. It keeps the base's prediction type, which is all that is asked of its start: the student it goes on from is not loaded a
    second time, merged.
    """
    if config.network == "unet":
        start = teacher if inputs.start == inputs.source else _frozen(inputs, inputs.start, workspace)
        unet = copy.deepcopy(start.unet) if start is teacher or config.conversion_steps else start.unet
        unet.requires_grad_(True)
    else:
        start = _frozen(inputs, None, workspace)
        unet = start.unet
        if inputs.start is None:
            add_lora(unet, config.lora_rank, config.lora_alpha, seed=derive_seed(seed, "lora"))
        else:
            content = inputs.start.content
            if not isinstance(content, StudentLoRA) or (content.rank, content.alpha) != (config.lora_rank, config.lora_alpha):
                raise BadInput(
                    f"the link {config.teacher_steps} -> {config.steps} trains a LoRA of rank {config.lora_rank} and alpha {config.lora_alpha}: "
                    "expected the same of the student it starts from, because a LoRA is published relative to the base teacher"
                )
            load_lora(unet, workspace.fetch(inputs.start, weight_files(inputs.start)))
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
