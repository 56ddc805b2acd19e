"""Stage `lcm`: latent consistency distillation of a LoRA (LCM, arXiv 2310.04378; LCM-LoRA, arXiv 2311.05556)."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from schemas.base import Model
from schemas.lcm import LcmConfig
from schemas.manifest import Latents, Manifest, StudentLoRA, Teacher
from schemas.recipe import Recipe
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import Denoiser, predict
from stages.diffusion.lora import add_lora, lora_layers, without_lora
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.schedule import ddim_solver_timesteps, lcm_timesteps
from stages.diffusion.solvers import boundary_scalings, consistency, ddim_move
from stages.latents import LatentSet
from stages.students import Student, check_teacher, ready_for_training
from stages.training import Draw, Figure, Method, Player, Spread, train
from stages.training.latent_batches import LatentBatch, reader
from stages.training.randomness import derive_seed
from stages.training.sharding import shard
from stages.watching import StudentWatch, check_watch, publish_student
from stages.workspace import Workspace


class Inputs(Model):
    """What the stage reads."""

    teacher: Manifest[Teacher]
    latents: Manifest[Latents]


def preflight(config: LcmConfig, _outside: Mapping[str, str], _recipe: Recipe) -> None:
    """Look for what the looks at the student will need. Raises `BadInput`."""
    check_watch("lcm", config)


def run(config: LcmConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Any]:
    """Train a LoRA that makes its base a latent consistency model, and publish it."""
    check_teacher(inputs.teacher, inputs.latents)
    seed = workspace.seed if config.seed is None else config.seed
    latents = LatentSet.open(inputs.latents, workspace, inputs.teacher)
    base = TeacherPipeline.load(workspace.fetch(inputs.teacher), workspace.device, only=frozenset({"unet"})).denoiser()
    unet = base.unet
    add_lora(unet, config.lora_rank, config.lora_alpha, seed=derive_seed(seed, "lora"))
    ready_for_training(unet, gradient_checkpointing=config.gradient_checkpointing)
    shard(unet, config, workspace.parallel)
    layers = lora_layers(unet)
    student = Student.of_unet(base)
    method = ConsistencyDistillation(
        config,
        teacher=base,
        student=student,
        unconditional=latents.unconditional(1),
        as_teacher=lambda: without_lora(layers),
    )
    content = StudentLoRA(
        method="lcm",
        steps=config.steps,
        timesteps={steps: lcm_timesteps(steps, train_timesteps=base.schedule.num_train_timesteps) for steps in config.steps},
        sampler="lcm",
        prediction_type=base.prediction.name,
        guidance_scale=1.0,
        teacher=inputs.teacher.identity,
        training_steps=config.training_steps,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
    )
    watch = StudentWatch.open(config, student, content, teacher=inputs.teacher, latents=latents, workspace=workspace)
    rows = train(method, reader(latents), len(latents), config, workspace, seed=seed, observer=watch)
    return publish_student(student, content, rows, config, workspace, watch=watch)


@dataclass(frozen=True, eq=False)
class ConsistencyPair:
    """A noisy sample and the value its consistency function shall have."""

    x_t: Tensor
    """z_{n+k}, (B, C, h, w)."""
    timesteps: Tensor
    """t_{n+k}, (B,) long."""
    conditioning: Conditioning
    target: Tensor
    """f_theta-(z_hat_n, t_n), (B, C, h, w)."""
    reference: Spread
    """Of the encoded pictures: a consistency function's values are distributed as what the noise was added to."""


class ConsistencyDistillation(Method[LatentBatch, ConsistencyPair]):
    """d(f(z_{n+k}, t_{n+k}), f(z_hat_n, t_n)) with z_hat_n one guided DDIM move of the teacher (LCM eq. 12-14; LCM-LoRA).

    The target network is the student itself without gradient.
    """

    def __init__(
        self,
        config: LcmConfig,
        *,
        teacher: Denoiser,
        student: Student,
        unconditional: Conditioning,
        as_teacher: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`as_teacher` makes the shared network the teacher while it is open; `unconditional` (1, ...)."""
        self.config, self.teacher, self.student = config, teacher, student.denoiser
        self.unconditional, self.as_teacher = unconditional, as_teacher
        self.players = {"student": Player.of(student.parameters, config.optimizer, config)}
        self._tensors = student.tensors
        self._grid = torch.tensor(ddim_solver_timesteps(config.ddim_timesteps, teacher.schedule.num_train_timesteps))
        self._skip = teacher.schedule.num_train_timesteps // config.ddim_timesteps

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The student's LoRA."""
        return {"student": self._tensors}

    def prepare(self, batch: LatentBatch, draw: Draw) -> ConsistencyPair:
        """Noise to t_{n+k}, let the teacher take one move to t_n, and evaluate the student there."""
        batch = batch.to(draw.device)
        later = self._grid.to(draw.device)[draw.integers("timestep", self.config.ddim_timesteps)]
        earlier = (later - self._skip).clamp(min=0)  # the grid begins at k - 1: from there the move goes to 0, as in diffusers' script
        x_t = self.teacher.schedule.add_noise(batch.latents, draw.normal("noise", batch.latents.shape[1:]), later)
        unconditional = self.unconditional.to(draw.device).expand(len(x_t)).with_time_ids(batch.conditioning.time_ids)
        with self.as_teacher():
            moved = ddim_move(
                self.teacher,
                x_t,
                later,
                earlier,
                batch.conditioning,
                unconditional=unconditional,
                guidance_scale=1 + self.config.guidance_w,  # Imagen's scale of LCM's w
            )
        target = self.consistency_function(moved, earlier, batch.conditioning)
        return ConsistencyPair(x_t, later, batch.conditioning, target, Spread.of(batch.latents))

    def loss(self, player: str, prepared: ConsistencyPair, draw: Draw) -> Mapping[str, Figure]:  # noqa: ARG002
        """Return the distance of the two values of the consistency function."""
        value = self.consistency_function(prepared.x_t, prepared.timesteps, prepared.conditioning)
        loss = DISTANCES[self.config.loss](value - prepared.target, self.config.huber_c)
        return {"loss": loss, "x0": Spread.of(value), "reference": prepared.reference}

    def consistency_function(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """f(x_t, t) = c_skip(t) x_t + c_out(t) x0 of the student (LCM eq. 9)."""
        x0 = predict(self.student, x_t, timesteps, conditioning).x0
        return consistency(x0, x_t, boundary_scalings(timesteps, x_t.ndim, self.config.sigma_data, self.config.timestep_scaling))


def squared(difference: Tensor, huber_c: float) -> Tensor:  # noqa: ARG001 - one signature for all distances
    """Mean of d^2."""
    return difference.square().mean()


def pseudo_huber(difference: Tensor, huber_c: float) -> Tensor:
    """Mean of sqrt(d^2 + c^2) - c (arXiv 2310.14189, eq. 6; diffusers' scripts)."""
    return ((difference.square() + huber_c**2).sqrt() - huber_c).mean()


DISTANCES: Mapping[str, Callable[[Tensor, float], Tensor]] = {"l2": squared, "huber": pseudo_huber}
