"""A quality gate as a task of a flow run: its page says figure and bound, and where it is not met the run fails there, with the reason."""

from collections.abc import Collection

from prefect import Task
from prefect.artifacts import create_markdown_artifact

from infra.store import ArtifactStore
from schemas.gates import Gate
from schemas.manifest import Manifest
from stages.gates import Verdict, gates_after, go_through, look
from stages.plan import Node, Plan


def go_through_gates(plan: Plan, node: Node, manifest: Manifest, store: ArtifactStore, passed: Collection[str]) -> None:
    """Look at every gate after a stage run, each in a task of its own. Raises `GateNotMet` for one that is neither met nor among `passed`."""
    for name, gate in gates_after(plan.recipe.gates, node.name).items():
        _pass(name, gate, manifest, store, by_hand=name in passed)


def _pass(name: str, gate: Gate, manifest: Manifest, store: ArtifactStore, *, by_hand: bool) -> None:
    def judge() -> None:
        verdict = look(name, gate, manifest, store)
        create_markdown_artifact(page(verdict, by_hand=by_hand), key=f"gate-{name}", description=verdict.sentence)
        go_through(verdict, by_hand=by_hand)

    # neither cached, for the bound may be another, nor tried again
    Task(judge, name="gate", task_run_name=f"gate {name}", persist_result=False)()


def page(verdict: Verdict, *, by_hand: bool) -> str:
    """A gate in words."""
    state = "met" if verdict.met else "not met, and passed by hand" if by_hand else "not met"
    return f"## gate {verdict.name}: {state}\n\n{verdict.sentence}\n\nArtifact: `{verdict.artifact}`\n"
