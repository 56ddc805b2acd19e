"""The one training loop. It knows players, steps and checkpoints; losses and networks are the method's."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from schemas.errors import RunFailed
from schemas.training import TrainingConfig
from stages.training.alarms import Alarm, non_finite, raised
from stages.training.anchors import Anchors
from stages.training.checkpoint import Checkpoints
from stages.training.data import Batches
from stages.training.events import LiveEvents
from stages.training.figures import add_mean, to_host
from stages.training.method import Method
from stages.training.metrics import Row
from stages.training.optimization import Updater
from stages.training.randomness import Draw, derive_seed, deterministic_kernels
from stages.training.sharding import reduce_gradients, shares_out
from stages.workspace import Workspace

logger = logging.getLogger(__name__)
B = TypeVar("B")
P = TypeVar("P")


class Observer(Protocol):
    """Looks at the networks in training, in the first of several processes, or in all where each holds but a part; it changes nothing of them."""

    @property
    def every(self) -> int:
        """Steps between looks; the last step is always looked at."""
        ...

    def observe(self, step: int, rows: Sequence[Row]) -> Mapping[str, float]:
        """Figures for the row of `step`, the last of `rows`. Networks hold the weights that would be published now."""
        ...


def train(  # noqa: PLR0915 - a loop is read from top to bottom
    method: Method[B, P],
    read: Callable[[Sequence[int]], B],  # (indices into the set) -> their batch, on the CPU; called by a thread that reads ahead
    samples: int,  # size of the set
    config: TrainingConfig,  # steps, batch arithmetic, precision, intervals; optimisers and schedules are the players' own
    workspace: Workspace,
    *,
    seed: int,  # of data order and noise
    name: str = "checkpoint",  # of this run's parts; a stage that trains twice gives each its own
    observer: Observer | None = None,  # looks at the networks at intervals
) -> list[Row]:
    """Train the method's networks in place, from the newest checkpoint if there is one, and return every step's figures.

    A run killed at any moment and called again ends with the same bits. A finished run called again only loads its last checkpoint, which is kept
    until the artifact exists; so a stage of several runs calls them all, in order, always. On return players with a moving average hold it as
    their weights. Where processes train together (`workspace.parallel`) each calls this with the same arguments: every one holds the networks,
    takes its part of each batch and gets the mean of all gradients; the first saves. An alarm, such as a loss or a gradient that is not finite,
    raises `RunFailed` with step and culprit, or takes training back (`config.alarms`); then the rows of the steps taken back stay among the others,
    in the order in which they happened.
    """
    assert samples > 0, "an empty set cannot be trained on"
    assert config.batch_size % (config.accumulation_steps * workspace.parallel.world_size) == 0, (
        "the batch must divide into equal micro-batches"
    )

    device, parallel = torch.device(workspace.device), workspace.parallel
    seed = derive_seed(seed, name)  # two runs of one stage share no noise
    updaters = {player: Updater(settings, share_out=shares_out(config, parallel)) for player, settings in method.players.items()}
    checkpoints = Checkpoints(workspace, name, method, updaters)
    batches = Batches(
        read, samples, seed=seed, batch_size=config.batch_size, accumulation_steps=config.accumulation_steps, parallel=parallel,
        per_step=method.batches_per_step,
    )  # fmt: skip

    step, rows = checkpoints.resume()  # steps completed, and their figures
    anchors = Anchors(checkpoints, config.alarms)
    whole = True  # False between the first update of a step and its end, when the weights are those of no completed step
    with closing(batches), deterministic_kernels(), live_events(workspace, name) as live:
        try:
            while step < config.training_steps:
                anchors.keep(step)
                row: dict[str, float] = {"step": step + 1}
                alarm: Alarm | None = None
                noise = anchors.noise_seed(seed)
                draws = [Draw(noise, (step,), positions, device) for positions in batches.positions]
                with torch.no_grad(), autocast(config, device):
                    read_for_step = batches.at(step, config.training_steps)
                    prepared = [
                        [
                            method.prepare(batch, draw.fold("batch", number) if number else draw)
                            for batch, draw in zip(micro, draws, strict=True)
                        ]
                        for number, micro in enumerate(read_for_step)
                    ]

                for turn, player in enumerate(method.turns(step)):
                    updater = updaters[player]
                    only_trainable(player, updaters)
                    scalars: Mapping[str, Tensor] = {}
                    taken = prepared[min(turn, len(prepared) - 1)]
                    for micro, (shared, draw) in enumerate(zip(taken, draws, strict=True)):
                        reduce_gradients(now=micro == len(taken) - 1)
                        torch.manual_seed(derive_seed(noise, step, turn, parallel.rank, micro, "dropout"))
                        with autocast(config, device):
                            named = method.loss(player, shared, draw.fold(player, turn))
                        (named["loss"] / len(taken)).backward()  # type: ignore[operator,union-attr]
                        scalars = add_mean(scalars, named, len(taken))

                    updater.average_gradients(parallel)
                    scalars = parallel.average_scalars(scalars)
                    grad_norm = updater.grad_norm()
                    figures = to_host({**scalars, "grad_norm": grad_norm})
                    if alarm := non_finite(figures, step + 1, player, updater):
                        break
                    figures["learning_rate"] = updater.learning_rate
                    row |= {f"{player}.{name}": value for name, value in figures.items()}
                    whole = False
                    updater.update(grad_norm)

                rows.append(row)
                step += 1
                if alarm := alarm or raised(rows, config.alarms):
                    row |= alarm.mark
                    whole = False
                    step = anchors.roll_back(alarm, rows)
                    whole = True
                    continue
                if observer is not None and (step % observer.every == 0 or step == config.training_steps):
                    whole = False  # without its figures the row is not complete
                    row |= look(observer, step, rows, updaters.values(), config=config, workspace=workspace)
                whole = True
                report(step, row, config, workspace)
                if live is not None:
                    live.add(row)
                if step % config.checkpoint_every == 0 or step == config.training_steps:
                    checkpoints.save(step, rows)
                    anchors.forget(step)
        except RunFailed:
            raise  # a run that fails by itself would fail again from here: the last good checkpoint is the one to go back to
        except BaseException:
            # Where each process holds a part, one that stops alone cannot save: the last checkpoint is then what is gone on from.
            if parallel.leads and whole and not checkpoints.divided and step > (checkpoints.newest or 0):
                checkpoints.save(step, rows)
                logger.warning("stopped; the state after step %d is saved, and the same command goes on from there", step)
            raise

    for updater in updaters.values():
        updater.use_average()
    return rows


@contextmanager
def live_events(workspace: Workspace, name: str) -> Iterator[LiveEvents | None]:
    """Where this installation watches training, if it does; the first of several processes tells."""
    if workspace.tensorboard is None or not workspace.parallel.leads:
        yield None
        return
    live = LiveEvents(workspace.tensorboard / f"{workspace.lineage.node}-{workspace.identity[:12]}" / name)
    with closing(live):
        yield live


def look(
    observer: Observer, step: int, rows: Sequence[Row], updaters: Iterable[Updater], *, config: TrainingConfig, workspace: Workspace
) -> Mapping[str, float]:
    """The observer's figures; other processes wait for the first, or where it holds but a part of the weights look with it, and get none."""
    figures: Mapping[str, float] = {}
    updaters = list(updaters)
    if workspace.parallel.leads or any(updater.sharded for updater in updaters):
        with ExitStack() as stack, torch.no_grad(), autocast(config, torch.device(workspace.device)):
            for updater in updaters:
                stack.enter_context(updater.averaged())
            figures = observer.observe(step, rows)
    workspace.parallel.wait()
    return figures


def autocast(config: TrainingConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Low precision for the operations that bear it; weights stay float32. One context a forward pass: casts are cached until it ends."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if config.precision == "bfloat16" else nullcontext()


def only_trainable(player: str, updaters: Mapping[str, Updater]) -> None:
    """Freeze all players but one: gradients flow through the others' networks, not into them."""
    if len(updaters) > 1:
        for name, updater in updaters.items():
            for parameter in updater.parameters.values():
                parameter.requires_grad_(name == player)


def report(step: int, row: Row, config: TrainingConfig, workspace: Workspace) -> None:
    """Tell progress and log."""
    if not workspace.parallel.leads:
        return
    figures = {name: value for name, value in row.items() if name != "step"}
    workspace.progress.update(step, config.training_steps, "steps", figures)
    if step % config.log_every == 0:
        shown = "".join(f"  {name} {value:.4g}" for name, value in figures.items() if "_at_" not in name)
        logger.info("step %d/%d%s", step, config.training_steps, shown)
