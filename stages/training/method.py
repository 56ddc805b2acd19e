"""What the loop asks of a method. The loop knows no losses; a method knows no files, ranks or checkpoints."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from torch import Tensor, nn

from schemas.training import OptimizerConfig, TrainingConfig
from stages.training.figures import Figure
from stages.training.randomness import Draw

B = TypeVar("B")
P = TypeVar("P")


@dataclass(frozen=True)
class Player:
    """Parameters that are trained together, and how: a student, a discriminator, a fake denoiser."""

    parameters: Mapping[str, nn.Parameter]
    """By name, as errors name them."""
    optimizer: OptimizerConfig
    updates: int
    """Optimiser steps in the whole run, which the schedule ends with."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    ema_decay: float | None = None
    average: Mapping[str, Tensor] | None = None
    """Tensors in which the moving average is kept, by parameter name, where the method looks at it too: those of a target network. They hold what
    the average begins with. None: the loop has its own, which begin with the parameters."""

    @classmethod
    def of(cls, parameters: Mapping[str, nn.Parameter], optimizer: OptimizerConfig, config: TrainingConfig) -> "Player":
        """A player that follows the section's own settings in everything."""
        return cls(
            parameters=parameters,
            optimizer=optimizer,
            updates=config.training_steps,
            lr_schedule=config.lr_schedule,
            warmup_steps=config.warmup_steps,
            max_grad_norm=config.max_grad_norm,
            ema_decay=config.ema_decay,
        )


Turn = str
"""Name of the player who is updated."""


class Method(ABC, Generic[B, P]):
    """Networks, players and losses. `B` is what the reader of the data returns; `P` what the players of a step share."""

    players: Mapping[str, Player]
    """By name. In a player's turn only its own parameters require gradients."""
    batches_per_step: int = 1
    """Batches that are read for a step. Its turns take one after the other; those that are left when there are no more share the last."""

    @abstractmethod
    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Every network that training changes, by name, as its live tensors by name. Optimisers, averages and position are the loop's."""

    @abstractmethod
    def prepare(self, batch: B, draw: Draw) -> P:
        """Compute once what all players of a step need of a micro-batch: noisy samples, the teacher's targets. Runs without gradients."""

    @abstractmethod
    def loss(self, player: str, prepared: P, draw: Draw) -> Mapping[str, Figure]:
        """Return named figures of a micro-batch: `loss`, a scalar, is the one to descend, the others are logged."""

    def turns(self, step: int) -> Sequence[Turn]:  # noqa: ARG002 - for methods in which players do not take turns evenly
        """Players to update in a step (0, 1, ...), in order; a name may come more than once."""
        return tuple(self.players)
