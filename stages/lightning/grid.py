"""Where a student of progressive distillation stands: its timesteps, the teacher's moves between them, and its noisy inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from schemas.lightning import LinkConfig, trailing_timesteps
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.schedule import CLEAN, NoiseSchedule
from stages.students import Student
from stages.training import Draw, Method, Player, Spread
from stages.training.latent_batches import LatentBatch

P = TypeVar("P")


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
    reference: Spread
    """Of the x0 that a student says whose output is the target."""


class OnStudentGrid(Method[LatentBatch, P]):
    """A student trained at the timesteps of its own trailing grid."""

    def __init__(
        self,
        config: LinkConfig,
        *,
        teacher: Denoiser,
        student: Student,
        unconditional: Conditioning | None = None,
    ) -> None:
        """`unconditional` (1, ...) for guidance."""
        self.config, self.teacher, self.student, self.unconditional = config, teacher, student.denoiser, unconditional
        self.players = {"student": Player.of(student.parameters, config.optimizer, config)}
        self._tensors = student.tensors
        self._moves = teacher_moves(config.teacher_steps, config.steps, teacher.schedule.num_train_timesteps, config.start_timesteps)

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The student; the teacher does not change."""
        return {"student": self._tensors}

    def sample(self, batch: LatentBatch, draw: Draw) -> NoisySample:
        """Noise the batch to timesteps drawn uniformly from those that the student is trained at."""
        batch = batch.to(draw.device)
        positions = draw.integers("timestep", len(self._moves))
        timesteps = self._moves.to(draw.device)[positions]  # (B, n + 1)
        eps = draw.normal("noise", batch.latents.shape[1:])
        x_t = noisy_input(self.teacher.schedule, batch.latents, eps, timesteps[:, 0])
        return NoisySample(x_t, timesteps.unbind(1), batch.conditioning)


def teacher_moves(teacher_steps: int, steps: int, train_timesteps: int, starts: Sequence[int] | None = None) -> Tensor:
    """Timesteps of the teacher's n moves from each of the student's to where its jump ends, (starts, n + 1) long, `CLEAN` below the grid.

    `starts` are the student's own grid where not given. From others, entries of the teacher's grid too, the jump is as long, and clamped at the clean
    state, which the teacher may reach in fewer moves: then the last timesteps are all `CLEAN`. Entries of the grids and no arithmetic on t: 1000 is
    no multiple of 128. Raises `ValueError` unless the grids nest.
    """
    fine = trailing_timesteps(teacher_steps, train_timesteps)
    n, rest = divmod(teacher_steps, steps)
    if rest or fine[::n] != trailing_timesteps(steps, train_timesteps):
        raise ValueError(f"the trailing grid of {steps} steps does not nest in that of {teacher_steps}")
    own = fine[::n] if starts is None else tuple(starts)
    if foreign := sorted(set(own) - set(fine)):
        raise ValueError(f"timesteps {foreign}: expected entries of the teacher's trailing grid of {teacher_steps} steps")
    padded = (*fine, *[CLEAN] * n)
    return torch.tensor([padded[fine.index(t) : fine.index(t) + n + 1] for t in own])


def implied_x0(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor) -> Tensor:
    """The x0 by which one DDIM jump from x_t at `t` ends at x_s at `s` < t: what a student says that jumps there. Shapes (B, ...), (B,) long."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t, x_t.ndim), schedule.alpha_sigma(s, x_t.ndim)
    return (sigma_t * x_s - sigma_s * x_t) / (sigma_t * alpha_s - sigma_s * alpha_t)


def noisy_input(schedule: NoiseSchedule, x0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
    """x_t for training: pure noise at T - 1, as sampling starts, though conversions keep abar_T (SDXL-Lightning 3.5, eq. 24)."""
    last = (timesteps == schedule.num_train_timesteps - 1).reshape(-1, *(1,) * (x0.ndim - 1))
    return torch.where(last, eps, schedule.add_noise(x0, eps, timesteps))
