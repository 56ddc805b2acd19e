"""Anchors: whole states at steps that the recipe fixes, to which an alarm takes training back. Checkpoints lie where a machine is killed; these do
not, so that where a run goes back to is a function of the recipe alone."""

import logging

from infra.store import Part
from schemas.errors import RunFailed
from schemas.watching import Alarms
from stages.training.alarms import Alarm
from stages.training.checkpoint import Checkpoints
from stages.training.metrics import Row
from stages.training.randomness import derive_seed

logger = logging.getLogger(__name__)


class Anchors:
    """The anchors of one run of the loop, as parts `<name>.anchor-00000500`. None are kept where alarms stop the run."""

    def __init__(self, checkpoints: Checkpoints, alarms: Alarms) -> None:
        """Made after the newest checkpoint was loaded."""
        self.checkpoints, self.alarms, self.workspace = checkpoints, alarms, checkpoints.workspace
        self.rolls_back = alarms.action == "roll_back"
        self._checkpoint: int | None = None
        self._lower_rates()

    def keep(self, step: int) -> None:
        """Keep the state after `step` steps where it is one to go back to. Only the first of several processes writes."""
        if not self.rolls_back or step % self.alarms.anchor_every:
            return
        name = self._name(step)
        note = {"step": step, "roll_backs": self.checkpoints.roll_backs}
        # Where it takes all processes to save, all do it again rather than each deciding for itself.
        if self.checkpoints.divided or not any(part.name == name and part.note == note for part in self._parts()):
            self.checkpoints.write(name, step, [])

    def forget(self, step: int) -> None:
        """Delete the anchors that no alarm can ask for, now that the state after `step` steps is saved.

        An alarm at a later step looks back `alarms.longest` steps; and a run may have to go on from the checkpoint before the newest.
        """
        before, self._checkpoint = self._checkpoint, step
        if not self.rolls_back or before is None or not self.workspace.parallel.leads:
            return
        every = self.alarms.anchor_every
        needed = max(before + 1 - self.alarms.longest, 0) // every * every
        self.workspace.delete_parts([part.name for part in self._parts() if part.name < self._name(needed)])

    def noise_seed(self, seed: int) -> int:
        """The seed of a step's noise: another after each roll-back, for the same numbers would lead to the same alarm."""
        return derive_seed(seed, "roll-back", self.checkpoints.roll_backs) if self.checkpoints.roll_backs else seed

    def roll_back(self, alarm: Alarm, rows: list[Row]) -> int:
        """Take training back to the newest anchor before the alarm's first bad step, with lower rates, and return its step.

        Raises `RunFailed` where alarms stop the run, or after too many roll-backs.
        """
        done, most = self.checkpoints.roll_backs, self.alarms.max_roll_backs
        if not self.rolls_back:
            raise RunFailed(f"{self._sentence(alarm)}; {self._kept()}; {alarm.remedy}, or set alarms.action: roll_back")
        if done >= most:
            raise RunFailed(f"{self._sentence(alarm)}, after {done} roll-backs (alarms.max_roll_backs); {alarm.remedy}")
        self.workspace.parallel.wait()
        earlier = [part for part in self._parts() if part.name < self._name(alarm.first_bad)]
        if not earlier:
            raise RunFailed(
                f"{self._sentence(alarm)}; no anchor of an earlier step is left: delete this stage's parts to train it from the start"
            )
        step, _ = self.checkpoints.read(earlier[-1])
        self.checkpoints.roll_backs = done + 1
        self._lower_rates()
        for updater in self.checkpoints.updaters.values():
            updater.drop_gradients()  # those that raised the alarm
        self._checkpoint = None
        self.checkpoints.restart(step, rows)
        logger.warning(
            "%s: back to step %d, learning rates times %g (roll-back %d of %d)",
            self._sentence(alarm), step, self.alarms.rate_factor ** (done + 1), done + 1, most,
            extra={"alarm": alarm.name} if self.workspace.parallel.leads else None,
        )  # fmt: skip
        return step

    def _lower_rates(self) -> None:
        for updater in self.checkpoints.updaters.values():
            updater.rate_factor = self.alarms.rate_factor**self.checkpoints.roll_backs

    def _parts(self) -> list[Part]:
        return [part for part in self.workspace.parts() if part.name.rpartition("-")[0] == f"{self.checkpoints.name}.anchor"]

    def _name(self, step: int) -> str:
        return f"{self.checkpoints.name}.anchor-{step:08d}"

    def _sentence(self, alarm: Alarm) -> str:
        return f"step {alarm.step}, {'' if alarm.name == 'non_finite' else f'alarm {alarm.name}: '}{alarm.said}"

    def _kept(self) -> str:
        newest = self.checkpoints.newest
        return "no checkpoint was saved yet" if newest is None else f"the last good checkpoint is that of step {newest}"
