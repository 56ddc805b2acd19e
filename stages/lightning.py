"""Stage `lightning`: one link of progressive distillation with a mean-squared-error target (SDXL-Lightning, arXiv 2402.13929, 2.3 and 3.6)."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from schemas.base import Model
from schemas.errors import BadInput
from schemas.lightning import LinkConfig, trailing_timesteps
from schemas.manifest import Latents, Manifest, StudentLoRA, StudentUNet, Teacher
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import Denoiser, UNetDenoiser, predict
from stages.diffusion.lora import add_lora, load_lora
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.prediction import PREDICTION_TYPES, PredictionType
from stages.diffusion.schedule import CLEAN, NoiseSchedule
from stages.diffusion.solvers import ddim_moves, ddim_step
from stages.latents import LatentSet
from stages.students import check_teacher, load_student, ready_for_training, save_student, trainable, trained_tensors
from stages.training import Draw, Method, Player, train
from stages.training.latent_batches import LatentBatch, reader
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
    latents = LatentSet.open(inputs.latents, workspace, inputs.teacher)
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


@dataclass(frozen=True, eq=False)
class NoisySample:
    """Where a micro-batch stands on the student's grid."""

    x_t: Tensor
    """(B, C, h, w); pure noise at T - 1."""
    timesteps: tuple[Tensor, ...]
    """Each (B,) long: t, then the teacher's n moves down to the student's next timestep."""
    conditioning: Conditioning


@dataclass(frozen=True, eq=False)
class Target:
    """A noisy sample and what the student's output is compared with."""

    sample: NoisySample
    target: Tensor
    """(B, C, h, w) float32."""


class OnStudentGrid(Method[LatentBatch, Target]):
    """A student trained at the timesteps of its own trailing grid."""

    def __init__(
        self,
        config: LinkConfig,
        *,
        teacher: Denoiser,
        student: Denoiser,
        parameters: Mapping[str, nn.Parameter],
        tensors: Mapping[str, Tensor],
        unconditional: Conditioning | None = None,
    ) -> None:
        """`parameters` and `tensors`: the student's that are trained and those that a checkpoint must hold; `unconditional` (1, ...) for guidance."""
        self.config, self.teacher, self.student, self.unconditional = config, teacher, student, unconditional
        self.players = {"student": Player.of(parameters, config.optimizer, config)}
        self._tensors = tensors
        self._moves = teacher_moves(config.teacher_steps, config.steps, teacher.schedule.num_train_timesteps)

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The student; the teacher does not change."""
        return {"student": self._tensors}

    def sample(self, batch: LatentBatch, draw: Draw) -> NoisySample:
        """Noise the batch to timesteps drawn uniformly from the student's grid."""
        batch = batch.to(draw.device)
        positions = draw.integers("timestep", self.config.steps)
        timesteps = self._moves.to(draw.device)[positions]  # (B, n + 1)
        eps = draw.normal("noise", batch.latents.shape[1:])
        x_t = noisy_input(self.teacher.schedule, batch.latents, eps, timesteps[:, 0])
        return NoisySample(x_t, timesteps.unbind(1), batch.conditioning)


class ProgressiveLink(OnStudentGrid):
    """One jump of the student equals n DDIM moves of the teacher: norm(x_hat_{t-ns} - x_{t-ns})^2 (SDXL-Lightning 2.3)."""

    def prepare(self, batch: LatentBatch, draw: Draw) -> Target:
        """Make the teacher's x_{t-ns}."""
        sample = self.sample(batch, draw)
        unconditional = self.unconditional
        if unconditional is not None:
            unconditional = unconditional.to(draw.device).expand(len(sample.x_t)).with_time_ids(sample.conditioning.time_ids)
        target = ddim_moves(
            self.teacher,
            sample.x_t,
            sample.timesteps,
            sample.conditioning,
            unconditional=unconditional,
            guidance_scale=self.config.guidance_scale,
        )
        return Target(sample, target)

    def loss(self, player: str, prepared: Target, draw: Draw) -> Mapping[str, Tensor]:  # noqa: ARG002
        """Return the squared error after the student's one jump."""
        sample = prepared.sample
        x0, eps = predict(self.student, sample.x_t, sample.timesteps[0], sample.conditioning)
        jumped = ddim_step(x0, eps, *self.student.schedule.alpha_sigma(sample.timesteps[-1], x0.ndim))
        return {"loss": mse_loss(jumped, prepared.target), "x0_mean": x0.mean(), "x0_std": x0.std()}


class SampleSwitch(OnStudentGrid):
    """The student learns to say x0 where its starting weights say something else (SDXL-Lightning 3.7.3, eq. 27-29).

    L = norm(f_online(x_t, t, c) - (x_t - sqrt(1 - abar_t) f_frozen(x_t, t, c)) / sqrt(abar_t))^2.
    """

    def prepare(self, batch: LatentBatch, draw: Draw) -> Target:
        """Make the frozen network's x0."""
        sample = self.sample(batch, draw)
        return Target(sample, predict(self.teacher, sample.x_t, sample.timesteps[0], sample.conditioning).x0)

    def loss(self, player: str, prepared: Target, draw: Draw) -> Mapping[str, Tensor]:  # noqa: ARG002
        """Return the squared error of x0."""
        sample = prepared.sample
        x0 = predict(self.student, sample.x_t, sample.timesteps[0], sample.conditioning).x0
        return {"loss": mse_loss(x0, prepared.target), "x0_mean": x0.mean(), "x0_std": x0.std()}


def teacher_moves(teacher_steps: int, steps: int, train_timesteps: int) -> Tensor:
    """Timesteps of the teacher's moves from each entry of the student's trailing grid to the next, (steps, n + 1) long; the last is `CLEAN`.

    Entries of the grids and no arithmetic on t: 1000 is no multiple of 128. Raises `ValueError` unless the grids nest.
    """
    fine = (*trailing_timesteps(teacher_steps, train_timesteps), CLEAN)
    n, rest = divmod(teacher_steps, steps)
    if rest or fine[:-1:n] != trailing_timesteps(steps, train_timesteps):
        raise ValueError(f"the trailing grid of {steps} steps does not nest in that of {teacher_steps}")
    return torch.tensor([fine[i * n : (i + 1) * n + 1] for i in range(steps)])


def noisy_input(schedule: NoiseSchedule, x0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
    """x_t for training: pure noise at T - 1, as sampling starts, though conversions keep abar_T (SDXL-Lightning 3.5, eq. 24)."""
    last = (timesteps == schedule.num_train_timesteps - 1).reshape(-1, *(1,) * (x0.ndim - 1))
    return torch.where(last, eps, schedule.add_noise(x0, eps, timesteps))


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
