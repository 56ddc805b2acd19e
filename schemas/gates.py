"""Quality gates: what an artifact must be like for the chain to go on."""

from collections.abc import Iterator
from typing import Annotated

from schemas.base import Field, Mistake, Model, PositiveInt

GateName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
"""Lower case, digits, dashes."""

LOSS = "loss"
"""Metric of a student's training that its artifact's table holds: the student's loss, the mean of the last tenth of the steps."""


class Gate(Model):
    """An entry of `gates`: a figure of a stage run's artifact, and its bounds. Looked at as soon as the artifact is there; where it is not met, no
    later stage is started."""

    after: str
    """Stage run, such as `evaluate`, `select` or `lightning-8-4`."""
    metric: str
    """After `evaluate`: a score of its report, such as `fid_teacher`. After the training of a student: `loss`, its mean over the last tenth of the
    steps, or with `watch` `best_fid`. After any stage: a number that its artifact tells, such as `images` of `select`."""
    student: str | None = None
    """After `evaluate`: the run whose score it is, such as `lightning-8-4`; or `teacher`."""
    steps: PositiveInt | None = None
    """After `evaluate`: in how many steps."""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def bound(self) -> str:
        """The bounds in words."""
        bounds = {"at least": self.at_least, "at most": self.at_most}
        return " and ".join(f"{words} {value:g}" for words, value in bounds.items() if value is not None)

    @property
    def what(self) -> str:
        """The figure in words."""
        return self.metric if self.student is None else f"{self.metric} of {self.student} in {self.steps} steps"

    def is_met_by(self, value: float) -> bool:
        """Whether the figure is within the bounds; one that is not a number is not."""
        low = float("-inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return low <= value <= high


def _there_is_a_bound(gate: Gate) -> Iterator[Mistake]:
    if gate.at_most is None and gate.at_least is None:
        yield ("at_most",), None, "a gate that everything passes: expected a number here, or in at_least"
    elif gate.at_most is not None and gate.at_least is not None and gate.at_least > gate.at_most:
        yield ("at_least",), gate.at_least, f"nothing passes: expected at most at_most = {gate.at_most:g}"


def _rows_are_of_evaluate(gate: Gate) -> Iterator[Mistake]:
    for name in ("student", "steps"):
        value = getattr(gate, name)
        if gate.after == "evaluate" and value is None:
            example = "a run, such as lightning-8-4, or teacher" if name == "student" else "its number of steps"
            yield (name,), None, f"a score is of one row of the report: expected {example}"
        elif gate.after != "evaluate" and value is not None:
            yield (name,), value, "only evaluate has a row for each student and number of steps: expected nothing here"


Gate.cross_checks = (_there_is_a_bound, _rows_are_of_evaluate)
