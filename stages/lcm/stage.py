"""Stage `lcm`: latent consistency distillation of a UNet or a LoRA (LCM, arXiv 2310.04378; LCM-LoRA, arXiv 2311.05556)."""

from collections.abc import Mapping
from typing import Any

from schemas.base import Model
from schemas.lcm import LcmConfig
from schemas.manifest import EncodedManifest, Manifest, StudentLoRA, StudentUNet, Teacher
from schemas.recipe import Recipe
from stages.diffusion.schedule import lcm_timesteps
from stages.encoded import open_encoded
from stages.lcm.distillation import ConsistencyDistillation
from stages.lcm.networks import Networks
from stages.start import preflight_start
from stages.students import check_teacher
from stages.training import train
from stages.training.latent_batches import reader
from stages.watching import StudentWatch, check_watch, publish_student
from stages.workspace import Workspace


class Inputs(Model):
    """What the stage reads."""

    teacher: Manifest[Teacher]
    latents: EncodedManifest
    """What the student is trained on."""


def preflight(config: LcmConfig, outside: Mapping[str, str], _recipe: Recipe) -> None:
    """Look for what the looks at the student will need, and at a student to go on from that lies on this machine. Raises `BadInput`."""
    check_watch("lcm", config, outside)
    preflight_start(config, outside)


def run(config: LcmConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Any]:
    """Train a latent consistency model and publish it: of a UNet its target network, the moving average; of a LoRA the one that was trained, or its
    moving average where `ema_decay` asks for one."""
    check_teacher(inputs.teacher, inputs.latents)
    seed = workspace.seed if config.seed is None else config.seed
    latents = open_encoded(inputs.latents, workspace, inputs.teacher)
    networks = Networks.build(config, inputs.teacher, workspace, seed=seed)
    method = ConsistencyDistillation(
        config,
        teacher=networks.teacher,
        student=networks.student,
        target=networks.target,
        unconditional=latents.unconditional(1),
        as_teacher=networks.as_teacher,
    )
    content = _content(config, inputs.teacher, networks)
    watch = StudentWatch.open(config, networks.student, content, teacher=inputs.teacher, latents=latents, workspace=workspace)
    rows = train(method, reader(latents), len(latents), config, workspace, seed=seed, observer=watch)
    return publish_student(networks.student, content, rows, config, workspace, watch=watch)


def _content(config: LcmConfig, teacher: Manifest[Teacher], networks: Networks) -> StudentUNet | StudentLoRA:
    student = networks.student.denoiser
    bounds = config.guidance_w_range
    facts: dict[str, Any] = {
        "method": "lcm",
        "steps": config.steps,
        "timesteps": {steps: lcm_timesteps(steps, train_timesteps=student.schedule.num_train_timesteps) for steps in config.steps},
        "sampler": "lcm",
        "prediction_type": student.prediction.name,
        "guidance_scale": 1.0 if bounds is None else 1 + config.guidance_w,
        "guidance_range": None if bounds is None else (1 + bounds[0], 1 + bounds[1]),
        "teacher": teacher.identity,
        "training_steps": config.training_steps,
    }
    if config.network == "lora":
        return StudentLoRA(**facts, rank=config.lora_rank, alpha=config.lora_alpha)
    return StudentUNet(**facts)
