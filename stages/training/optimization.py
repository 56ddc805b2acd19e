"""Optimisers, learning-rate schedules, clipping and moving averages of one player."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.optim import ZeroRedundancyOptimizer

from stages.ranks import Parallel
from stages.training.method import Player
from stages.training.sharding import fill_, is_sharded, local, whole


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

    def __init__(self, player: Player, *, share_out: bool = False) -> None:
        """`share_out`: each of several processes keeps the moments of some parameters, updates these and sends them to the others (ZeRO stage 1)."""
        self.player = player
        self.parameters = dict(player.parameters)
        config = player.optimizer
        settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps, "fused": True}
        settings["weight_decay"] = config.weight_decay
        kind, parameters = OPTIMIZERS[config.name], list(self.parameters.values())
        self.optimizer = ZeroRedundancyOptimizer(parameters, kind, **settings) if share_out else kind(parameters, **settings)
        # ZeRO's own way to a checkpoint pickles the moments of all processes at once; they are taken from where each process holds its own.
        self._own = self.optimizer.optim if isinstance(self.optimizer, ZeroRedundancyOptimizer) else self.optimizer
        self.sharded = any(map(is_sharded, parameters))
        """Whether this process holds but a part of the weights."""
        self.divided = share_out or self.sharded
        """Whether this process holds but a part of weights or moments."""
        self.updates = 0
        """Updates made so far."""
        self.rate_factor = 1.0
        """What the schedule's rate is multiplied by."""
        self.average: dict[str, Tensor] | None = None
        if player.ema_decay is not None:
            own = player.average
            self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()} if own is None else dict(own)

    @property
    def learning_rate(self) -> float:
        """Rate of the next update."""
        return self.rate_factor * learning_rate(self.player, self.updates)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by parameter name; a parameter that took no part has none."""
        return {name: parameter.grad for name, parameter in self.parameters.items() if parameter.grad is not None}

    def average_gradients(self, parallel: Parallel) -> None:
        """Make gradients those of the global batch. Sharded ones already are: the backward pass has averaged them."""
        parallel.average_(gradient for gradient in self.gradients().values() if not is_sharded(gradient))

    def grad_norm(self) -> Tensor:
        """Global L2 norm of the gradients, a scalar on their device. Not finite if any gradient is not."""
        return whole(nn.utils.get_total_norm(list(self.gradients().values()), foreach=True))

    def update(self, grad_norm: Tensor) -> None:
        """Clip, descend, average, and drop the gradients."""
        if self.player.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.player.max_grad_norm, grad_norm, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        # Fused kernels and ZeRO's broadcasts change weights without a word, and what was made of them (`lora_merged`) would be taken for current.
        increment_version([parameter for parameter in self.parameters.values() if not is_sharded(parameter)])
        self.drop_gradients()
        if self.average is not None:
            assert self.player.ema_decay is not None
            weights = [local(parameter.detach()) for parameter in self.parameters.values()]
            torch._foreach_lerp_([local(value) for value in self.average.values()], weights, 1 - self.player.ema_decay)
        self.updates += 1

    def drop_gradients(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Tensors of the optimiser that lie in this process, as `<parameter>/<name>`: step, first and second moment."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self._own.state.get(parameter, {}).items()
        }

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `optimizer_state` gave in all processes, whole. The moments follow their parameter's device, layout and division."""
        own = {parameter for group in self._own.param_groups for parameter in group["params"]}
        self._own.state.clear()
        for full_name, saved in tensors.items():
            name, key = full_name.rsplit("/", 1)
            parameter = self.parameters[name]
            if parameter in own:
                follows = saved.shape == parameter.shape and key != "step"
                live = torch.empty_like(parameter, requires_grad=False) if follows else torch.empty_like(saved, device=parameter.device)
                fill_(live, saved)
                self._own.state[parameter][key] = live

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The average, where there is one, in place of the weights for the length of the block."""
        weights = {name: self.parameters[name].detach().clone() for name in self.average or {}}
        self.use_average()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in weights.items():
                    self.parameters[name].copy_(value)

    @torch.no_grad()
    def use_average(self) -> None:
        """Make the average, where there is one, the player's weights: for the end of training."""
        for name, value in (self.average or {}).items():
            self.parameters[name].copy_(value)
