"""Runs whose machine is gone: an automation on the server that finds them by their missing heartbeats and marks them as crashed.

A worker tells of a run's process that died. Of a worker that died with its machine nobody would: the run would stay `Running`, and its chain wait.
"""

from datetime import timedelta
from typing import Final

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from flows.automations import put_automation

HEARTBEAT_SECONDS: Final = 30
"""Prefect's smallest."""
SILENT_SECONDS: Final = 120
"""How long a run may be silent."""
TAG: Final = "distill-pool"
"""Of the runs that are watched: those of deployments on pools, whose environment sets the heartbeat."""
NAME: Final = "distill: runs of lost workers"


def watch_for_lost_runs(client: SyncPrefectClient) -> None:
    """Make the automation, or bring it up to date."""
    silent = {"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed"))}
    automation = AutomationCore(
        name=NAME,
        description=f"Marks a run as crashed after {SILENT_SECONDS} s without a heartbeat; its chain starts it again.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect=silent,
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=ResourceSpecification({"prefect.resource.id": [f"prefect.tag.{TAG}"], "prefect.resource.role": ["tag"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENT_SECONDS),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=f"no heartbeat for {SILENT_SECONDS} s: its worker is lost")],
    )
    put_automation(client, automation)
