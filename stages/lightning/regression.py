"""Losses with a target and a squared error: the progressive link and the switch to x0."""

from collections.abc import Mapping

from torch.nn.functional import mse_loss

from stages.diffusion.denoiser import predict
from stages.diffusion.solvers import ddim_moves, ddim_step
from stages.lightning.grid import OnStudentGrid, Target, implied_x0
from stages.training import Draw, Figure, Spread
from stages.training.latent_batches import LatentBatch


class ProgressiveLink(OnStudentGrid[Target]):
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
        x0 = implied_x0(self.teacher.schedule, sample.x_t, sample.timesteps[0], target, sample.timesteps[-1])
        return Target(sample, target, Spread.of(x0))

    def loss(self, player: str, prepared: Target, draw: Draw) -> Mapping[str, Figure]:  # noqa: ARG002
        """Return the squared error after the student's one jump."""
        sample = prepared.sample
        x0, eps = predict(self.student, sample.x_t, sample.timesteps[0], sample.conditioning)
        jumped = ddim_step(x0, eps, *self.student.schedule.alpha_sigma(sample.timesteps[-1], x0.ndim))
        return {"loss": mse_loss(jumped, prepared.target), "x0": Spread.of(x0), "reference": prepared.reference}


class SampleSwitch(OnStudentGrid[Target]):
    """The student learns to say x0 where its starting weights say something else (SDXL-Lightning 3.7.3, eq. 27-29).

    L = norm(f_online(x_t, t, c) - (x_t - sqrt(1 - abar_t) f_frozen(x_t, t, c)) / sqrt(abar_t))^2.
    """

    def prepare(self, batch: LatentBatch, draw: Draw) -> Target:
        """Make the frozen network's x0."""
        sample = self.sample(batch, draw)
        x0 = predict(self.teacher, sample.x_t, sample.timesteps[0], sample.conditioning).x0
        return Target(sample, x0, Spread.of(x0))

    def loss(self, player: str, prepared: Target, draw: Draw) -> Mapping[str, Figure]:  # noqa: ARG002
        """Return the squared error of x0."""
        sample = prepared.sample
        x0 = predict(self.student, sample.x_t, sample.timesteps[0], sample.conditioning).x0
        return {"loss": mse_loss(x0, prepared.target), "x0": Spread.of(x0), "reference": prepared.reference}
