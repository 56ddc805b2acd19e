"""Who is told of a failure, and of an alarm of a training that goes on by itself: a webhook, called by automations of the server."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final
from urllib.parse import urlsplit

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.events.actions import CallWebhook
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from pydantic import SecretStr

from flows.automations import put_automation
from schemas.errors import BadInput

ALARM: Final = "distill.alarm"
"""Event of a run whose training raised an alarm and was taken back."""
BLOCK: Final = "distill-notify"
"""Name of the webhook block, whose address is a secret on the server."""
FAILURES: Final = "distill: notify of failures"
ALARMS: Final = "distill: notify of alarms"
TAG: Final = "distill"
"""Of the runs of all deployments."""

_RUN: Final = {"prefect.resource.id": ["prefect.flow-run.*"]}
_FAILED: Final = '{"text": {{ (flow_run.name ~ ": " ~ flow_run.state.name ~ ": " ~ flow_run.state.message) | tojson }}}'
_ALARMED: Final = '{"text": {{ (event.resource.name ~ ": " ~ event.payload.message) | tojson }}}'


def check_address(url: str) -> str:
    """Return an address that can be notified. Raises `BadInput`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(f"--notify {parts.scheme or url}: expected the address of a webhook, https://host/path")
    return url


def notify(client: SyncPrefectClient, url: str) -> None:
    """Have a message, JSON with a `text` as chat services take it, posted to `url` for every run that fails or crashes, and for every alarm."""
    block = Webhook(method="POST", url=SecretStr(url), headers={"Content-Type": "application/json"})
    block.save(BLOCK, overwrite=True)
    document = client.read_block_document_by_name(BLOCK, Webhook.get_block_type_slug())
    of_ours = ResourceSpecification({"prefect.resource.id": [f"prefect.tag.{TAG}"], "prefect.resource.role": ["tag"]})
    failures = _trigger({"prefect.flow-run.Failed", "prefect.flow-run.Crashed"}, of_ours)
    for name, trigger, payload in (
        (FAILURES, failures, _FAILED),
        (ALARMS, _trigger({ALARM}, ResourceSpecification({})), _ALARMED),
    ):
        actions = [CallWebhook(block_document_id=document.id, payload=payload)]
        put_automation(client, AutomationCore(name=name, description="Calls a webhook.", trigger=trigger, actions=actions))


def _trigger(events: set[str], related: ResourceSpecification) -> EventTrigger:
    return EventTrigger(
        expect=events,
        match=ResourceSpecification(_RUN),
        match_related=related,
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )


@contextmanager
def alarms_are_events() -> Iterator[None]:
    """Emit an event of the current flow run for each alarm that training logs in the block."""
    handler, logger = _AlarmHandler(), logging.getLogger("stages")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _AlarmHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        context = FlowRunContext.get()
        if not hasattr(record, "alarm") or context is None or context.flow_run is None:
            return
        resource = {"prefect.resource.id": f"prefect.flow-run.{context.flow_run.id}", "prefect.resource.name": context.flow_run.name}
        emit_event(ALARM, resource=resource, payload={"alarm": record.alarm, "message": record.getMessage()})
