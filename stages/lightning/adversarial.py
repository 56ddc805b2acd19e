"""The adversarial objective: the student's jump shall be taken for the teacher's (SDXL-Lightning, arXiv 2402.13929, 3.2 to 3.4 and 3.7)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from schemas.adversarial import AdversarialConfig
from schemas.lightning import LinkConfig
from stages.diffusion.denoiser import Denoiser, Prediction, predict
from stages.diffusion.discriminator import Discriminator, discriminator_loss, generator_loss
from stages.diffusion.schedule import CLEAN, NoiseSchedule, append_dims
from stages.diffusion.solvers import ddim_moves, ddim_step
from stages.lightning.grid import NoisySample, OnStudentGrid, implied_x0
from stages.students import Student
from stages.training import Draw, Figure, Player, Spread
from stages.training.figures import shares_by_value
from stages.training.latent_batches import LatentBatch

STUDENT, DISCRIMINATOR = "student", "discriminator"


@dataclass(frozen=True, eq=False)
class Judged:
    """What the discriminator compares: the teacher's result, and how the student's is brought to the same noise level."""

    sample: NoisySample
    real: Tensor
    """x_{t-ns} of the teacher; with re-noising, its prediction of x0 noised to t*. (B, C, h, w) float32."""
    level: Tensor
    """Timestep of `real`: t - ns or t*, (B,) long."""
    eps: Tensor | None
    """eps* of the re-noising (B, C, h, w); None where there is none."""
    reference: Spread
    """Of the teacher's x0: that which is re-noised, or else the one that a student says whose jump ends where the teacher does."""


class AdversarialLink(OnStudentGrid[Judged]):
    """L_D = -log p - log(1 - p^), L_G = -log p^ (eq. 18, 19): non-saturating, no reconstruction term.

    p is the discriminator's answer to the teacher's x_{t-ns}, p^ to the student's; the two players take turns on the same batch, discriminator first.
    """

    def __init__(
        self,
        config: LinkConfig,
        *,
        teacher: Denoiser,
        student: Student,
        discriminator: Discriminator[Any],
    ) -> None:
        super().__init__(config, teacher=teacher, student=student)
        assert config.adversarial is not None, "an adversarial link"
        self.adversarial: AdversarialConfig = config.adversarial
        self.discriminator = discriminator
        judged = Player.of(
            dict(discriminator.named_parameters()), self.adversarial.optimizer, config.model_copy(update={"ema_decay": None})
        )
        self.players = {DISCRIMINATOR: judged, **self.players}
        levels = self.adversarial.renoise_timesteps or sorted(set(self._moves[:, -1].tolist()))
        self._judged_at = {level: "clean" if level == CLEAN else str(level) for level in levels}
        self._late_from = config.training_steps * (1 - self.adversarial.late_fraction)

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Student and discriminator; the teacher does not change."""
        return {**super().state(), DISCRIMINATOR: {name: tensor.detach() for name, tensor in self.discriminator.state_dict().items()}}

    def prepare(self, batch: LatentBatch, draw: Draw) -> Judged:
        """Make the teacher's x_{t-ns}, without guidance, at the noise level at which it is judged."""
        sample = self.sample(batch, draw)
        before = ddim_moves(self.teacher, sample.x_t, sample.timesteps[:-1], sample.conditioning)
        last, end = sample.timesteps[-2:]
        x0, eps = predict(self.teacher, before, last, sample.conditioning)
        arrived = append_dims(last == end, before.ndim)
        schedule = self.teacher.schedule
        if not self.adversarial.renoise_timesteps:
            moved = ddim_step(x0, eps, *schedule.alpha_sigma(end, x0.ndim, x0.dtype))
            real = torch.where(arrived, before, moved)
            return Judged(sample, real, end, None, Spread.of(implied_x0(schedule, sample.x_t, sample.timesteps[0], real, end)))
        level = self._levels(draw)
        fresh = draw.normal("renoise", before.shape[1:])
        clean = torch.where(arrived, before, x0)
        return Judged(sample, schedule.add_noise(clean, fresh, level), level, fresh, Spread.of(clean))

    def loss(self, player: str, prepared: Judged, draw: Draw) -> Mapping[str, Figure]:  # noqa: ARG002
        """Return the player's loss, and what tells whether the game goes well."""
        sample = prepared.sample
        if player == STUDENT:
            predicted = predict(self.student, sample.x_t, sample.timesteps[0], sample.conditioning)
            loss = generator_loss(self._logits(self._fake(prepared, predicted), prepared))
            return {"loss": loss, "x0": Spread.of(predicted.x0), "reference": prepared.reference}
        with torch.no_grad():
            fake = self._fake(prepared, predict(self.student, sample.x_t, sample.timesteps[0], sample.conditioning))
        real_logits, fake_logits = self._logits(torch.cat([prepared.real, fake]), prepared).chunk(2)
        figures: dict[str, Figure] = {"loss": discriminator_loss(real_logits, fake_logits)}
        for name, right in (("real_accuracy", real_logits > 0), ("fake_accuracy", fake_logits < 0)):
            figures |= {name: right.float().mean(), **shares_by_value(name, prepared.level, self._judged_at, right)}
        return figures

    def _levels(self, draw: Draw) -> Tensor:
        """t* of every sample, drawn by the weights that hold at this step."""
        late = isinstance(step := draw.key[0], int) and step >= self._late_from
        weights = torch.tensor(self.adversarial.late_renoise_weights if late else self.adversarial.renoise_weights)
        bounds = (weights / weights.sum()).cumsum(0)[:-1].to(draw.device)
        return torch.tensor(self.adversarial.renoise_timesteps, device=draw.device)[
            torch.bucketize(draw.uniform("level"), bounds, right=True)
        ]

    def _fake(self, prepared: Judged, student: Prediction) -> Tensor:
        """The student's result at the noise level of the real one."""
        schedule: NoiseSchedule = self.student.schedule
        if prepared.eps is not None:
            return schedule.add_noise(student.x0, prepared.eps, prepared.level)
        return ddim_step(*student, *schedule.alpha_sigma(prepared.level, student.x0.ndim, student.x0.dtype))

    def _logits(self, x_s: Tensor, prepared: Judged) -> Tensor:
        """Logits of x_s, the batch once or, real and fake, twice."""
        sample = prepared.sample
        level = prepared.level.repeat(len(x_s) // len(prepared.level))
        logits: Tensor = self.discriminator(x_s, level, sample.x_t, sample.timesteps[0], sample.conditioning)
        return logits
