"""Runs whose machine is gone: automations on the server that find them by what they no longer say, and have them started again.

A worker tells of a run's process that died. Of a worker that died with its machine nobody would: the run would stay `Running` and its chain wait, and
a chain's own run would wait for ever. A lost run is scheduled again as it is, so that whoever waits for it goes on waiting, and the next worker of
its pool goes on from its last checkpoint. One that was only taken for lost does no harm: its lease on the store keeps the second from the same work.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Final

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from flows.automations import put_automation
from flows.environment import SILENT_SECONDS

BEGIN_FACTOR: Final = 5
"""Times as long a run may take to begin: a container's image is fetched first."""
TAG: Final = "distill-pool"
"""Of the runs that are watched: those of deployments on pools, whose environment sets the heartbeat."""
NAME: Final = "distill: runs of lost workers"

_ENDED: Final = ("Completed", "Failed", "Cancelled", "Crashed")
_AGAIN: Final = (StateType.SCHEDULED, "AwaitingRetry")


def watch_for_lost_runs(client: SyncPrefectClient, silent_seconds: int = SILENT_SECONDS) -> None:
    """Make the automations, or bring them up to date. `silent_seconds` is at least `environment.LEAST_SILENT_SECONDS`."""
    for automation in automations(silent_seconds):
        put_automation(client, automation)


def automations(silent: int) -> Iterator[AutomationCore]:
    """Yield the automations, for runs that are lost when they have been silent so many seconds."""
    begin = BEGIN_FACTOR * silent
    heartbeat = _unless(("heartbeat",), (*_ENDED, "Cancelling", "AwaitingRetry", "heartbeat"), silent)
    yield _automation(NAME, heartbeat, *_AGAIN, f"no heartbeat for {silent} s: its worker is lost, and it is started again")
    begun = _unless(("Pending", "Submitting"), (*_ENDED, "Cancelling", "AwaitingRetry", "Running"), begin)
    late = f"not begun {begin} s after a worker had taken it: it is started again"
    yield _automation("distill: runs that do not begin", begun, *_AGAIN, late)
    gone = f"cancelled, and its worker has not ended it in {silent} s"
    cancelled = _unless(("Cancelling",), _ENDED, silent)
    yield _automation("distill: cancelled runs of lost workers", cancelled, StateType.CANCELLED, "Cancelled", gone)


def _unless(after: tuple[str, ...], expected: tuple[str, ...], seconds: int) -> EventTrigger:
    """Return what is triggered when none of the `expected` events of a watched run follows one of `after` in time."""
    return EventTrigger(
        after={f"prefect.flow-run.{event}" for event in after},
        expect={f"prefect.flow-run.{event}" for event in expected},
        match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
        match_related=ResourceSpecification({"prefect.resource.id": [f"prefect.tag.{TAG}"], "prefect.resource.role": ["tag"]}),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=seconds),
    )


def _automation(name: str, trigger: EventTrigger, kind: StateType, state: str, message: str) -> AutomationCore:
    action = ChangeFlowRunState(state=kind, name=state, message=message)
    return AutomationCore(name=name, description=f"Sets a run to {state}: {message}.", trigger=trigger, actions=[action])
