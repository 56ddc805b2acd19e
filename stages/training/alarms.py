"""Alarms: what in the figures of the last steps says that training has gone wrong. Functions of the rows alone, so that nothing of them is saved."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from schemas.watching import Alarms
from stages.training.metrics import Row
from stages.training.optimization import Updater
from stages.training.sharding import whole

logger = logging.getLogger(__name__)

COLUMN = "alarm."
"""What the name of an alarm's column begins with; 1 in the row of the step that raised it."""

COIN = 2 * math.log(2)
"""Loss of a discriminator that cannot tell real from fake: -log 1/2 twice."""
_COIN_MARGIN = 0.01


@dataclass(frozen=True)
class Alarm:
    """Why training cannot go on from where it is."""

    name: str
    step: int
    """The step that raised it, 1 for the first."""
    first_bad: int
    """The first of the steps for which it was raised."""
    said: str
    """What was found, as part of a sentence."""
    remedy: str

    @property
    def mark(self) -> dict[str, float]:
        """What the step's row says of it."""
        return {COLUMN + self.name: 1.0}


@dataclass(frozen=True)
class RollBack:
    """An alarm that training went on from."""

    name: str
    step: int
    back_to: int
    """The step whose state was taken up again."""


def roll_backs(rows: Sequence[Row]) -> list[RollBack]:
    """Every alarm that training went on from, of figures in the order in which they happened."""
    found = []
    for row, following in pairwise(rows):
        names = [name.removeprefix(COLUMN) for name in row if name.startswith(COLUMN)]
        if names:
            found.append(RollBack(names[0], int(row["step"]), int(following["step"]) - 1))
    return found


def non_finite(figures: Mapping[str, float], step: int, player: str, updater: Updater) -> Alarm | None:
    """The alarm of a turn whose figures are not all finite, naming the scalar or the parameter's gradient, before it reaches a weight."""
    if all(map(math.isfinite, figures.values())):
        return None
    bad_scalars = [f"{name} is {value}" for name, value in figures.items() if name != "grad_norm" and not math.isfinite(value)]
    bad_gradients = [
        f"the gradient of {name} is not finite" for name, g in updater.gradients().items() if not torch.isfinite(whole(g)).all()
    ]
    culprit = [*bad_scalars, *bad_gradients, f"the norm of the gradients is {figures['grad_norm']}"][0]
    return Alarm("non_finite", step, step, f"player {player}: {culprit}", "lower the learning rate, or clip gradients (max_grad_norm)")


def raised(rows: Sequence[Row], alarms: Alarms) -> Alarm | None:
    """The alarm that the last row raises, if any. Rows of steps that were taken back count for nothing."""
    step = int(rows[-1]["step"])
    for name, steps, bad, remedy in _watched(alarms):
        if _streak(rows, bad, steps):
            said = f"{bad(rows[-1])} for {steps} steps in a row"
            return Alarm(name, step, step - steps + 1, said, remedy)
    if alarms.saturated_steps is not None and step % alarms.saturated_steps == 0 and _streak(rows, _tells_nothing, alarms.saturated_steps):
        logger.warning("step %d: %s for %d steps in a row", step, _tells_nothing(rows[-1]), alarms.saturated_steps)
    return None


Bad = Callable[[Row], str]
"""What is wrong with a row, with its figures; an empty text where nothing is."""


def _watched(alarms: Alarms) -> Iterator[tuple[str, int, Bad, str]]:
    """Name, steps in a row, what makes a row bad, and what helps."""
    if alarms.saturated_steps is not None:
        remedy = "lower the discriminator's learning rate against the student's"
        yield "saturated", alarms.saturated_steps, lambda row: _saturated(row, alarms.saturated_accuracy), remedy
    remedy = "lower the learning rates"
    if (band := alarms.latent_std_band) is not None:
        yield "latent_std", alarms.patience, lambda row: _out_of_band(row, *band), remedy
    if (drift := alarms.latent_mean_drift) is not None:
        yield "latent_mean", alarms.patience, lambda row: _drifted(row, drift), remedy


def _streak(rows: Sequence[Row], bad: Bad, steps: int) -> bool:
    """Whether the last `steps` rows are bad, and of successive steps: what came before a roll-back is another run's."""
    last = rows[-steps:]
    follows = len(last) == steps and int(last[-1]["step"]) - int(last[0]["step"]) == steps - 1
    return follows and bool(bad(last[-1])) and all(bad(row) for row in last)


def _saturated(row: Row, threshold: float) -> str:
    real, fake = _figure(row, "real_accuracy"), _figure(row, "fake_accuracy")
    if real is None or fake is None or min(real, fake) < threshold:
        return ""
    return f"the discriminator is right about {real:.1%} of the real and {fake:.1%} of the fake samples (saturated_accuracy {threshold:g})"


def _out_of_band(row: Row, low: float, high: float) -> str:
    own, reference = _figure(row, "x0_std"), _figure(row, "reference_std")
    if own is None or reference is None or low * reference <= own <= high * reference:
        return ""
    return f"the deviation of the student's latents is {own:.4g}, the reference's {reference:.4g} (latent_std_band {low:g} to {high:g})"


def _drifted(row: Row, drift: float) -> str:
    own, reference, std = (_figure(row, name) for name in ("x0_mean", "reference_mean", "reference_std"))
    if own is None or reference is None or std is None or abs(own - reference) <= drift * std:
        return ""
    return f"the mean of the student's latents is {own:.4g}, the reference's {reference:.4g} +- {std:.4g} (latent_mean_drift {drift:g})"


def _tells_nothing(row: Row) -> str:
    loss = _figure(row, "loss", of="discriminator")
    if loss is None or abs(loss - COIN) > _COIN_MARGIN:
        return ""
    return f"the discriminator's loss is {loss:.4g}, that of a coin (2 log 2): it tells real from fake no better"


def _figure(row: Row, name: str, of: str = "") -> float | None:
    """The figure of this name of whichever player has it."""
    return next((value for key, value in row.items() if key.endswith(f"{of}.{name}")), None)
