"""The one training loop. It knows players, steps and checkpoints; losses and networks are the method's."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from schemas.errors import RunFailed
from schemas.training import TrainingConfig
from stages.training.checkpoint import Checkpoints
from stages.training.data import Batches
from stages.training.method import Method
from stages.training.metrics import Row
from stages.training.optimization import Updater
from stages.training.randomness import Draw, derive_seed, deterministic_kernels
from stages.workspace import Workspace

logger = logging.getLogger(__name__)
B = TypeVar("B")
P = TypeVar("P")


def train(
    method: Method[B, P],
    read: Callable[[Sequence[int]], B],  # (indices into the set) -> their batch, on the CPU; called by a thread that reads ahead
    samples: int,  # size of the set
    config: TrainingConfig,  # steps, batch arithmetic, precision, intervals; optimisers and schedules are the players' own
    workspace: Workspace,
    *,
    seed: int,  # of data order and noise
    name: str = "checkpoint",  # of this run's parts; a stage that trains twice gives each its own
) -> list[Row]:
    """Train the method's networks in place, from the newest checkpoint if there is one, and return every step's figures.

    A run killed at any moment and called again ends with the same bits. A finished run called again only loads its last checkpoint, which is kept
    until the artifact exists; so a stage of several runs calls them all, in order, always. On return players with a moving average hold it as
    their weights. Where processes train together (`workspace.parallel`) each calls this with the same arguments: every one holds the networks,
    takes its part of each batch and gets the mean of all gradients; the first saves. Raises `RunFailed`, naming step, player and culprit, when a
    loss or a gradient is not finite.
    """
    assert samples > 0, "an empty set cannot be trained on"
    assert config.batch_size % (config.accumulation_steps * workspace.parallel.world_size) == 0, (
        "the batch must divide into equal micro-batches"
    )

    device, parallel = torch.device(workspace.device), workspace.parallel
    seed = derive_seed(seed, name)  # two runs of one stage share no noise
    updaters = {player: Updater(settings) for player, settings in method.players.items()}
    checkpoints = Checkpoints(workspace, name, method, updaters)
    batches = Batches(
        read, samples, seed=seed, batch_size=config.batch_size, accumulation_steps=config.accumulation_steps, parallel=parallel
    )

    step, rows = checkpoints.resume()  # steps completed, and their figures
    whole = True  # False between the first update of a step and its end, when the weights are those of no completed step
    with closing(batches), deterministic_kernels():
        try:
            while step < config.training_steps:
                row: dict[str, float] = {"step": step + 1}
                draws = [Draw(seed, (step,), positions, device) for positions in batches.positions]
                with torch.no_grad(), autocast(config, device):
                    micro_batches = batches.at(step, config.training_steps)
                    prepared = [method.prepare(batch, draw) for batch, draw in zip(micro_batches, draws, strict=True)]

                for turn, player in enumerate(method.turns(step)):
                    updater = updaters[player]
                    only_trainable(player, updaters)
                    scalars: Mapping[str, Tensor] = {}
                    for micro, (shared, draw) in enumerate(zip(prepared, draws, strict=True)):
                        torch.manual_seed(derive_seed(seed, step, turn, parallel.rank, micro, "dropout"))
                        with autocast(config, device):
                            named = method.loss(player, shared, draw.fold(player, turn))
                        (named["loss"] / len(prepared)).backward()  # type: ignore[no-untyped-call]
                        scalars = add_mean(scalars, named, len(prepared))

                    parallel.average_(updater.gradients().values())
                    scalars = parallel.average_scalars(scalars)
                    grad_norm = updater.grad_norm()
                    figures = to_host({**scalars, "grad_norm": grad_norm})
                    refuse_non_finite(figures, step + 1, player, updater, checkpoints)
                    figures["learning_rate"] = updater.learning_rate
                    row |= {f"{player}.{name}": value for name, value in figures.items()}
                    whole = False
                    updater.update(grad_norm)

                rows.append(row)
                step += 1
                whole = True
                report(step, row, config, workspace)
                if step % config.checkpoint_every == 0 or step == config.training_steps:
                    checkpoints.save(step, rows)
        except RunFailed:
            raise  # a run that fails by itself would fail again from here: the last good checkpoint is the one to go back to
        except BaseException:
            if parallel.leads and whole and step > (checkpoints.newest or 0):
                checkpoints.save(step, rows)
                logger.warning("stopped; the state after step %d is saved, and the same command goes on from there", step)
            raise

    for updater in updaters.values():
        updater.use_average()
    return rows


def autocast(config: TrainingConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Low precision for the operations that bear it; weights stay float32. One context a forward pass: casts are cached until it ends."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if config.precision == "bfloat16" else nullcontext()


def only_trainable(player: str, updaters: Mapping[str, Updater]) -> None:
    """Freeze all players but one: gradients flow through the others' networks, not into them."""
    if len(updaters) > 1:
        for name, updater in updaters.items():
            for parameter in updater.parameters.values():
                parameter.requires_grad_(name == player)


def add_mean(total: Mapping[str, Tensor], named: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Add one of `count` micro-batches' scalars to their mean, on their device."""
    return {name: value.detach().float() / count + total.get(name, 0.0) for name, value in named.items()}


def to_host(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Bring a turn's figures to the host: the one point in it at which the host waits for the device."""
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))


def refuse_non_finite(figures: Mapping[str, float], step: int, player: str, updater: Updater, checkpoints: Checkpoints) -> None:
    """Raise `RunFailed` naming the scalar or the parameter's gradient that is not finite, before it reaches a weight."""
    if all(map(math.isfinite, figures.values())):
        return
    bad_scalars = [f"{name} is {value}" for name, value in figures.items() if name != "grad_norm" and not math.isfinite(value)]
    bad_gradients = [f"the gradient of {name} is not finite" for name, g in updater.gradients().items() if not torch.isfinite(g).all()]
    culprit = [*bad_scalars, *bad_gradients, f"the norm of the gradients is {figures['grad_norm']}"][0]
    kept = "no checkpoint was saved yet" if checkpoints.newest is None else f"the last good checkpoint is that of step {checkpoints.newest}"
    raise RunFailed(f"step {step}, player {player}: {culprit}; {kept}")


def report(step: int, row: Row, config: TrainingConfig, workspace: Workspace) -> None:
    """Tell progress and log."""
    if not workspace.parallel.leads:
        return
    figures = {name: value for name, value in row.items() if name != "step"}
    workspace.progress.update(step, config.training_steps, "steps", figures)
    if step % config.log_every == 0:
        logger.info("step %d/%d%s", step, config.training_steps, "".join(f"  {name} {value:.4g}" for name, value in figures.items()))
