"""Optimisers, learning-rate schedules, clipping and moving averages of one player."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from stages.training.method import Player


def learning_rate(player: Player, update: int) -> float:
    """Rate of an update (0, 1, ...): linear warm-up to the full rate, then the shape; cosine and linear reach zero on the last update."""
    peak = player.optimizer.learning_rate
    if update < player.warmup_steps:
        return peak * (update + 1) / player.warmup_steps
    progress = (update - player.warmup_steps) / max(player.updates - 1 - player.warmup_steps, 1)
    return peak * SHAPES[player.lr_schedule](min(progress, 1.0))


SHAPES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
}
"""Factor of the full rate by progress from 0 (end of the warm-up) to 1 (last update)."""

OPTIMIZERS: Mapping[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class Updater:
    """One player's optimiser, schedule, clipping and average."""

    def __init__(self, player: Player) -> None:
        self.player = player
        self.parameters = dict(player.parameters)
        config = player.optimizer
        self.optimizer = OPTIMIZERS[config.name](
            list(self.parameters.values()), lr=config.learning_rate, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )  # fmt: skip
        self.updates = 0
        """Updates made so far."""
        self.average: dict[str, Tensor] | None = None
        if player.ema_decay is not None:
            self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @property
    def learning_rate(self) -> float:
        """Rate of the next update."""
        return learning_rate(self.player, self.updates)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by parameter name; a parameter that took no part has none."""
        return {name: parameter.grad for name, parameter in self.parameters.items() if parameter.grad is not None}

    def grad_norm(self) -> Tensor:
        """Global L2 norm of the gradients, a scalar on their device. Not finite if any gradient is not."""
        return nn.utils.get_total_norm(list(self.gradients().values()), foreach=True)

    def update(self, grad_norm: Tensor) -> None:
        """Clip, descend, average, and drop the gradients."""
        if self.player.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.player.max_grad_norm, grad_norm, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            assert self.player.ema_decay is not None
            weights = [parameter.detach() for parameter in self.parameters.values()]
            torch._foreach_lerp_(list(self.average.values()), weights, 1 - self.player.ema_decay)
        self.updates += 1

    def optimizer_state(self) -> dict[str, Tensor]:
        """Tensors of the optimiser as `<parameter>/<name>`: step, first and second moment."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `optimizer_state` gave. The moments follow their parameter's device and memory layout."""
        self.optimizer.state.clear()
        for full_name, saved in tensors.items():
            name, key = full_name.rsplit("/", 1)
            parameter = self.parameters[name]
            live = torch.empty_like(parameter, requires_grad=False) if saved.shape == parameter.shape and key != "step" else None
            value = saved.to(parameter.device) if live is None else live.copy_(saved)
            self.optimizer.state[parameter][key] = value

    @torch.no_grad()
    def use_average(self) -> None:
        """Make the average, where there is one, the player's weights: for the end of training."""
        for name, value in (self.average or {}).items():
            self.parameters[name].copy_(value)
