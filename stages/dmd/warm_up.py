"""The generator learns where the teacher's sampler ends, before distributions are matched (DMD2, one-step SDXL)."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import mse_loss

from schemas.dmd import DmdConfig
from stages.dmd.batches import DmdBatch, PairBatch
from stages.dmd.generator import generate
from stages.students import Student
from stages.training import Draw, Figure, Method, Player, Spread


class PairRegression(Method[DmdBatch, DmdBatch]):
    """norm(G(z_ref) - y_ref)^2 on latents of pairs."""

    def __init__(self, config: DmdConfig, student: Student) -> None:
        """`config` with the warm-up's own steps and rate."""
        self.config, self.student = config, student.denoiser
        self.players = {"student": Player.of(student.parameters, config.optimizer, config)}
        self._tensors = student.tensors

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The student."""
        return {"student": self._tensors}

    def prepare(self, batch: DmdBatch, draw: Draw) -> DmdBatch:
        """Nothing but the batch."""
        return batch.to(draw.device)

    def loss(self, player: str, prepared: DmdBatch, draw: Draw) -> Mapping[str, Figure]:  # noqa: ARG002
        """Return the squared error of x0."""
        pairs = prepared.pairs
        assert isinstance(pairs, PairBatch), "the warm-up reads pairs"
        x0 = generate(self.student, pairs.noise, self.config.timestep, prepared.conditioning)
        return {"loss": mse_loss(x0, pairs.outputs), "x0": Spread.of(x0), "reference": Spread.of(pairs.outputs)}
