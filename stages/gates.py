"""Quality gates: whether their figures can be had, told before any work, and what the figures are once an artifact is there."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from infra.store import ArtifactStore
from schemas.base import Model
from schemas.dmd import DmdConfig
from schemas.errors import BadInput, GateNotMet
from schemas.evaluation import EvaluateConfig
from schemas.gates import LOSS, Gate
from schemas.lcm import LcmConfig
from schemas.lightning import LinkConfig
from schemas.loading import shown
from schemas.manifest import Content, Evaluation, Manifest
from schemas.training import StudentTraining
from stages.plan import Node
from stages.registry import stage

logger = logging.getLogger(__name__)

TEACHER = "teacher"
"""In the place of a student: the teacher's own rows."""

_LAST_SHARE = 10
"""The loss is the mean of the last step in so many."""


@dataclass(frozen=True)
class Verdict:
    """What became of a gate."""

    name: str
    gate: Gate
    value: float
    """NaN where the artifact does not tell the figure."""
    artifact: str
    """Identity of the artifact that was looked at."""
    report: str | None
    """File of the artifact to look into."""

    @property
    def met(self) -> bool:
        """Whether the chain may go on."""
        return self.gate.is_met_by(self.value)

    @property
    def sentence(self) -> str:
        """Figure, bound, and where to look."""
        said = f"gate {self.name} after {self.gate.after}: {self.gate.what} is {self.value:.6g}, expected {self.gate.bound}"
        return said if self.report is None else f"{said}; the report: distill show {self.artifact[:12]} --file {self.report}"


def check_gates(gates: Mapping[str, Gate], nodes: Sequence[Node]) -> None:
    """Look whether every gate asks for a figure that the runs of its recipe will have. Raises one `BadInput` that names everything wrong."""
    wrong = [mistake for name, gate in gates.items() for mistake in _mistakes(f"gates.{name}", gate, nodes)]
    if wrong:
        raise BadInput("\n".join(wrong))


def check_passes(names: Sequence[str], gates: Mapping[str, Gate]) -> None:
    """Raise `BadInput` for a gate to be passed that there is not."""
    for name in names:
        if name not in gates:
            raise BadInput(f"--pass-gate {name}: is no gate of the recipe; expected one of {', '.join(gates) or 'none: it has no gates'}")


def _mistakes(place: str, gate: Gate, nodes: Sequence[Node]) -> Iterator[str]:
    node = next((node for node in nodes if node.name == gate.after), None)
    if node is None:
        yield f"{place}.after: found {shown(gate.after)}; expected one of {', '.join(node.name for node in nodes)}"
        return
    if isinstance(node.config, EvaluateConfig):
        rows = _rows(node, node.config, nodes)
        if gate.student not in rows:
            yield f"{place}.student: found {shown(gate.student)}; expected one of {', '.join(rows)}"
        elif gate.steps not in rows[gate.student]:
            yield f"{place}.steps: found {shown(gate.steps)}; {gate.student} is measured in {', '.join(map(str, rows[gate.student]))}"
    known = _figures(node)
    if gate.metric not in known:
        yield f"{place}.metric: found {shown(gate.metric)}; after {gate.after} expected one of {', '.join(known)}"


def _rows(evaluate: Node, config: EvaluateConfig, nodes: Sequence[Node]) -> dict[str, tuple[int, ...]]:
    """Step counts by student of the report's table."""
    students = [node for node in nodes if node.name in evaluate.inputs["students"]]
    return {TEACHER: config.teacher_steps} | {node.name: _steps(node.config) for node in students}


def _steps(config: Model) -> tuple[int, ...]:
    if isinstance(config, LcmConfig):
        return config.steps
    assert isinstance(config, LinkConfig | DmdConfig), "a student's stage says how many steps it is for"
    return (config.steps,)


def _figures(node: Node) -> list[str]:
    """Names of the figures that a run's artifact will tell."""
    if isinstance(node.config, EvaluateConfig):
        stage(node.stage).load()  # says which packages are missing
        from stages.evaluate.metrics.catalogue import GROUPS, PICTURE_METRICS, REFERENCES  # noqa: PLC0415 - imports torch

        asked = node.config.metrics
        compared = [
            f"{name}_{reference}" for group in asked if group in GROUPS for name in GROUPS[group].metrics for reference in REFERENCES
        ]
        return compared + [name for name, (group, _) in PICTURE_METRICS.items() if group in asked]
    kinds = [kind for kind in get_args(get_args(Content)[0]) if kind.model_fields["kind"].default in stage(node.stage).makes]
    names = [name for kind in kinds for name, field in kind.model_fields.items() if field.annotation in (int, float, float | None)]
    if isinstance(node.config, StudentTraining):
        names = [LOSS, *(name for name in names if name != "best_fid" or node.config.watch is not None)]
    return list(dict.fromkeys(names))


def gates_after(gates: Mapping[str, Gate], node: str) -> dict[str, Gate]:
    """Return the gates that a run's artifact has to go through."""
    return {name: gate for name, gate in gates.items() if gate.after == node}


def go_through(verdict: Verdict, *, by_hand: bool) -> None:
    """Say in the log what became of a gate. Raises `GateNotMet` unless it is met or passed `by_hand`."""
    if verdict.met:
        logger.info("%s", verdict.sentence)
    elif by_hand:
        logger.warning("%s: it is passed all the same, as was asked for", verdict.sentence)
    else:
        raise GateNotMet(f"{verdict.sentence}; to go on all the same: --pass-gate {verdict.name}, or pass_gates in the flow's form")


def go_through_gates(gates: Mapping[str, Gate], manifest: Manifest, store: ArtifactStore, passed: Collection[str]) -> None:
    """Look at every gate after the run that made an artifact. Raises `GateNotMet` for the first that is neither met nor among `passed`."""
    for name, gate in gates_after(gates, manifest.lineage.node).items():
        go_through(look(name, gate, manifest, store), by_hand=name in passed)


def look(name: str, gate: Gate, manifest: Manifest, store: ArtifactStore) -> Verdict:
    """Find a gate's figure in the artifact that it comes after."""
    paths = {entry.path for entry in manifest.files}
    report = "report.html" if "report.html" in paths else None
    return Verdict(name, gate, _value(gate, manifest, store), manifest.identity, report)


def _value(gate: Gate, manifest: Manifest, store: ArtifactStore) -> float:
    content = manifest.content
    if isinstance(content, Evaluation):
        return content.scores.get(f"{gate.student}@{gate.steps}", {}).get(gate.metric, float("nan"))
    if gate.metric == LOSS:
        return _last_loss(manifest, store)
    value = getattr(content, gate.metric, None)
    return float("nan") if value is None else float(value)


def _last_loss(manifest: Manifest, store: ArtifactStore) -> float:
    from stages.students import METRICS_FILE  # noqa: PLC0415 - imports torch
    from stages.training.metrics import kept_rows, read_metrics  # noqa: PLC0415

    rows = kept_rows(read_metrics(store.fetch(manifest, [METRICS_FILE]) / METRICS_FILE))
    last = [row["student.loss"] for row in rows[-max(1, len(rows) // _LAST_SHARE) :]]
    return sum(last) / len(last)
