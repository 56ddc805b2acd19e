"""The consistency function, and the loss that makes it one (LCM, arXiv 2310.04378; LCM-LoRA, arXiv 2311.05556)."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from schemas.lcm import LcmConfig
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import Denoiser, predict
from stages.diffusion.schedule import ddim_solver_timesteps
from stages.diffusion.solvers import boundary_scalings, consistency, ddim_move
from stages.students import Student
from stages.training import Draw, Figure, Method, Player, Spread
from stages.training.latent_batches import LatentBatch


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


@dataclass(frozen=True, eq=False)
class TargetNetwork:
    """theta-: a network whose weights are the moving average of the student's."""

    denoiser: Denoiser
    weights: Mapping[str, Tensor]
    """Its live weights by the names of the student's parameters. The training loop moves them after every step, and keeps them in checkpoints."""


class ConsistencyDistillation(Method[LatentBatch, ConsistencyPair]):
    """d(f(z_{n+k}, t_{n+k}), f(z_hat_n, t_n)) with z_hat_n one guided DDIM move of the teacher (LCM eq. 12-14; LCM-LoRA), or with the known noise
    in its place, z_n itself (LCM 4.4).

    The target is evaluated without gradient.
    """

    def __init__(
        self,
        config: LcmConfig,
        *,
        teacher: Denoiser | None,
        student: Student,
        unconditional: Conditioning,
        target: TargetNetwork | None = None,
        as_teacher: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`teacher` None: the noise is known. `unconditional` (1, ...). `target` None: theta- is the student itself. `as_teacher` makes a shared
        network the teacher while it is open."""
        self.config, self.teacher, self.student = config, teacher, student.denoiser
        self.unconditional, self.as_teacher = unconditional, as_teacher
        player = Player.of(student.parameters, config.optimizer, config)
        if target is not None:
            player = replace(player, ema_decay=config.target_decay, average=target.weights)
        self.players = {"student": player}
        self.target = student.denoiser if target is None else target.denoiser
        self._tensors = student.tensors
        self._grid = torch.tensor(ddim_solver_timesteps(config.ddim_timesteps, self.student.schedule.num_train_timesteps))
        self._skip = self.student.schedule.num_train_timesteps // config.ddim_timesteps

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What of the student is trained. The target network is the loop's moving average."""
        return {"student": self._tensors}

    def prepare(self, batch: LatentBatch, draw: Draw) -> ConsistencyPair:
        """Noise to t_{n+k}, move to t_n, and evaluate the target network there."""
        batch = batch.to(draw.device)
        later = self._grid.to(draw.device)[draw.integers("timestep", self.config.ddim_timesteps)]
        earlier = (later - self._skip).clamp(min=0)  # the grid begins at k - 1: from there the move goes to 0, as in diffusers' script
        noise = draw.normal("noise", batch.latents.shape[1:])
        x_t = self.student.schedule.add_noise(batch.latents, noise, later)
        w = self._told(draw)
        if self.teacher is None:
            moved = self.student.schedule.add_noise(batch.latents, noise, earlier)
        else:
            moved = self._solved(self.teacher, x_t, later, earlier, conditioning=batch.conditioning, w=w)
        conditioning = batch.conditioning.with_guidance(w)
        target = self.consistency_function(self.target, moved, earlier, conditioning)
        return ConsistencyPair(x_t, later, conditioning, target, Spread.of(batch.latents))

    def loss(self, player: str, prepared: ConsistencyPair, draw: Draw) -> Mapping[str, Figure]:  # noqa: ARG002
        """Return the distance of the two values of the consistency function."""
        value = self.consistency_function(self.student, prepared.x_t, prepared.timesteps, prepared.conditioning)
        loss = DISTANCES[self.config.loss](value - prepared.target, self.config.huber_c)
        return {"loss": loss, "x0": Spread.of(value), "reference": prepared.reference}

    def _solved(
        self, teacher: Denoiser, x_t: Tensor, later: Tensor, earlier: Tensor, *, conditioning: Conditioning, w: Tensor | None
    ) -> Tensor:
        """z_hat_n: one guided move of the teacher."""
        unconditional = self.unconditional.to(x_t.device).expand(len(x_t)).with_time_ids(conditioning.time_ids)
        guidance_scale = 1 + (self.config.guidance_w if w is None else w)  # Imagen's scale of LCM's w
        with self.as_teacher():
            return ddim_move(teacher, x_t, later, earlier, conditioning, unconditional=unconditional, guidance_scale=guidance_scale)

    def _told(self, draw: Draw) -> Tensor | None:
        """w of every sample, (B,), where the student is told it."""
        bounds = self.config.guidance_w_range
        return None if bounds is None else draw.uniform("guidance", *bounds)

    def consistency_function(self, network: Denoiser, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """f(x_t, t) = c_skip(t) x_t + c_out(t) x0 of the student or the target network (LCM eq. 9)."""
        x0 = predict(network, x_t, timesteps, conditioning).x0
        return consistency(x0, x_t, boundary_scalings(timesteps, x_t.ndim, self.config.sigma_data, self.config.timestep_scaling))


def squared(difference: Tensor, huber_c: float) -> Tensor:  # noqa: ARG001 - one signature for all distances
    """Mean of d^2."""
    return difference.square().mean()


def pseudo_huber(difference: Tensor, huber_c: float) -> Tensor:
    """Mean of sqrt(d^2 + c^2) - c (arXiv 2310.14189, eq. 6; diffusers' scripts)."""
    return ((difference.square() + huber_c**2).sqrt() - huber_c).mean()


DISTANCES: Mapping[str, Callable[[Tensor, float], Tensor]] = {"l2": squared, "huber": pseudo_huber}
