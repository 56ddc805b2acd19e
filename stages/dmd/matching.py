"""Distribution matching distillation: generator and fake score (DMD, arXiv 2311.18828), with a discriminator and several steps as in DMD2
(arXiv 2405.14867)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from schemas.dmd import DmdConfig
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import Denoiser, predict
from stages.diffusion.discriminator import generator_loss
from stages.diffusion.prediction import wide
from stages.dmd.batches import DmdBatch
from stages.dmd.generator import drawn_input, generate
from stages.dmd.losses import matching_gradient, matching_loss
from stages.students import Student
from stages.training import Draw, Figure, Method, Player, Spread

STUDENT, FAKE_SCORE, DISCRIMINATOR = "student", "fake_score", "discriminator"

Distance = Callable[[Tensor, Tensor], Tensor]
"""Mean distance, a scalar, of latents (B, C, h, w) to others, with a gradient for the first."""


class Judge(Protocol):
    """A head on the fake score's bottleneck."""

    @property
    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """The head's own, by name."""
        ...

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The live tensors of the head that a checkpoint must hold."""
        ...

    def __call__(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Logits (B,) of being real of x_t (B, C, h, w) at timesteps (B,) long."""
        ...


class DistributionMatching(Method[DmdBatch, DmdBatch]):
    """The student G is drawn along -(s_real - s_fake), to where outputs are likelier under the teacher than under G itself.

    In each step the fake score has `fake_updates` turns, each on new outputs of G, so that it knows G before the student has its turn; in the papers
    it comes after, on the outputs that the student's turn has made: the same sequence but for where it begins. Each of these turns has captions,
    pairs and pictures of its own batch (DMD2 4.2), the student's those of the last; all have noise of their own.
    """

    def __init__(
        self,
        config: DmdConfig,
        *,
        teacher: Denoiser,
        student: Student,
        fake: Student,
        unconditional: Conditioning | None = None,
        distance: Distance | None = None,
        judge: Judge | None = None,
        as_teacher: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`unconditional` (1, ...) for guidance of the real score, `distance` for regression, `judge` for the GAN. `as_teacher` makes a network that
        the student shares the teacher while it is open."""
        self.config, self.teacher, self.student, self.fake = config, teacher, student.denoiser, fake.denoiser
        self.unconditional, self.distance, self.judge, self.as_teacher = unconditional, distance, judge, as_teacher
        parameters = {**fake.parameters, **({f"{DISCRIMINATOR}.{name}": p for name, p in judge.parameters.items()} if judge else {})}
        fake_player = Player.of(parameters, config.fake, config.model_copy(update={"ema_decay": None}))
        self.players = {
            FAKE_SCORE: replace(fake_player, updates=config.fake_updates * config.training_steps),
            STUDENT: Player.of(student.parameters, config.optimizer, config),
        }
        self.batches_per_step = config.fake_updates if config.follows else 1
        self._tensors = {STUDENT: student.tensors, FAKE_SCORE: fake.tensors} | ({DISCRIMINATOR: judge.tensors} if judge else {})
        steps = teacher.schedule.num_train_timesteps
        self._lowest, self._highest = (round(share * steps) for share in config.noise_range)
        self._highest = min(self._highest, steps - 1)

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Student, fake score and the head on it; the teacher does not change."""
        return self._tensors

    def turns(self, step: int) -> Sequence[str]:  # noqa: ARG002
        """The fake score's updates, where it follows the student, then the student's."""
        return (*(FAKE_SCORE,) * (self.config.fake_updates if self.config.follows else 0), STUDENT)

    def prepare(self, batch: DmdBatch, draw: Draw) -> DmdBatch:
        """Nothing is shared by the turns but the batch."""
        return batch.to(draw.device)

    def loss(self, player: str, prepared: DmdBatch, draw: Draw) -> Mapping[str, Figure]:
        """Return the player's loss and its parts."""
        return self._student_loss(prepared, draw) if player == STUDENT else self._fake_loss(prepared, draw)

    def real_x0(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """mu_real: the teacher's guided prediction of x0."""
        unconditional = None
        if self.config.guidance_scale > 1:
            assert self.unconditional is not None, "guidance needs an unconditional"
            unconditional = self.unconditional.to(x_t.device).expand(len(x_t)).with_time_ids(conditioning.time_ids)
        with self.as_teacher():
            scale = self.config.guidance_scale
            return predict(self.teacher, x_t, timesteps, conditioning, unconditional=unconditional, guidance_scale=scale).x0

    @torch.no_grad()
    def gradient(self, x: Tensor, eps: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Algorithm 2's gradient (B, C, h, w) at x noised with eps to timesteps (B,)."""
        x_t = self.teacher.schedule.add_noise(x, eps, timesteps)
        x0_fake = predict(self.fake, x_t, timesteps, conditioning).x0
        return matching_gradient(x, x0_fake, self.real_x0(x_t, timesteps, conditioning))

    def outputs(self, prepared: DmdBatch, draw: Draw) -> tuple[Tensor, Conditioning]:
        """G on fresh noise, (B, C, h, w), and where there are pairs on theirs behind it, (2 B, C, h, w): the outputs that all losses are of.

        Regression alone is of the pairs' only.
        """
        conditioning = prepared.conditioning
        x_t, timestep = drawn_input(self.student, self.config.timesteps, prepared.shape, conditioning, draw)
        if not self.config.follows and prepared.pairs is not None:
            x_t = prepared.pairs.noise
        elif prepared.pairs is not None:
            x_t, conditioning = torch.cat([x_t, prepared.pairs.noise]), Conditioning.cat([conditioning, conditioning])
        return generate(self.student, x_t, timestep, conditioning), conditioning

    def _student_loss(self, prepared: DmdBatch, draw: Draw) -> Mapping[str, Figure]:
        x, conditioning = self.outputs(prepared, draw)
        loss, figures = x.new_zeros(()), dict[str, Figure]()
        if self.config.matching:
            eps, timesteps = self._noise(x, draw, "matched", self._lowest, self._highest)
            figures["matching"] = loss = matching_loss(x, self.gradient(x.detach(), eps, timesteps, conditioning))
        if self.distance is not None and prepared.pairs is not None and self.config.regression is not None:
            figures["regression"] = regression = self.distance(x[-len(prepared.pairs.noise) :], prepared.pairs.outputs)
            loss = loss + self.config.regression.weight * regression
        if self.judge is not None and self.config.gan is not None:
            figures["adversarial"] = adversarial = generator_loss(self._judged(x, conditioning, draw, "judged"))
            loss = loss + self.config.gan.generator_weight * adversarial
        return {"loss": loss, **figures, "x0": Spread.of(x), "reference": Spread.of(prepared.reference)}

    def _fake_loss(self, prepared: DmdBatch, draw: Draw) -> Mapping[str, Figure]:
        with torch.no_grad():
            x, conditioning = self.outputs(prepared, draw)
        schedule, prediction = self.fake.schedule, self.fake.prediction
        eps, timesteps = self._noise(x, draw, "denoised", 0, schedule.num_train_timesteps - 1)
        target = prediction.from_x0_eps(x, eps, *schedule.alpha_sigma(timesteps, x.ndim, x.dtype))
        denoising = mse_loss(wide(self.fake(schedule.add_noise(x, eps, timesteps), timesteps, conditioning)), target)
        if self.judge is None or self.config.gan is None or prepared.real is None:
            return {"loss": denoising}
        fake = self._judged(x, conditioning, draw, "judged-fake")
        real = self._judged(prepared.real.latents, prepared.real.conditioning, draw, "judged-real")
        adversarial = generator_loss(real) + generator_loss(-fake)  # softplus of both signs, each a mean: they may differ in number
        return {
            "loss": denoising + self.config.gan.discriminator_weight * adversarial,
            "denoising": denoising,
            "adversarial": adversarial,
            "real_accuracy": (real > 0).float().mean(),
            "fake_accuracy": (fake < 0).float().mean(),
        }

    def _judged(self, x: Tensor, conditioning: Conditioning, draw: Draw, purpose: str) -> Tensor:
        """Logits of x noised to a timestep of the full range (DMD2 4.3)."""
        assert self.judge is not None
        eps, timesteps = self._noise(x, draw, purpose, 0, self.fake.schedule.num_train_timesteps - 1)
        return self.judge(self.fake.schedule.add_noise(x, eps, timesteps), timesteps, conditioning)

    def _noise(self, x: Tensor, draw: Draw, purpose: str, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
        """Noise like x and timesteps of lowest..highest, (B or 2 B,): each sample and each pair has its own."""
        draws = [draw.fold(purpose, part) for part in range(len(x) // len(draw.positions))]
        eps = torch.cat([one.normal("eps", x.shape[1:]) for one in draws]).to(x.dtype)
        return eps, lowest + torch.cat([one.integers("timestep", highest - lowest + 1) for one in draws])
