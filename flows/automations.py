"""Automations of the server, made by name and brought up to date."""

from prefect.client.orchestration import SyncPrefectClient
from prefect.events.schemas.automations import AutomationCore


def put_automation(client: SyncPrefectClient, automation: AutomationCore) -> None:
    """Make the automation, or bring the one of its name up to date."""
    known = client.read_automations_by_name(automation.name)
    if known:
        client.update_automation(known[0].id, automation)
    else:
        client.create_automation(automation)
